"""What the report of runs says; test_report_in_browser.py opens it."""

from __future__ import annotations

import asyncio
import json
import re
import socket
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest

from asyncrl.cli.main import main
from asyncrl.errors import ConfigError
from asyncrl.metrics.jsonl import JsonlFile
from asyncrl.reports import browser
from asyncrl.reports.curves import MOST_POINTS, binned, moving_mean
from asyncrl.reports.report import report
from asyncrl.reports.run_data import load_run
from asyncrl.reports.serve import serve
from asyncrl.storage.logged import Rollout
from tests.reports.runs import make_run, step_record


def block(shown: Any, key: str) -> Any:
    return next(block for section in shown["sections"] for block in section["blocks"] if block["id"] == key)


# What is on the page


def test_the_overview_says_how_it_went(run: Path) -> None:
    shown = report([load_run(run)])
    tiles = {tile["label"]: (tile["value"], tile["about"]) for tile in block(shown, "numbers")["tiles"]}
    assert shown["state"] == "ended"
    assert tiles["optimizer steps"] == ("40", "of 40")
    assert tiles["time"][0] == "1 min 20 s"
    assert tiles["held-out reward"] == ("0.2 → 0.8", "95 % intervals 0.1–0.3 and 0.7–0.9")
    assert tiles["worst staleness"] == ("2 steps", "bound: 2, mean 0.8")
    assert tiles["groups trained"] == ("120 of 160", "40 filtered")
    assert tiles["throughput"][0] == "900 tokens/s"
    assert "waiting for rollouts 50%" in block(shown, "bottleneck")["text"]
    settings = dict(block(shown, "settings")["rows"])
    assert settings["`model`"] == "tiny"
    assert "`staleness.policy`" not in settings  # a default


def test_the_mean_staleness_is_over_tokens_and_not_over_steps(tmp_path: Path) -> None:
    root = make_run(tmp_path / "run", steps=1)  # 1,500 tokens of staleness 0.8
    with JsonlFile(root / "metrics.jsonl") as metrics:
        metrics.write(step_record(2, staleness_mean=2.0, loss_tokens=500))
    tiles = {tile["label"]: tile["about"] for tile in block(report([load_run(root)]), "numbers")["tiles"]}
    assert tiles["worst staleness"] == "bound: 2, mean 1.1"


def test_time_adds_up(run: Path) -> None:
    series = block(report([load_run(run)]), "time")["series"]
    shares = {one["name"]: one["y"][0] for one in series}
    assert shares == {
        "training": 0.3,
        "waiting: window full": 0.35,
        "waiting: staleness bound": 0.15,
        "waiting for a hot-load": 0.05,
        "checkpoint": 0.05,
        "rest": pytest.approx(0.1),
    }


def test_every_chart_has_units_and_something_to_show(run: Path) -> None:
    shown = report([load_run(run)])
    charts = [block for section in shown["sections"] for block in section["blocks"] if block["kind"] == "chart"]
    assert len(charts) > 15
    for one in charts:
        assert one["series"], one["id"]
        assert one["x"]["title"], one["id"]
        assert one["y"]["title"], one["id"]


def test_a_long_run_is_binned(tmp_path: Path) -> None:
    """Means, in a band from the lowest to the highest; what is rare stays to be seen."""
    root = make_run(tmp_path / "run", steps=2)
    with JsonlFile(root / "metrics.jsonl") as metrics:
        for step in range(3, 5 * MOST_POINTS + 1):
            metrics.write(step_record(step, ess=0.1 if step == 777 else 0.98))
    shown = report([load_run(root)])
    (ess,) = block(shown, "ess")["series"]
    assert len(ess["y"]) == MOST_POINTS
    assert min(ess["low"]) == 0.1
    assert min(ess["y"]) == pytest.approx((0.98 * 4 + 0.1) / 5, abs=1e-4)
    assert "a point stands for 5 steps" in shown["sections"][1]["about"]
    assert len(json.dumps(shown)) < 2_000_000


def test_bins_by_hand() -> None:
    curve = binned(np.arange(1.0, 8.0), np.array([1, 3, np.nan, 5, np.nan, np.nan, 7.0]), 3)
    assert curve.x.tolist() == [2, 5, 8]
    assert curve.y.tolist() == [2, 5, 7]
    assert curve.low is not None
    assert curve.low.tolist() == [1, 5, 7]
    assert moving_mean(np.array([1.0, np.nan, 3.0, 5.0])).tolist() == [2.0, 3.0, 3.0, 4.0]


