"""Who says what was sampled and what is trained: a sampler with a script, in any style of chat template."""

from __future__ import annotations

import asyncio
import functools
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pytest

from asyncrl.agents.policy import Policy, PolicyContext
from asyncrl.agents.template import TurnTemplate
from asyncrl.agents.tools import collect_tools
from asyncrl.agents.transcript import REALIGNED, Transcript
from asyncrl.config import ChatConfig
from asyncrl.rollout.contract import Contract
from asyncrl.testing.templates import Style, styled_tokenizer
from asyncrl.types import (
    Completion,
    Load,
    Rollout,
    RolloutRun,
    RolloutSample,
    SampleRequest,
    SamplingParams,
    Weights,
)

VARIANTS: dict[str, tuple[Style, dict[str, Any]]] = {
    "chatml": ("chatml", {}),
    "qwen3": ("qwen3", {}),
    "qwen3-quiet": ("qwen3", {"enable_thinking": False}),
    "llama3": ("llama3", {}),
    "mistral": ("mistral", {}),
    "xml": ("xml", {}),
}
variants = pytest.mark.parametrize("variant", VARIANTS)


def look(x: int) -> str:
    """Look at something.

    Args:
        x: Which.
    """
    if x == 7:
        raise LookupError("there is no 7")
    return "<b>\n" * x


def ask(question: str = "") -> str:
    """Ask somebody."""
    return question + "?"


SCHEMAS = [tool.schema for tool in collect_tools([look, ask]).values()]


@functools.cache
def template_of(variant: str) -> TurnTemplate:
    style, kwargs = VARIANTS[variant]
    return TurnTemplate(styled_tokenizer(style), kwargs)


# A sampler that says what the script says


@dataclass(frozen=True)
class Line:
    """What the policy says in one turn."""

    calls: Sequence[tuple[str, Any]] = ()
    malformed: bool = False
    thoughts: str = ""
    text: str = ""
    trailing: str = ""
    """White space that a template takes away."""
    noise: Sequence[int] = ()
    """Tokens that no tokenizer would make of a text: single bytes of a letter, marks in the wrong place."""
    ends: bool = True


def written(style: Style, line: Line) -> str:
    said = f"<think>\n{line.thoughts}\n</think>\n\n" if line.thoughts else ""
    bodies = []
    for name, x in line.calls:
        arguments = {"x": x} if name == "look" else {"question": str(x)}
        if style == "xml":
            inner = "".join(f"<{key}>{value}</{key}>" for key, value in arguments.items())
            bodies.append(f'<tool name="{name}">{inner}</tool>')
        else:
            key = "parameters" if style == "llama3" else "arguments"
            bodies.append(json.dumps({"name": name, key: arguments}))
    if not bodies:
        return said + line.text
    if line.malformed:
        bodies[-1] = bodies[-1][: len(bodies[-1]) // 2]
    match style:
        case "llama3":
            return said + "; ".join(bodies)
        case "mistral":
            return f"{said}{line.text}[TOOL_CALLS][{', '.join(bodies)}]"
        case "xml":
            return said + line.text + "\n".join(bodies)
    return said + line.text + "\n".join(f"<tool_call>\n{body}\n</tool_call>" for body in bodies)


class Script:
    """Says one line after the other. The log-prob of a token is its number, so that it says where it is from."""

    wants: Literal["tensors", "files"] = "tensors"

    def __init__(self, variant: str, lines: Sequence[Line]) -> None:
        self.style = VARIANTS[variant][0]
        self.tokenizer = template_of(variant)._tokenizer
        self.lines = list(lines)
        self.drawn: list[tuple[Sequence[int], Completion]] = []
        self.numbers: list[tuple[int, int]] = []
        """For each token that was drawn: its completion, and its place there."""

    @property
    def version(self) -> int:
        return len(self.drawn)

    async def __aenter__(self) -> Script:
        return self

    async def __aexit__(self, *exc: object) -> None: ...

    async def generate(self, request: SampleRequest) -> Completion:
        line = self.lines.pop(0) if self.lines else Line(text="Done.")
        for _ in range(len(self.lines) % 3):
            await asyncio.sleep(0)  # others go first
        tokens = [*self.tokenizer.encode(written(self.style, line) + line.trailing), *line.noise]
        tokens += [self.tokenizer.eos_token_id] if line.ends else self.tokenizer.encode(" and")
        tokens = tokens[: request.params.max_tokens]
        first, index = len(self.numbers), len(self.drawn)
        self.numbers += [(index, place) for place in range(len(tokens))]
        completion = Completion(
            tokens,
            [-float(first + place) for place in range(len(tokens))],
            [index + place % 2 for place in range(len(tokens))],  # weights may change in the middle of a turn
            "stop" if tokens[-1] == self.tokenizer.eos_token_id else "length",
        )
        self.drawn.append((tuple(request.token_ids), completion))
        return completion

    async def score(self, token_ids: Sequence[int], version: int, *, start: int = 1, session: str = "") -> list[float]:
        raise NotImplementedError

    async def publish(self, weights: Weights) -> None: ...

    async def load(self) -> Load:
        return Load(0, 0)


def policy_of(variant: str, script: Script, max_seq_len: int = 100_000, **chat: Any) -> Policy:
    context = PolicyContext(
        script,
        params=SamplingParams(max_tokens=100_000, stop_token_ids=(script.tokenizer.eos_token_id,)),
        max_seq_len=max_seq_len,
        load_tokenizer=lambda: script.tokenizer,
        chat=ChatConfig(**chat),
    )
    context.__dict__["template"] = template_of(variant)  # else it is checked anew for every example
    return Policy(context, 0)


# The truth


def segments_of(rollout: Rollout) -> list[RolloutSample]:
    return list(rollout.segments) if isinstance(rollout, RolloutRun) else [rollout]


def holds_the_truth(rollout: Rollout, transcript: Transcript, script: Script) -> None:
    Contract().check(rollout, oldest=0, newest=script.version + 1)
    segments = segments_of(rollout)
    trained: Counter[tuple[int, int]] = Counter()
    for segment in segments:
        assert segment.versions is not None
        for position, masked in enumerate(segment.loss_mask):
            if not masked:
                continue
            index, place = script.numbers[round(-segment.logprobs[position])]
            request, completion = script.drawn[index]
            assert list(segment.tokens[: position + 1]) == [*request, *completion.tokens[: place + 1]]
            assert segment.versions[position] == completion.versions[place]
            trained[index, place] += 1
    assert set(trained.values()) == {1}, "every token is trained once"
    assert all(1 in segment.loss_mask for segment in segments)
    explained(transcript.counts, len(segments), set(script.numbers) - set(trained), script)


def explained(counts: Counter[str], segments: int, missing: set[tuple[int, int]], script: Script) -> None:
    """What is not trained was dropped or re-aligned, and says so; each fork is counted, with its cause."""
    dropped = realigned = 0
    for index, (_, completion) in enumerate(script.drawn):
        places = {place for turn, place in missing if turn == index}
        assert places == set(range(len(completion.tokens) - len(places), len(completion.tokens)))
        if len(places) == len(completion.tokens):
            dropped += 1
        else:
            realigned += len(places)
    assert realigned == counts[REALIGNED]
    assert dropped == sum(number for cause, number in counts.items() if cause.startswith("drop: "))
    forks = sum(number for cause, number in counts.items() if cause.startswith("fork: "))
    assert segments - 1 <= forks <= segments - 1 + dropped
