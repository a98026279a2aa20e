"""What the demo's model is shown before it is trained by reinforcement: a clumsy agent at work.

The format is always right. The content often is not: a number or an operator from the wrong place, the second call
forgotten, the answer cut short. A model that imitates this is right about one time in three, and has seen every part
of the job done well; which parts are worth doing is what reinforcement learning has to find out.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

from asyncrl.demo.task import Problem, calculator

SLIPS = {"first call": 0.25, "second call": 0.2, "no second call": 0.1, "answer": 0.15}
"""How often the clumsy agent errs, where it can."""


def demonstration(problem: Problem, rng: random.Random, clumsiness: float = 1.0) -> list[dict[str, Any]]:
    """One conversation, as chat templates take it. A clumsiness of 0 makes no slips."""

    def slips(where: str) -> bool:
        return rng.random() < clumsiness * SLIPS[where]

    messages = [{"role": "user", "content": problem.question}]
    seen = misread(problem, rng) if slips("first call") else problem
    result = _call(messages, seen.first_call)
    if not slips("no second call"):
        seen = misread(problem, rng) if slips("second call") else problem
        result = _call(messages, seen.second_call(result))
    answer = str(result)
    if slips("answer"):
        answer = answer[:-1] or "0"
    messages.append({"role": "assistant", "content": answer})
    return messages


def misread(problem: Problem, rng: random.Random) -> Problem:
    """The problem with something in the wrong place."""
    return rng.choice(
        [
            replace(problem, a=problem.c, c=problem.a),
            replace(problem, b=problem.c, c=problem.b),
            replace(problem, first=problem.second, second=problem.first),
            replace(problem, a=problem.b, b=problem.a),
        ]
    )


def _call(messages: list[dict[str, Any]], expression: str) -> int:
    result = calculator(expression)
    function = {"name": calculator.name, "arguments": {"expression": expression}}
    messages.append({"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]})
    messages.append({"role": "tool", "name": calculator.name, "content": str(result)})
    return result
