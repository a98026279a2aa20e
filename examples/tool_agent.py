"""A calculator agent: it does maths, and may call the tool as often as it likes before it answers.

    python examples/tool_agent.py --dataset train.jsonl

Rows are those of examples/gsm8k.py. The model must know tool calls in the Hermes format, as the Qwen models do.
"""

from __future__ import annotations

import argparse
import ast
import operator
import re
from collections.abc import Sequence

import asyncrl
from asyncrl.config import LoraConfig, OptimizerConfig, SamplerConfig, SamplingConfig

TASK = "Use the calculator for every calculation. Say the final answer as a plain number in the last line.\n\n"
BINARY = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


@asyncrl.tool(timeout_s=5)
def calculator(expression: str) -> float:
    """Evaluate an arithmetic expression such as `12*(3+4)/2`.

    Args:
        expression: Numbers, + - * / and parentheses.
    """
    return evaluate(ast.parse(expression, mode="eval").body)


def evaluate(node: ast.expr) -> float:
    """The value of a parsed expression. Never runs code of the model."""
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=inner):
            return -evaluate(inner)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in BINARY:
            return float(BINARY[type(op)](evaluate(left), evaluate(right)))
    raise ValueError(f"only numbers, + - * / and parentheses, not {ast.unparse(node)!r}")


def last_number(text: str) -> float | None:
    numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    return float(numbers[-1].replace(",", "")) if numbers else None


async def rollout(prompt: asyncrl.Prompt) -> asyncrl.Rollout:
    """Right answers earn 1; failed tool calls cost a little."""
    chat = prompt.policy.chat(TASK + prompt["question"], tools=[calculator], max_turns=6)
    found = last_number(await chat.run())
    right = chat.finish_reason == "stop" and found is not None and found == last_number(str(prompt["answer"]))
    return chat.sample(reward=float(right) - 0.05 * min(chat.tool_errors, 4), found=found)


def main(argv: Sequence[str] | None = None) -> asyncrl.TrainResult:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen/Qwen3-0.6B", help="a chat model of the hub, or a folder")
    parser.add_argument("--dataset", required=True, help="JSONL with question and answer")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--prompts", type=int, default=16, help="prompts of one step")
    parser.add_argument("--rollouts", type=int, default=8, help="rollouts of one prompt")
    parser.add_argument("--max-tokens", type=int, default=512, help="longest turn")
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
    return asyncrl.train(rollout, dataset=options.dataset, config=config)


if __name__ == "__main__":
    main()
