from __future__ import annotations

import json
import random
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from asyncrl.cli.main import main
from asyncrl.demo import run_demo
from asyncrl.demo.command import STEPS
from asyncrl.demo.demonstrations import demonstration, misread
from asyncrl.demo.model import demo_tokenizer, lessons
from asyncrl.demo.task import Problem, calculator, problems
from asyncrl.errors import ConfigError
from asyncrl.recipes.chat_rows import supervised_examples
from asyncrl.recipes.examples import Encoder

PROBLEM = Problem(a=37, b=48, c=6, first="+", second="*")


def test_a_problem_is_two_calls_and_an_answer() -> None:
    assert (PROBLEM.question, PROBLEM.first_call) == ("(37+48)*6", "37+48")
    assert (PROBLEM.second_call(85), PROBLEM.answer) == ("85*6", 510)
    assert PROBLEM.row == {"messages": [{"role": "user", "content": "(37+48)*6"}], "answer": "510"}


@pytest.mark.parametrize(("expression", "result"), [("12*34", "408"), ("3-10", "-7"), ("-7*3", "-21"), ("7--3", "10")])
async def test_the_calculator_does_one_operation(expression: str, result: str) -> None:
    assert await calculator.call({"expression": expression}) == result


@pytest.mark.parametrize("expression", ["(37+48)*6", "1+2+3", "12", "2**9", "1/2", ""])
async def test_the_calculator_does_no_more_than_that(expression: str) -> None:
    result = await calculator.invoke({"expression": expression})
    assert result.error
    assert "expected two whole numbers" in result.text


def test_held_out_numbers_are_never_trained_on_and_problems_follow_the_seed() -> None:
    trained = list(islice(problems(0, held_out=False), 3000))
    held_out = list(islice(problems(0, held_out=True), 500))
    assert not {(p.a, p.b) for p in trained} & {(p.a, p.b) for p in held_out}
    assert all(p.answer >= 0 for p in trained)
    assert trained[:50] == list(islice(problems(0, held_out=False), 50))
    assert trained[:50] != list(islice(problems(1, held_out=False), 50))


def test_without_clumsiness_a_demonstration_is_right() -> None:
    messages = demonstration(PROBLEM, random.Random(0), clumsiness=0.0)
    calls = [m["tool_calls"][0]["function"]["arguments"]["expression"] for m in messages if "tool_calls" in m]
    assert calls == ["37+48", "85*6"]
    assert [m["content"] for m in messages if m["role"] == "tool"] == ["85", "510"]
    assert messages[-1] == {"role": "assistant", "content": "510"}


def test_the_clumsy_agent_is_right_about_half_of_the_time_and_errs_in_each_place() -> None:
    rng = random.Random(0)
    shown = [(p, demonstration(p, rng)) for p in islice(problems(0, held_out=False), 2000)]
    right = sum(messages[-1]["content"] == str(p.answer) for p, messages in shown) / len(shown)
    assert 0.45 < right < 0.65
    assert {sum("tool_calls" in m for m in messages) for _, messages in shown} == {1, 2}
    assert len({misread(PROBLEM, rng) for _ in range(100)}) == 4


def test_what_is_taught_is_every_turn_of_the_assistant_and_nothing_else() -> None:
    tokenizer = demo_tokenizer()
    row = {"messages": demonstration(PROBLEM, random.Random(0), clumsiness=0.0)}
    (example,) = supervised_examples(row, Encoder(tokenizer), "all")
    taught = [token for token, weight in zip(example.tokens, example.weights, strict=True) if weight]
    call = '<tool_call>\n{{"name": "calculator", "arguments": {{"expression": "{}"}}}}\n</tool_call><|im_end|>'
    assert tokenizer.decode(taught) == call.format("37+48") + call.format("85*6") + "510<|im_end|>"
    assert len(taught) == 8 + 7 + 4  # a call is its expression and three tokens of markup


def test_the_lessons_are_clean_first_and_clumsy_later() -> None:
    rows = lessons(seed=0, steps=10)
    right = [_is_right(row["messages"]) for row in rows]
    assert len(rows) == 10 * 64
    assert all(right[: 7 * 64])
    assert 0.4 < sum(right[7 * 64 :]) / (3 * 64) < 0.7


def _is_right(messages: list[dict[str, Any]]) -> bool:
    """Whether the last message is what the question comes to."""
    inner, last = messages[0]["content"].removeprefix("(").split(")")
    return messages[-1]["content"] == str(eval(f"({inner}){last}"))


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_the_demo_runs_to_its_summary(tmp_path: Path, lora: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """Far too short to learn: whether it learns is the job of `make demo`."""
    out = tmp_path / "run"
    few: Any = {"sampler": "transformers", "warm_steps": 3, "steps": 1, "train_rows": 8, "held_out_rows": 4}
    assert run_demo(out=str(out), lora=lora, **few) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert {"accuracy_before", "accuracy_after", "wall_s", "steps", "rollouts", "worst_staleness"} <= set(summary)
    assert summary["rollouts"] == 8 * 8
    assert summary["wall_s"] > summary["train_wall_s"]
    said = capsys.readouterr().out
    assert "held-out accuracy" in said
    assert str(out) in said.replace("\n", "")
    with pytest.raises(ConfigError, match="already holds a run"):
        run_demo(out=str(out), **few)


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"--out: .*file/run cannot be used: Not a directory"):
        run_demo(out=str(tmp_path / "file" / "run"))


def test_the_command_asks_for_what_it_was_given(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr("asyncrl.demo.run_demo", lambda **options: asked.append(options) or 0)
    assert main(["demo", "--lora", "--steps", "3", "--out", "x"]) == main(["demo", "--quiet"]) == 0
    assert asked[0] == {"out": "x", "sampler": "auto", "seed": 0, "lora": True, "quiet": False, "steps": 3}
    assert "steps" not in asked[1]
    with pytest.raises(SystemExit):
        main(["demo", "--help"])
    assert f"(default: {STEPS})" in capsys.readouterr().out
    with pytest.raises(SystemExit):  # and not after the warm start, which takes a minute
        main(["demo", "--steps", "0"])