def test_what_an_old_run_does_not_say_is_not_drawn_as_something_else(tmp_path: Path) -> None:
    root = make_run(tmp_path / "run", steps=2)
    with JsonlFile(root / "metrics.jsonl") as metrics:
        metrics.write({"step": 3, "time_s": 6.0, "step_s": 2.0, "reward_mean": 0.5})
    (root / "metrics.jsonl").write_text((root / "metrics.jsonl").read_text().splitlines(keepends=True)[-1])
    shown = report([load_run(root)])
    drawn = {one["id"]: one for section in shown["sections"] for one in section["blocks"]}
    assert "time" not in drawn
    assert drawn["reward-time"]["series"][0]["kind"] == "line+points", "a line through one point is none"
    assert not drawn["reward-time"]["about"]


def test_a_run_that_has_not_stepped_can_be_looked_at(tmp_path: Path) -> None:
    root = make_run(tmp_path / "run", steps=0)
    (root / "summary.json").unlink()
    shown = report([load_run(root)])
    assert "No optimizer step" in block(shown, "bottleneck")["text"]
    assert shown["over"] is False


def test_a_failed_run_says_why(tmp_path: Path) -> None:
    root = make_run(tmp_path / "run", steps=1)
    (root / "summary.json").write_text('{"error": "the disk was full"}')
    assert block(report([load_run(root)]), "error")["text"] == "The run failed: the disk was full"
    (root / "summary.json").write_text('{"error": "a tool failed:\\nTraceback"}')
    going = make_run(tmp_path / "other", steps=0)
    rows = block(report([load_run(root), load_run(going)]), "bottlenecks")["rows"]
    assert rows[0][1].startswith("The run failed: a tool failed: Time: ")
    assert rows[1][1] == "No optimizer step has been taken yet."


def test_supervised_training_has_a_report_too(tmp_path: Path) -> None:
    """Without rollouts, and with evaluations of its own."""
    with JsonlFile(tmp_path / "metrics.jsonl") as metrics, JsonlFile(tmp_path / "evaluations.jsonl") as evaluations:
        for step in range(1, 9):
            metrics.write({"step": step, "time_s": step, "step_s": 1.0, "train_s": 0.9, "loss": 1 / step, "units": 4})
            evaluations.write({"eval_version": step, "eval_loss": 2 / step})
    shown = report([load_run(tmp_path)])
    assert [section["title"] for section in shown["sections"]] == ["Overview", "Reward", "Off-policyness", "Speed"]
    assert block(shown, "eval_loss")["series"][0]["y"][0] == 2
    assert [one["id"] for one in shown["sections"][0]["blocks"]] == ["numbers"]


def test_runs_are_compared(tmp_path: Path) -> None:
    runs = [
        load_run(make_run(tmp_path / f"{staleness}-{seed}", steps=20, staleness=staleness, seed=seed, level=level))
        for staleness, seed, level in ((1, 0, 0.2), (1, 1, 0.4), (8, 0, 0.7))
    ]
    shown = report(runs)
    names = ["seed 0 · max_staleness 1", "seed 1 · max_staleness 1", "seed 0 · max_staleness 8"]
    assert [one["name"] for one in block(shown, "ess")["series"]] == names
    joined = report(runs, groups={"bound 1": ["1-0", "1-1"], "bound 8": ["8-0"]})
    first, other = block(joined, "reward")["series"][:2]
    assert (first["name"], other["name"]) == ("bound 1", "bound 8")
    assert first["color"] != other["color"]
    middle = first["y"][5]
    assert middle == pytest.approx((first["low"][5] + first["high"][5]) / 2, abs=1e-3)
    assert first["high"][5] - first["low"][5] == pytest.approx(0.2, abs=1e-3)
    assert len(block(joined, "runs")["rows"]) == 3
    with pytest.raises(ConfigError, match="names the run 'none'"):
        report(runs, groups={"a": ["none"]})


