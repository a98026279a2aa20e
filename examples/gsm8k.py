"""Grade-school maths in one turn: the model thinks, and its last number is right or it is not.

    python examples/gsm8k.py --dataset train.jsonl --eval test.jsonl

A row is `{"question": "...", "answer": "72"}`; answers of the original dataset, which end in `#### 72`, work too
(`pip install datasets`):

    datasets.load_dataset("openai/gsm8k", "main")["train"].to_json("train.jsonl")
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence

import asyncrl
from asyncrl.config import LoraConfig, OptimizerConfig, SamplerConfig, SamplingConfig

TASK = "Think step by step. Give the final answer as a number inside \\boxed{}.\n\n"
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def final_number(text: str) -> float | None:
    """The number after the last `####`, in the last `\\boxed{}`, or else the last one of all."""
    marked = re.findall(r"####([^\n]*)", text) or re.findall(r"\\boxed\{([^{}]*)\}", text)
    numbers = NUMBER.findall(marked[-1] if marked else text)
    return float(numbers[-1].replace(",", "")) if numbers else None


async def rollout(prompt: asyncrl.Prompt) -> asyncrl.RolloutSample:
    """One answer, with 1 for the right number and 0 for any other."""
    chat = prompt.policy.chat(TASK + prompt["question"])
    found = final_number(await chat.run())
    wanted = final_number(str(prompt["answer"]))
    right = chat.finish_reason == "stop" and found is not None and found == wanted
    return chat.sample(reward=float(right), found=found, wanted=wanted)


def main(argv: Sequence[str] | None = None) -> asyncrl.TrainResult:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen/Qwen3-0.6B", help="a chat model of the hub, or a folder")
    parser.add_argument("--dataset", required=True, help="JSONL with question and answer")
    parser.add_argument("--eval", help="held-out JSONL, measured before and after")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--prompts", type=int, default=16, help="prompts of one step")
    parser.add_argument("--rollouts", type=int, default=8, help="rollouts of one prompt")
    parser.add_argument("--max-tokens", type=int, default=1024, help="longest answer")
    parser.add_argument("--lora-rank", type=int, default=16, help="0 trains the full model")
    parser.add_argument("--sampler", choices=("auto", "vllm", "transformers"), default="auto")
    parser.add_argument("--out", help="run folder")
    options = parser.parse_args(argv)
    config = asyncrl.Config(
        model=options.model,
        run_dir=options.out,
        max_steps=options.steps,
        prompt_groups_per_step=options.prompts,
        completions_per_prompt=options.rollouts,
        sampling=SamplingConfig(max_tokens=options.max_tokens),
        lora=LoraConfig(rank=options.lora_rank),
        optimizer=OptimizerConfig(learning_rate=5e-5 if options.lora_rank else 2e-6, warmup_steps=5),
        sampler=SamplerConfig(kind=options.sampler),
    )
    return asyncrl.train(rollout, dataset=options.dataset, evaluation=options.eval, config=config)


if __name__ == "__main__":
    main()
