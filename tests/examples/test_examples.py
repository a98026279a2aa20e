"""The examples as users run them, with a model that has just learned to say some digit or to call the tool."""

from __future__ import annotations

import importlib.util
import json
import random
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from asyncrl.config import Config, LossConfig, OptimizerConfig
from asyncrl.demo.model import torch_threads
from asyncrl.losses import cross_entropy
from asyncrl.testing.models import tiny_model, tiny_tokenizer
from asyncrl.training.trainer import TorchTrainer
from asyncrl.types import TrainSequence

ROOT = Path(__file__).parents[2]
SHARED_ROWS = ROOT.parent / "shared" / "data" / "gsm8k_200.jsonl"
CALL = '<tool_call>\n{"name": "calculator", "arguments": {"expression": "3+4"}}\n</tool_call>'
ROWS = [
    {
        "question": f"Ann has {i} apples and gives {i - 2} away. How many are left?",
        "answer": "2" if i % 2 else "1+1\n#### 2",
    }
    for i in range(3, 35)
]


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


gsm8k, tool_agent = load("gsm8k"), load("tool_agent")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Says `1`, `2` or `3`, or calls the calculator, whatever it is asked: some luck in every group."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = tiny_tokenizer(words=[CALL])
    blank = tiny_model(folder / "blank", hidden=32, layers=1, tokenizer=tokenizer)
    config = Config(model=str(blank), loss=LossConfig(kl_beta=0), optimizer=OptimizerConfig(learning_rate=1e-2))
    trainer = TorchTrainer(config, total_steps=40, weights_format="tensors")
    rng = random.Random(0)
    with torch_threads(1):
        for _ in range(40):
            batch = [_said(tokenizer, row, rng) for row in rng.choices(ROWS, k=6)]
            trainer.forward_backward_custom(batch, cross_entropy)
            trainer.optim_step()
    trainer.save_model(folder / "lucky")
    return folder / "lucky"


def _said(tokenizer: Any, row: dict[str, str], rng: random.Random) -> TrainSequence:
    tools = [tool_agent.calculator.schema] if rng.random() < 0.5 else None
    asked = [{"role": "user", "content": (tool_agent if tools else gsm8k).TASK + row["question"]}]
    prompt = tokenizer.apply_chat_template(asked, tools=tools, add_generation_prompt=True, return_dict=False)
    answer = tokenizer.encode(rng.choice(["1", "2", "3", CALL if tools else "2"]) + "<|im_end|>")
    mask = [0] * len(prompt) + [1] * len(answer)
    return TrainSequence([*prompt, *answer], [0.0] * len(mask), mask, advantage=1.0, group=0)


def arguments(model: Path, rows: Path, out: Path) -> list[str]:
    small = "--steps 2 --prompts 2 --rollouts 8 --max-tokens 6 --lora-rank 0 --sampler transformers"
    return ["--model", str(model), "--dataset", str(rows), "--out", str(out), *small.split()]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return file


def test_gsm8k_trains(model: Path, rows: Path, tmp_path: Path) -> None:
    result = gsm8k.main([*arguments(model, rows, tmp_path / "run"), "--eval", str(rows)])
    assert result.steps == 2
    assert 0 < result.before.mean < 1
    assert result.after.n == len(ROWS)
    assert (result.model_dir / "config.json").is_file()


def test_tool_agent_trains_and_its_rollouts_call_the_tool(model: Path, rows: Path, tmp_path: Path) -> None:
    result = tool_agent.main(arguments(model, rows, tmp_path / "run"))
    assert result.steps == 2
    assert "<tool_response>" in (result.run_dir / "rollouts.jsonl").read_text()


@pytest.mark.skipif(not SHARED_ROWS.is_file(), reason="the rows of gsm8k are not beside this clone")
@pytest.mark.parametrize("example", [gsm8k, tool_agent], ids=["gsm8k", "tool_agent"])
def test_the_real_rows_are_understood(example: ModuleType, model: Path, tmp_path: Path) -> None:
    first = tmp_path / "first.jsonl"
    lines = SHARED_ROWS.read_text().splitlines()
    assert all(gsm8k.final_number(json.loads(line)["answer"]) is not None for line in lines)
    first.write_text("\n".join(lines[:6]))
    result = example.main(arguments(model, first, tmp_path / "run"))
    assert result.rollouts == 6 * 8
    assert result.ledger["pending"] == 0


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("It is 3, no, 1,234.5.", 1234.5),
        ("so \\boxed{-7} apples, not 8", -7),
        ("12 - 3 = 9\n#### 9", 9),
        ("none", None),
        ("\\boxed{x}", None),
    ],
)
def test_the_final_number_is_found(text: str, number: float | None) -> None:
    assert gsm8k.final_number(text) == number


async def test_the_calculator_calculates_and_runs_nothing_else() -> None:
    assert await tool_agent.calculator.call({"expression": "-2*(3+4)/2"}) == "-7.0"
    for text in ("__import__('os')", "2**9", "True+1", "x"):
        result = await tool_agent.calculator.invoke({"expression": text})
        assert result.error
        assert "only numbers" in result.text
