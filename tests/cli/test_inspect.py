from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from asyncrl.cli import inspect
from asyncrl.cli.main import main
from asyncrl.storage import logged
from asyncrl.storage.rollouts import RolloutLog
from asyncrl.types import EvaluatedRun, Group, RolloutRun, RolloutSample

OPENING = "<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n"
RESULT = "<|im_start|>user\n<tool_response>\n4\n</tool_response><|im_end|>\n"


def decode(tokens: list[int]) -> str:
    return "".join(map(chr, tokens))


def sample(reward: float, answer: str, **info: Any) -> RolloutSample:
    """Prompt, tool call, tool result, answer: one token per letter."""
    parts = [(OPENING, 0), ("<tool_call>2+2", 1), (RESULT, 0), (answer, 1)]
    mask = [trained for text, trained in parts for _ in text]
    logprobs = [-0.5 if trained else -99.0 for trained in mask]
    logprobs[-1] = -3.0
    versions = [6] * (len(mask) - 1) + [7]
    return RolloutSample([ord(letter) for text, _ in parts for letter in text], logprobs, mask, reward, versions, info)


def group(step: int, *samples: RolloutSample, row: int = 0) -> Group:
    runs = [RolloutRun([sample]) for sample in samples]
    return Group(step * 10, row, 0, 6, runs, [0.25] * len(runs), admitted_at=1.0, finished_at=3.5)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Three steps: rewards 0 and 1; 0.5; 1 and -1."""
    log = RolloutLog(tmp_path / "rollouts.jsonl", decode, groups_per_step=4)
    log.write(
        1, [group(1, sample(0.0, "five", tool_calls=1, tool_errors=1), sample(1.0, "four-a", finish_reason="stop"))]
    )
    log.write(2, [group(2, sample(0.5, "x" * 500, finish_reason="length"), row=8)])
    log.write(3, [group(3, sample(1.0, "four-b"), sample(-1.0, "\x1b[2J[red]é", judge="unsure"))])
    log.close()
    return tmp_path


@pytest.fixture
def look(run: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def look(*arguments: str) -> str:
        assert main(["inspect", str(run), *arguments]) == 0
        return capsys.readouterr().out

    return look


def shown(text: str) -> list[str]:
    """Step and place in the group of each rollout, in order."""
    heads = [line.split() for line in text.splitlines() if line.startswith("step ")]
    return [f"{head[head.index('step') + 1]}.{head[head.index('rollout') + 1]}" for head in heads]


def test_a_rollout_is_shown_with_its_numbers_and_what_is_trained(look: Callable[..., str]) -> None:
    text = look("--contains", "five")
    assert "reward 0.000   advantage 0.250" in text
    assert "drawn by version 6, 7" in text
    assert "admitted at version 6   the group 2.5 s" in text
    assert "log-prob mean -0.639, lowest -3.000" in text  # 17 tokens at -0.5 and one at -3
    assert "tool calls 1 (1 failed)" in text
    marked = [line for line in text.splitlines() if "┃" in line]
    assert marked == ["policy     ┃ <tool_call>2+2", "policy     ┃ five"]
    assert "╰ 14 tokens · version 6 · log-prob -0.500\n" in text
    roles = [line.split()[0] for line in text.splitlines() if line[:1].isalpha() and "<" in line]
    assert roles == ["user", "assistant", "policy", "user", "tool"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], ["3.1", "3.2", "2.1", "1.1", "1.2"]),
        (["--limit", "2"], ["3.1", "3.2"]),
        (["--step", "1"], ["1.1", "1.2"]),
        (["--row", "8"], ["2.1"]),
        (["--reward", "0.5:"], ["3.1", "2.1", "1.2"]),
        (["--reward=-1:0"], ["3.2", "1.1"]),
        (["--min-tokens", "500"], ["2.1"]),
        (["--max-tokens", "500", "--limit", "2"], ["3.1", "3.2"]),
        (["--contains", "four"], ["3.1", "1.2"]),
        (["--errors"], ["2.1", "1.1"]),
        (["--best", "3"], ["3.1", "1.2", "2.1"]),
        (["--worst", "2"], ["3.2", "1.1"]),
        (["--worst", "1", "--step", "1"], ["1.1"]),
    ],
)
def test_filters(look: Callable[..., str], arguments: list[str], expected: list[str]) -> None:
    assert shown(look(*arguments)) == expected


def test_a_pipe_gets_plain_text_that_fits_and_cannot_move_the_cursor(look: Callable[..., str]) -> None:
    text = look()
    assert max(map(len, text.splitlines())) <= 80
    assert "\x1b" not in text
    assert "┃ \\x1b[2J[red]é" in text
    assert "judge: unsure" in text
    assert sum(line.count("x") for line in text.splitlines() if "┃ xx" in line) == 500


def test_a_terminal_gets_colour(run: Path) -> None:
    console = Console(force_terminal=True, color_system="standard", width=80, _environ={})
    newest = next(logged.read_rollouts(run / "rollouts.jsonl"))
    with console.capture() as capture:
        inspect.show(newest, console)
    assert "\x1b[1;32mfour-b" in capture.get()
    assert "\x1b[36m" in capture.get()


@pytest.mark.parametrize("block", [1, 7, 4096])
def test_reading_from_the_end_finds_every_line(run: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(logged, "BLOCK_BYTES", block)
    steps = [rollout.group["step"] for rollout in logged.read_rollouts(run / "rollouts.jsonl")]
    assert steps == [3, 3, 2, 1, 1]


def test_a_line_that_is_being_written_is_left_out_and_a_broken_one_is_named(
    run: Path, look: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    log = run / "rollouts.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(lines) + lines[0][:200])
    assert shown(look("--limit", "1")) == ["3.1"]
    log.write_bytes(lines[0] + b'{"step": 2}\n' + lines[2])
    assert shown(look("--limit", "2")) == ["3.1", "3.2"]
    assert main(["inspect", str(run)]) == 2
    assert f"byte {len(lines[0])}: this line is not a group of rollouts" in capsys.readouterr().err


def test_evaluations_are_shown_when_asked_for(
    run: Path, look: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = look("--limit", "100")
    log = RolloutLog(run / "rollouts.jsonl", decode, groups_per_step=2)
    for row in range(3):  # the last is not among the first two
        log.write_evaluated(EvaluatedRun(7, row, RolloutRun([sample(0.25, f"held-{row}")]), 1.5))
    log.close()
    assert look("--limit", "100") == before
    text = look("--evaluation")
    assert "evaluation at step 7 · row 1" in text
    assert "reward 0.250\nit took 1.500 s" in text
    assert ("held-0" in text, "held-1" in text, "held-2" in text) == (True, True, False)
    assert "four" not in text


def test_tool_calls_and_times_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    calls = [{"id": f"c{n}", "type": "function", "function": {"name": "add", "arguments": {"a": n}}} for n in range(3)]
    messages = [
        {"role": "user", "content": "go"},
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "c0", "content": "1"},
        {"role": "tool", "tool_call_id": "c1", "content": "Error: no"},
    ]
    chat = sample(1.0, "four", messages=messages, tool_seconds=[0.25, 1.5], turn_seconds=[9.0, 0.5, 0.75])
    logged = group(1, replace(chat, turn_rewards=[0.25, None]))
    logged.seconds = [2.25]
    log = RolloutLog(tmp_path / "rollouts.jsonl", decode, groups_per_step=4)
    log.write(1, [logged])
    log.close()
    assert main(["inspect", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "it took 2.2 s, the group 2.5 s" in text
    assert "turn rewards [0.25, null]" in " ".join(text.split())
    calls_shown = [line.split("→ ")[1] for line in text.splitlines() if "→" in line]
    assert calls_shown == ['add {"a": 0}   1   0.25 s', 'add {"a": 1}   Error: no   1.50 s', 'add {"a": 2}   not run']
    turns = [
        line.split("╰ ")[1] for line in text.splitlines() if "╰" in line
    ]  # the first of three is trained elsewhere
    assert turns == [
        "14 tokens · version 6 · log-prob -0.500 · 0.50 s",
        "4 tokens · version 6, 7 · log-prob -1.125 · 0.75 s",
    ]


def test_the_log_is_read_no_further_than_needed(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies before the rollouts that are shown may be gigabytes."""
    monkeypatch.setattr(logged, "BLOCK_BYTES", 512)
    starts = [start for start, _, _ in logged._lines_from_the_end(run / "rollouts.jsonl")]
    assert all(later > earlier for later, earlier in pairwise(starts))
    log = run / "rollouts.jsonl"
    log.write_bytes(b"never read\n" + log.read_bytes())
    assert main(["inspect", str(run), "--limit", "5"]) == 0
    assert main(["inspect", str(run), "--limit", "6"]) == 2


def test_nothing_matches(look: Callable[..., str]) -> None:
    assert look("--reward", "2:") == "No rollout in the log matches. Ask for less, or look without filters.\n"


def test_there_is_nothing_to_look_at(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path / "gone")]) == 2
    assert "there is no run folder" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path)]) == 2
    RolloutLog(tmp_path / "rollouts.jsonl", decode, groups_per_step=0).close()
    assert main(["inspect", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("log_rollouts = 0") == 2


@pytest.mark.parametrize(
    "arguments",
    [["--reward", "1"], ["--reward", "2:1"], ["--reward", "a:b"], ["--limit", "0"], ["--best", "1", "--worst", "1"]],
)
def test_what_cannot_be_asked(run: Path, arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main(["inspect", str(run), *arguments])
    assert error.value.code == 2