def test_a_page_holds_a_bounded_choice_of_rollouts(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = [load_run(run)]
    everything = block(report(loaded), "rollouts")
    assert len(everything["rollouts"]) == 81
    assert "All 81" in everything["about"]
    monkeypatch.setattr(browser, "MOST_SHOWN", 20_000)
    some = block(report(loaded), "rollouts")
    assert len(json.dumps(some["rollouts"], ensure_ascii=False)) < 25_000
    assert re.match(r"\d+ of 81 that were logged", some["about"])
    kinds = {(one["evaluation"], one["reward"]) for one in some["rollouts"]}
    assert {(True, 1), (False, 1), (False, 0)} <= kinds  # each sort has had its share
    monkeypatch.setattr(browser, "MOST_READ", 1000)
    assert "of the newest" in block(report(loaded), "rollouts")["about"]


def test_of_many_rollouts_some_are_from_the_whole_run() -> None:
    """All alike, so that the best and the worst are the newest too."""
    logged = [Rollout({"step": 150 - place}, 0, 1.0, None, None, []) for place in range(150)]
    steps = {rollout.group["step"] for rollout in browser._choose(logged)}
    assert set(range(51, 151)) | set(range(2, 51, 2)) == steps


def test_long_and_strange_texts_are_shown_as_they_are() -> None:
    assert browser.shown_text("a\x1b[2J\u202eb\tc\n\x00\ud800") == "a\\x1b[2J\\u202eb\tc\n\\x00\\ud800"
    cut = browser._cut("x" * 50_000)
    assert len(cut) < 21_000
    assert "30,000 characters are left out" in cut


# Live


async def test_the_server_answers_its_own_page_alone(run: Path) -> None:
    addresses: asyncio.Queue[str] = asyncio.Queue()
    made = 0

    def make() -> Any:
        nonlocal made
        made += 1
        return report([load_run(run)], live=True)

    server = asyncio.create_task(serve([run], make, addresses.put_nowait))
    address = await asyncio.wait_for(addresses.get(), 30)
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/[\w-]{22}/", address)
    async with aiohttp.ClientSession() as session:

        async def ask(url: str, **headers: str) -> tuple[int, str]:
            async with session.get(url, headers=headers) as answer:
                assert answer.headers["Cache-Control"] == "no-store"
                return answer.status, answer.headers.get("ETag", "")

        status, tag = await ask(f"{address}data")
        assert status == 200
        assert await ask(f"{address}data", **{"If-None-Match": tag}) == (304, "")
        assert await ask(f"{address}data", Host="evil.test:80") == (403, "")
        assert await ask(f"{address}data", Host="localhost:80") == (200, tag)
        wrong = address.rpartition("/")[0][:-1] + ("a" if address[-2] != "a" else "b") + "/"
        assert (await ask(wrong))[0] == 404
        assert (await ask(f"{wrong}data"))[0] == 404
    assert made == 1  # nothing had changed
    server.cancel()
    with pytest.raises(asyncio.CancelledError):
        await server


# The command


def test_the_command_says_where_the_page_is(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["report", str(run)]) == 0
    assert (run / "report.html").exists()
    assert capsys.readouterr().out.startswith(f"report: {run / 'report.html'}  (")
    monkeypatch.chdir(tmp_path)
    other = make_run(tmp_path / "other", steps=3, seed=1)
    assert main(["report", str(run), str(other), "--join-seeds"]) == 0
    assert (tmp_path / "report.html").exists()
    (run / "report.html").unlink()


def test_what_was_asked_wrongly_is_said(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(run), str(run)]) == 2
    assert "named twice" in capsys.readouterr().err
    assert main(["report", str(run), "--out", str(run / "config.toml")]) == 2
    assert "is another file" in capsys.readouterr().err
    assert main(["report", str(run), "--port", "8000"]) == 2
    assert "give both" in capsys.readouterr().err
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["report", str(run), "--live", "--port", str(port)]) == 2
        assert f"--port: {port} cannot be used" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["report", str(run), "--live", "--port", "65536"])
    assert "'65536' is not a port" in capsys.readouterr().err


def test_a_report_is_made_quickly_and_loads_no_torch(run: Path) -> None:
    import subprocess
    import sys

    code = (
        f"from asyncrl.cli.main import main\nimport sys\nmain(['report', {str(run)!r}])\nprint('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "False"
    (run / "report.html").unlink()
