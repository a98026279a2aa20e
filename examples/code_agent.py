"""A programmer: the model writes Python, tries it out in a sandbox, and hands in a program that hidden tests judge.

    python examples/code_agent.py

makes its own small exercises. A row of `--dataset` is

    {"task": "Read integers, and print their sum.", "tests": [{"stdin": "1 2", "stdout": "3"}, ...]}

The sandbox cuts programs off from the network, from other files and processes (Linux), and from endless time and
memory: docs/examples.md says what that is good for, and what it is not.
"""

from __future__ import annotations

import argparse
import random
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import asyncrl
from asyncrl.config import DataConfig, LoraConfig, OptimizerConfig, SamplerConfig, SamplingConfig

TASK = (
    "Write a Python program that reads standard input and prints to standard output. Try it with the tool `python`. "
    "When it is right, give the whole program in a ```python block.\n\n{task}"
)


@asyncrl.tool(timeout_s=300)  # programs of many rollouts wait for each other; each has 5 s of its own
async def python(code: str, stdin: str = "") -> str:
    """Run a Python program and see what it prints.

    Args:
        code: The whole program.
        stdin: What it reads.
    """
    return str(await asyncrl.run_python(code, stdin))


async def rollout(prompt: asyncrl.Prompt) -> asyncrl.Rollout:
    """All tests passed earns 1, a program that passes some of them up to 0.5."""
    chat = prompt.policy.chat(TASK.format(task=prompt["task"]), tools=[python], max_turns=6)
    code = program(await chat.run())
    passed = await share_passed(code, prompt["tests"]) if code else 0.0
    return chat.sample(reward=1.0 if passed == 1.0 else passed / 2, program=code, passed=passed)


def program(answer: str) -> str | None:
    """The last ``` block of an answer."""
    blocks = re.findall(r"```(?:python|py)?\s*\n(.*?)```", answer, re.DOTALL)
    return blocks[-1] if blocks else None


async def share_passed(code: str, tests: Sequence[Mapping[str, str]]) -> float:
    """The share of the tests in which the program prints what it should. It never sees what that is."""
    passed = 0
    for test in tests:
        outcome = await asyncrl.run_python(code, test["stdin"])
        if outcome.timed_out:
            break  # the others would take as long
        passed += outcome.ok and outcome.stdout.split() == test["stdout"].split()
    return passed / len(tests)


EXERCISES: dict[str, Callable[[list[int]], Any]] = {
    "their sum": sum,
    "the largest of them": max,
    "how many of them are even": lambda numbers: sum(number % 2 == 0 for number in numbers),
    "the sum of their squares": lambda numbers: sum(number**2 for number in numbers),
    "how many different numbers there are": lambda numbers: len(set(numbers)),
    "the difference between the largest and the smallest": lambda numbers: max(numbers) - min(numbers),
    "them in ascending order, separated by spaces": lambda numbers: " ".join(map(str, sorted(numbers))),
    "them in reverse order, separated by spaces": lambda numbers: " ".join(map(str, reversed(numbers))),
    "the sum of every second one, beginning with the first": lambda numbers: sum(numbers[::2]),
    "the largest difference between two neighbours, regardless of sign": lambda numbers: max(
        abs(left - right) for left, right in pairwise(numbers)
    ),
}
FILTERS: dict[str, Callable[[int], bool]] = {
    "": lambda number: True,
    "Leave out negative numbers. ": lambda number: number >= 0,
    "Leave out multiples of 3. ": lambda number: number % 3 != 0,
    "Leave out odd numbers. ": lambda number: number % 2 == 0,
    "Leave out numbers above 20. ": lambda number: number <= 20,
}


def exercises(tests: int = 5) -> list[dict[str, Any]]:
    """Every exercise with every filter, as dataset rows in random order."""
    rng = random.Random(0)
    rows = []
    for left_out, keep in FILTERS.items():
        for wanted, solve in EXERCISES.items():
            inputs = [[*rng.choices(range(-40, 41), k=rng.randint(8, 20)), 2, 4, 8] for _ in range(tests)]
            cases = [
                {"stdin": " ".join(map(str, numbers)), "stdout": str(solve([n for n in numbers if keep(n)]))}
                for numbers in inputs
            ]
            task = f"The input is one line of integers, separated by spaces. {left_out}Print {wanted}."
            rows.append({"task": task, "tests": cases})
    rng.shuffle(rows)
    return rows


def main(argv: Sequence[str] | None = None) -> asyncrl.TrainResult:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen/Qwen3-0.6B", help="a chat model of the hub, or a folder")
    parser.add_argument("--dataset", help="JSONL with task and tests; left out: small exercises")
    parser.add_argument("--eval", help="held-out JSONL, measured before and after")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--prompts", type=int, default=16, help="prompts of one step")
    parser.add_argument("--rollouts", type=int, default=8, help="rollouts of one prompt")
    parser.add_argument("--max-tokens", type=int, default=1024, help="longest turn")
    parser.add_argument("--lora-rank", type=int, default=16, help="0 trains the full model")
    parser.add_argument("--sampler", choices=("auto", "vllm", "transformers"), default="auto")
    parser.add_argument("--out", help="run folder")
    options = parser.parse_args(argv)
    config = asyncrl.Config(
        model=options.model,
        run_dir=options.out,
        max_steps=options.steps,
        data=DataConfig(epochs=options.steps),  # however few rows there are, the steps decide
        prompt_groups_per_step=options.prompts,
        completions_per_prompt=options.rollouts,
        sampling=SamplingConfig(max_tokens=options.max_tokens),
        lora=LoraConfig(rank=options.lora_rank),
        optimizer=OptimizerConfig(learning_rate=5e-5 if options.lora_rank else 2e-6, warmup_steps=5),
        sampler=SamplerConfig(kind=options.sampler),
    )
    return asyncrl.train(rollout, dataset=options.dataset or exercises(), evaluation=options.eval, config=config)


if __name__ == "__main__":
    main()
