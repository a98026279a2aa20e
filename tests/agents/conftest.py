"""A sampler that says what a script tells it, token for token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol

import pytest

from asyncrl.agents.policy import Policy, PolicyContext
from asyncrl.testing.models import tiny_tokenizer
from asyncrl.types import Completion, Load, SampleRequest, SamplingParams, Weights


class Script:
    """Answers the i-th request with the i-th turn; log-probs are -1/1000, -2/1000, ... and the version its number."""

    wants: Literal["tensors", "files"] = "tensors"

    def __init__(self, turns: Sequence[str | Completion], tokenizer: Any) -> None:
        self.requests: list[SampleRequest] = []
        self.completions: list[Completion] = []
        self._turns = list(turns)
        self._tokenizer = tokenizer

    @property
    def version(self) -> int:
        return len(self.completions)

    async def __aenter__(self) -> Script:
        return self

    async def __aexit__(self, *exc: object) -> None: ...

    async def generate(self, request: SampleRequest) -> Completion:
        turn = self._turns[len(self.completions)]
        completion = turn if isinstance(turn, Completion) else self._speak(turn, request.params)
        self.requests.append(request)
        self.completions.append(completion)
        return completion

    def _speak(self, text: str, params: SamplingParams) -> Completion:
        tokens = self._tokenizer.encode(text)
        kept = tokens[: params.max_tokens]
        stopped = kept[-1] in params.stop_token_ids
        return Completion(
            kept,
            [-(i + 1) / 1000 for i in range(len(kept))],
            [self.version] * len(kept),
            "stop" if stopped else "length",
        )

    async def score(
        self, token_ids: Sequence[int], version: int, *, start: int = 1, session: str | None = None
    ) -> list[float]:
        return [0.0] * (len(token_ids) - start)

    async def publish(self, weights: Weights) -> None: ...

    async def load(self) -> Load:
        return Load(0, 0)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return tiny_tokenizer()


class Speak(Protocol):
    def __call__(
        self, *turns: str | Completion, max_seq_len: int = ..., max_tokens: int = ...
    ) -> tuple[Policy, Script]: ...


@pytest.fixture
def speak(tokenizer: Any) -> Speak:
    """Make a policy that says these turns, and the sampler behind it."""

    def make(*turns: str | Completion, max_seq_len: int = 4096, max_tokens: int = 512) -> tuple[Policy, Script]:
        sampler = Script(turns, tokenizer)
        params = SamplingParams(max_tokens=max_tokens, stop_token_ids=(tokenizer.eos_token_id,))
        context = PolicyContext(sampler, params=params, max_seq_len=max_seq_len, load_tokenizer=lambda: tokenizer)
        return Policy(context, session=7), sampler

    return make
