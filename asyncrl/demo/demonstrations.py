"""What the demo's model is shown before it is trained by reinforcement: a clumsy agent at work.

The format is always right. The content often is not: a wrong number in a call, a wrong operator, the second call
forgotten, the answer copied badly. A model that imitates this is right about one time in three, and knows how to do
every part of the job; which part is worth doing is what reinforcement learning has to find out.
"""

from __future__ import annotations

import random
from typing import Any

from asyncrl.demo.task import OPERATION, Problem, calculator

SLIP = {"first call": 0.3, "second call": 0.3, "forgets second call": 0.15, "answer": 0.2}
"""How often the clumsy agent errs where it can."""


def demonstration(problem: Problem, rng: random.Random) -> list[dict[str, Any]]:
    """One conversation, as chat templates take it."""

    def slips(where: str) -> bool:
        return rng.random() < SLIP[where]

    messages = [{"role": "user", "content": problem.question}]
    first = problem.first_call
    result = _call(messages, _spoil(first, rng) if slips("first call") else first)
    if not slips("forgets second call"):
        second = problem.second_call(result)
        result = _call(messages, _spoil(second, rng) if slips("second call") else second)
    answer = str(result)
    messages.append({"role": "assistant", "content": _other_digit(answer, rng) if slips("answer") else answer})
    return messages


def _call(messages: list[dict[str, Any]], expression: str) -> int:
    result = calculator(expression)
    function = {"name": calculator.name, "arguments": {"expression": expression}}
    messages.append({"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]})
    messages.append({"role": "tool", "name": calculator.name, "content": str(result)})
    return result


def _spoil(expression: str, rng: random.Random) -> str:
    """Another operator, or another digit."""
    operation = OPERATION.fullmatch(expression)
    assert operation is not None
    left, sign, right = operation.groups()
    if rng.random() < 0.5:
        return left + rng.choice([other for other in "+-*" if other != sign]) + right
    if rng.random() < 0.5:
        return _other_digit(left, rng) + sign + right
    return left + sign + _other_digit(right, rng)


def _other_digit(number: str, rng: random.Random) -> str:
    """`number` with one digit changed."""
    place = rng.randrange(number.startswith("-"), len(number))
    return number[:place] + rng.choice([d for d in "0123456789" if d != number[place]]) + number[place + 1 :]
