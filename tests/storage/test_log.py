from __future__ import annotations

import json
from pathlib import Path

import pytest
import structlog

from asyncrl.storage.log import open_log


def read(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_any_logger_writes_json_lines_into_the_run(tmp_path: Path) -> None:
    echoed: list[str] = []
    with open_log(tmp_path / "log.jsonl", echoed.append) as log:
        log.bind(replica=2).info("server ready", port=8000)
        structlog.get_logger().warning("slow", seconds=float("nan"))
        log.debug("not kept")
    first, second = read(tmp_path / "log.jsonl")
    assert {"level": "info", "event": "server ready", "replica": 2, "port": 8000}.items() <= first.items()
    assert second["seconds"] is None
    assert str(first["time"]).endswith("Z")
    assert echoed == ["warning: slow (seconds=nan)"]


def test_exceptions_keep_their_traceback_in_the_file_only(tmp_path: Path) -> None:
    echoed: list[str] = []
    with open_log(tmp_path / "log.jsonl", echoed.append) as log:
        try:
            raise ValueError("no")
        except ValueError:
            log.exception("rollout failed", row=3)
    (line,) = read(tmp_path / "log.jsonl")
    assert "ValueError: no" in str(line["exception"])
    assert echoed == ["error: rollout failed (row=3)"]


def test_warnings_go_to_stderr_by_default(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open_log(tmp_path / "log.jsonl") as log:
        log.error("died")
    assert capsys.readouterr().err == "error: died\n"


def test_a_second_run_has_a_log_of_its_own(tmp_path: Path) -> None:
    logger = structlog.get_logger()  # as at the top of a module
    for name in ("a", "b"):
        with open_log(tmp_path / name):
            logger.info(name)
    assert [line["event"] for name in ("a", "b") for line in read(tmp_path / name)] == ["a", "b"]
