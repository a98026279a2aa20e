"""Countdown: reach a number with the numbers you are given, in one turn, by thinking.

    python examples/countdown.py

makes its own puzzles, which can all be solved. A row of `--dataset` is `{"numbers": [45, 14, 39], "target": 20}`; one
that brings its own `messages`, and the numbers as JSON under `ground_truth`, works too.
"""

from __future__ import annotations

import argparse
import ast
import json
import operator
import random
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import asyncrl
from asyncrl.config import LoraConfig, OptimizerConfig, SamplerConfig, SamplingConfig

TASK = (
    "Reach {target} with the numbers {numbers}: use each of them exactly once, with + - * / and parentheses. "
    "Think first, then give the expression alone inside <answer> and </answer>."
)
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
EXPRESSION = re.compile(r"[-+*/() \d]{1,200}")  # longer ones could nest so deep that the parser gives up


async def rollout(prompt: asyncrl.Prompt) -> asyncrl.Rollout:
    """The target earns 1, the right numbers 0.1."""
    numbers, target = puzzle(prompt)
    chat = prompt.policy.chat(prompt.get("messages") or TASK.format(numbers=numbers, target=target))
    expression = final_expression(await chat.run())
    return chat.sample(reward=score(expression, numbers, target), expression=expression)


def puzzle(row: Mapping[str, Any]) -> tuple[list[int], int]:
    facts = json.loads(row["ground_truth"]) if "ground_truth" in row else row
    return list(facts["numbers"]), facts["target"]


def final_expression(answer: str) -> str | None:
    """What is in the last <answer>, up to an equals sign."""
    found = re.findall(r"<answer>(.*?)</answer>", answer, re.DOTALL)
    return " ".join(found[-1].partition("=")[0].split()) if found else None


def score(expression: str | None, numbers: Sequence[int], target: int) -> float:
    if expression is None or not EXPRESSION.fullmatch(expression):
        return 0.0
    try:
        tree = ast.parse(expression, mode="eval")
        value, used = evaluate(tree.body), numbers_in(tree)
    except (SyntaxError, ValueError, ZeroDivisionError):
        return 0.0
    if used != sorted(numbers):
        return 0.0
    return 1.0 if value == target else 0.1


def evaluate(node: ast.expr) -> Fraction:
    """The exact value of a parsed expression. Never runs code of the model."""
    match node:
        case ast.Constant(value=int() as value):
            return Fraction(value)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            return Fraction(OPERATORS[type(op)](evaluate(left), evaluate(right)))
    raise ValueError(f"only whole numbers, + - * / and parentheses, not {ast.unparse(node)!r}")


def numbers_in(tree: ast.AST) -> list[int]:
    return sorted(node.value for node in ast.walk(tree) if isinstance(node, ast.Constant))


def make_puzzle(rng: random.Random) -> dict[str, Any]:
    """Three or four numbers, joined in a random way until one whole number between 10 and 100 is left: the target."""
    while True:
        numbers = [rng.randint(1, 99) for _ in range(rng.choice((3, 4)))]
        values = [Fraction(number) for number in numbers]
        while len(values) > 1:
            right, left = values.pop(rng.randrange(len(values))), values.pop(rng.randrange(len(values)))
            join = rng.choice([operator.add, operator.sub, operator.mul, *([operator.truediv] if right else [])])
            values.append(Fraction(join(left, right)))
        if values[0].denominator == 1 and 10 <= values[0] <= 100:
            return {"numbers": numbers, "target": int(values[0])}


def main(argv: Sequence[str] | None = None) -> asyncrl.TrainResult:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen/Qwen3-0.6B", help="a chat model of the hub, or a folder")
    parser.add_argument("--dataset", help="JSONL with numbers and target; left out: random puzzles")
    parser.add_argument("--eval-puzzles", type=int, default=64, help="new ones, tried before and after; 0 for none")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--prompts", type=int, default=16, help="prompts of one step")
    parser.add_argument("--rollouts", type=int, default=8, help="rollouts of one prompt")
    parser.add_argument("--max-tokens", type=int, default=2048, help="longest answer")
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
    rng = random.Random(0)
    held_out = [make_puzzle(rng) for _ in range(options.eval_puzzles)]
    puzzles = [make_puzzle(rng) for _ in range(4 * options.steps * options.prompts)]
    return asyncrl.train(rollout, dataset=options.dataset or puzzles, evaluation=held_out or None, config=config)


if __name__ == "__main__":
    main()
