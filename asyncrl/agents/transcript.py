"""The tokens of one rollout, exactly as the policy saw and drew them.

Owns the four lists of a `RolloutSample`. Tokens only ever come at the end, and nothing is tokenised twice, so what is
trained is what was sampled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from asyncrl.errors import RolloutContractError
from asyncrl.types import Completion, RolloutSample


class Transcript:
    """Grows by context (masked) and by completions (trained). All lists are [N]."""

    __slots__ = ("logprobs", "loss_mask", "tokens", "versions")

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.loss_mask: list[int] = []
        self.versions: list[int] = []

    def __len__(self) -> int:
        return len(self.tokens)

    def add_context(self, tokens: Sequence[int]) -> None:
        """Tokens that the policy reads but did not draw."""
        count = len(tokens)
        self.tokens += tokens
        self.logprobs += [0.0] * count
        self.loss_mask += [0] * count
        self.versions += [0] * count

    def add_completion(self, completion: Completion) -> None:
        """Tokens that the policy drew."""
        self.tokens += completion.tokens
        self.logprobs += completion.logprobs
        self.loss_mask += [1] * len(completion.tokens)
        self.versions += completion.versions

    def sample(self, reward: float, info: Mapping[str, Any]) -> RolloutSample:
        """What the rollout function returns. The lists are copied: a chat may go on after it.

        Raises:
            RolloutContractError: the policy has drawn nothing yet.
        """
        if 1 not in self.loss_mask:
            raise RolloutContractError(
                "this chat holds no token that the policy drew, so there is nothing to train on. "
                "Await chat.run() or chat.step() before chat.sample(...)."
            )
        return RolloutSample(
            tokens=self.tokens.copy(),
            logprobs=self.logprobs.copy(),
            loss_mask=self.loss_mask.copy(),
            reward=reward,
            versions=self.versions.copy(),
            info=info,
        )
