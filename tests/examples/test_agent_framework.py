"""The example with an agent of another framework, and a model that has just learned to call its tool or to guess."""

from __future__ import annotations

import importlib.util
import json
import random
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from agents.tool_context import ToolContext

from asyncrl.config import Config, LossConfig, OptimizerConfig
from asyncrl.demo.model import torch_threads
from asyncrl.losses import cross_entropy
from asyncrl.testing.models import tiny_model, tiny_tokenizer
from asyncrl.training.trainer import TorchTrainer
from asyncrl.types import TrainSequence

ROOT = Path(__file__).parents[2]
CALL = '<tool_call>\n{"name": "calculator", "arguments": {"expression": "3+4"}}\n</tool_call>'
ROWS = [{"question": f"Guess {n}.", "answer": str(n % 2 + 1)} for n in range(16)]


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("agent_framework", ROOT / "examples" / "agent_framework.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


example = load()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Says `1` or `2`, or calls the calculator, whatever it is asked."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = tiny_tokenizer(words=[CALL])
    blank = tiny_model(folder / "blank", hidden=32, layers=1, tokenizer=tokenizer)
    config = Config(model=str(blank), loss=LossConfig(kl_beta=0), optimizer=OptimizerConfig(learning_rate=1e-2))
    trainer = TorchTrainer(config, total_steps=40, weights_format="tensors")
    rng = random.Random(0)
    with torch_threads(1):
        for _ in range(40):
            trainer.forward_backward_custom([_said(tokenizer, rng) for _ in range(6)], cross_entropy)
            trainer.optim_step()
    trainer.save_model(folder / "lucky")
    return folder / "lucky"


def _said(tokenizer: Any, rng: random.Random) -> TrainSequence:
    asked = [{"role": "user", "content": rng.choice(ROWS)["question"]}]
    prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
    answer = tokenizer.encode(rng.choice(["1", "2", CALL]) + "<|im_end|>")
    mask = [0] * len(prompt) + [1] * len(answer)
    return TrainSequence([*prompt, *answer], [0.0] * len(mask), mask, advantage=1.0, group=0)


def test_the_agent_trains_and_its_calls_become_its_runs(model: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    small = "--steps 2 --prompts 2 --rollouts 8 --max-tokens 6 --lora-rank 0 --sampler transformers"
    out = tmp_path / "run"
    result = example.main(["--model", str(model), "--dataset", str(rows), "--out", str(out), *small.split()])
    assert result.steps == 2
    said = (result.run_dir / "rollouts.jsonl").read_text()
    assert "<tool_response>\\n7.0\\n" in said
    assert '"fork: ' not in said


@pytest.mark.parametrize(
    ("expression", "told"), [("12 * 3.5", "42.0"), ("-7/2", "-3.5"), ("2**9", "expected two numbers"), ("1/0", "nan")]
)
async def test_the_calculator(expression: str, told: str) -> None:
    arguments = json.dumps({"expression": expression})
    context = ToolContext(None, tool_name="calculator", tool_call_id="1", tool_arguments=arguments)
    answer = str(await example.calculator.on_invoke_tool(context, arguments))
    assert told in answer or answer.startswith("An error occurred while running the tool")  # newer ones say no more
