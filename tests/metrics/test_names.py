from __future__ import annotations

from pathlib import Path

from asyncrl.metrics.names import METRIC_BY_NAME, METRICS, PARTS, metrics_page

ROOT = Path(__file__).parents[2]


def test_page_is_what_the_table_says() -> None:
    written = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert written == metrics_page(), "run `python -m asyncrl.cli.docs`"


def test_names_are_unique_and_every_part_is_used() -> None:
    assert len(METRIC_BY_NAME) == len(METRICS)
    assert {metric.part for metric in METRICS} == set(PARTS)


def test_names_end_in_their_unit_where_it_is_seconds() -> None:
    for metric in METRICS:
        assert (metric.unit == "s") == (metric.name.endswith("_s") and "per" not in metric.name), metric.name
