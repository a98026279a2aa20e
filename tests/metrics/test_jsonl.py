from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from asyncrl.metrics.jsonl import JsonlFile, encode


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_json_cannot_hold_becomes_null(bad: float) -> None:
    assert json.loads(encode({"loss": bad, "deep": [{"x": (1.5, bad)}]})) == {
        "loss": None,
        "deep": [{"x": [1.5, None]}],
    }


def test_other_objects_become_text_and_letters_stay() -> None:
    assert encode({"path": Path("a/b"), "text": "größe"}) == '{"path": "a/b", "text": "größe"}'


def test_each_line_can_be_read_while_the_file_is_open(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    with JsonlFile(path) as file:
        file.write({"a": "one\ntwo"})
        assert path.read_text() == '{"a": "one\\ntwo"}\n'
        file.write({"a": 2})
        assert len(path.read_text().splitlines()) == 2
