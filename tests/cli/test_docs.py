from __future__ import annotations

import re
from pathlib import Path

from asyncrl.cli.docs import PAGES, configuration_page, write_pages
from asyncrl.config import Config, _paths

ROOT = Path(__file__).parents[2]


def test_configuration_page_is_what_the_code_says() -> None:
    written = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert written == configuration_page(), "run `python -m asyncrl.cli.docs`"


def test_every_setting_is_on_the_page() -> None:
    listed = re.findall(r"^\| `(\w+)` \|", configuration_page(), re.M)
    assert sorted(listed) == sorted(path.rsplit(".", 1)[-1] for path in _paths(Config))


def test_rows_say_value_default_and_meaning() -> None:
    page = configuration_page()
    assert "| `top_p` | float > 0, ≤ 1 | `1.0` | Below 1 the sampler's" in page
    assert '| `policy` | `"wait"` or `"pace"` | `"wait"` | `wait`: a hard bound;' in page
    assert "| `max_steps` | int > 0 or `none` | none | Stop after" in page
    assert "| `betas` | [float ≥ 0, < 1, float ≥ 0, < 1] | `[0.9, 0.95]` |" in page


def test_pages_are_written(tmp_path: Path) -> None:
    assert {path.name for path in write_pages(tmp_path)} == set(PAGES)
    assert (tmp_path / "configuration.md").read_text(encoding="utf-8") == configuration_page()
