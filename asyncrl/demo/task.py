"""The demo's task: arithmetic in two steps, with a calculator that does one step at a time.

    (37+48)*6   ->   calculator("37+48") = 85   ->   calculator("85*6") = 510   ->   510

The agent has to take the problem apart, call the tool twice, and carry results over. The rollout function at the end
is what any user of asyncrl writes.
"""

from __future__ import annotations

import operator
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import asyncrl

OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
OPERATION = re.compile(r"(-?\d{1,9})([-+*])(-?\d{1,9})")
HELD_OUT = 5
"""One pair of first operands in so many is never trained on, whatever stands around it."""


@asyncrl.tool
def calculator(expression: str) -> int:
    """Work out one operation on two whole numbers, such as `12*34`.

    Args:
        expression: Two whole numbers with one of + - * between them.
    """
    match = OPERATION.fullmatch(expression)
    if match is None:
        raise ValueError(f"expected two whole numbers with one of + - * between them, found {expression!r}")
    return int(OPERATORS[match[2]](int(match[1]), int(match[3])))


async def rollout(prompt: asyncrl.Prompt) -> asyncrl.Rollout:
    """Let the agent solve one problem; it is right or it is not."""
    chat = prompt.policy.chat(prompt["messages"], tools=[calculator], max_turns=4)
    answer = await chat.run()
    return chat.sample(reward=float(answer.strip() == prompt["answer"]))


@dataclass(frozen=True, slots=True)
class Problem:
    """`(a first b) second c`"""

    a: int
    b: int
    c: int
    first: str
    second: str

    @property
    def question(self) -> str:
        return f"({self.a}{self.first}{self.b}){self.second}{self.c}"

    @property
    def first_call(self) -> str:
        return f"{self.a}{self.first}{self.b}"

    def second_call(self, partial: int) -> str:
        """The call that is right once the first one has given `partial`."""
        return f"{partial}{self.second}{self.c}"

    @property
    def answer(self) -> int:
        return calculator(self.second_call(calculator(self.first_call)))

    @property
    def row(self) -> dict[str, Any]:
        """As a dataset row."""
        return {"messages": [{"role": "user", "content": self.question}], "answer": str(self.answer)}


def problems(seed: int, *, held_out: bool) -> Iterator[Problem]:
    """Endless problems without negative numbers. Held-out ones share no pair (a, b) with the others."""
    rng = random.Random(f"{seed}/{held_out}")
    while True:
        problem = Problem(
            a=rng.randint(10, 99),
            b=rng.randint(10, 99),
            c=rng.randint(2, 9),
            first=rng.choice("+-*"),
            second=rng.choice("+-*"),
        )
        if ((7 * problem.a + problem.b) % HELD_OUT == 0) == held_out and _never_negative(problem):
            yield problem


def _never_negative(problem: Problem) -> bool:
    return calculator(problem.first_call) >= 0 and problem.answer >= 0
