"""The targets that docs/supervised.md states: what each recipe reaches on rows that it has not seen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from asyncrl.recipes import dpo_loop, orpo_loop, sft_loop
from tests.recipes.cases import chats, preferences, records


def test_sft_learns_to_answer(model: Path, tmp_path: Path) -> None:
    config = sft_loop.Config(
        base_model=str(model), log_path=tmp_path / "run", learning_rate=3e-3, batch_size=16, warmup_steps=5
    )
    result = sft_loop.main(config, chats(1600), chats(48, held_out=True), view="quiet")
    assert result.before is not None
    assert result.after is not None
    assert result.before["loss"] > 4
    assert result.after["loss"] < 0.05
    assert answers_right(result.model_dir, chats(24, held_out=True, seed=1)) == 1.0


def answers_right(folder: Path, rows: list[dict[str, Any]]) -> float:
    """Share of greedy answers that are right, by `transformers` itself."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    right = 0
    for row in rows:
        prompt = tokenizer.apply_chat_template(
            row["messages"][:1], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with torch.no_grad():
            tokens = model.generate(**prompt, max_new_tokens=6, do_sample=False)[0, prompt["input_ids"].shape[1] :]
        right += tokenizer.decode(tokens) == row["messages"][1]["content"] + "<|im_end|>"
    return right / len(rows)


@pytest.mark.parametrize(
    ("loop", "rank", "rate"),
    [(dpo_loop, 0, 1e-3), (dpo_loop, 8, 5e-3), (orpo_loop, 0, 3e-3), (orpo_loop, 8, 5e-3)],
    ids=["dpo", "dpo-lora", "orpo", "orpo-lora"],
)
def test_preferences_are_learned(loop: Any, rank: int, rate: float, model: Path, tmp_path: Path) -> None:
    """Held-out pairs are told apart, and the chosen answer has gained on the rejected one."""
    config = loop.Config(
        base_model=str(model),
        log_path=tmp_path / "run",
        learning_rate=rate,
        batch_size=16,
        lora_rank=rank,
        warmup_steps=5,
    )
    result = loop.main(config, preferences(1600), preferences(64, held_out=True), view="quiet")
    assert result.before["reward_accuracy"] < 0.8
    assert result.after["reward_accuracy"] >= 0.95
    assert result.after["reward_margin"] > result.before["reward_margin"] + 0.05
    assert result.after["loss"] < result.before["loss"]
    steps = records(result.run_dir)
    assert len(steps) == result.steps == 100
    assert steps[-1]["reward_accuracy"] > 0.9
    summary = json.loads((result.run_dir / "summary.json").read_text())
    assert summary["held_out_after"]["reward_accuracy"] == result.after["reward_accuracy"]


def test_dpo_starts_at_ln_2_and_orpo_at_the_likelihood_of_the_chosen(model: Path, tmp_path: Path) -> None:
    """At the reference no answer is preferred; an untrained model spreads its bets over the vocabulary."""
    for loop, low, high in ((dpo_loop, 0.693, 0.694), (orpo_loop, 4.0, 7.0)):
        config = loop.Config(base_model=str(model), log_path=tmp_path / loop.__name__, batch_size=4)
        loop.main(config, preferences(4), view="quiet")
        (record,) = records(tmp_path / loop.__name__)
        assert low < record["loss"] < high
