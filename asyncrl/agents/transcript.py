"""The tokens of one rollout, exactly as the policy saw and drew them: a tree of turns.

    root ── turn ── turn ── turn          one conversation: one leaf, one trainable sequence
              └──── turn                  a branch, or a history that was rewritten: another leaf, another sequence

A turn is what the policy read since the turn before (context, masked) and what it drew (trained). Turns are only ever
added and nothing is tokenised twice, so what is trained is what was sampled. What several leaves share is trained in
the first of them only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import replace
from typing import Any

from asyncrl.errors import RolloutContractError
from asyncrl.rollout.failures import brief
from asyncrl.types import Completion, Rollout, RolloutRun, RolloutSample

REALIGNED = "realigned tokens"
EMPTY = Completion((), (), (), "stop")


class Node:
    """One turn of the policy, or the root, which is none."""

    __slots__ = ("children", "completion", "context", "drawing", "messages", "parent", "seconds", "text")

    def __init__(self, parent: Node | None, context: Sequence[int], completion: Completion) -> None:
        self.parent = parent
        self.context = context
        """Tokens that the policy read after its turn before; never trained."""
        self.completion = completion
        self.children: list[Node] = []
        self.drawing = 0
        """Turns that are being drawn after this one: until they are there, it must stay as it is."""
        self.messages: Sequence[Mapping[str, Any]] = ()
        """The conversation in words, for the log. Only leaves keep it."""
        self.seconds = 0.0
        """How long the completion took."""
        self.text: str | None = None
        """Of this turn alone, context and completion; None until somebody asks (`conversation.py`)."""

    def path(self) -> list[Node]:
        """All turns up to this one, the first one first."""
        nodes = []
        node = self
        while node.parent is not None:
            nodes.append(node)
            node = node.parent
        nodes.reverse()
        return nodes


class Transcript:
    """Owns the turns of one rollout, and counts what happened to them that is not plain growth."""

    __slots__ = ("_order", "_totals", "counts", "root")

    def __init__(self, totals: Counter[str] | None = None) -> None:
        self.root = Node(None, (), EMPTY)
        self.counts: Counter[str] = Counter()
        """`fork: <cause>` and `drop: <cause>` in turns, `realigned tokens` in tokens that were given up."""
        self._totals = totals
        self._order: list[Node] = []

    @property
    def turns(self) -> list[Node]:
        """Every turn, in the order in which they were drawn."""
        return self._order

    def tokens_to(self, node: Node) -> list[int]:
        """The conversation up to and including this turn."""
        tokens: list[int] = []
        for turn in node.path():
            tokens += turn.context
            tokens += turn.completion.tokens
        return tokens

    def length_to(self, node: Node) -> int:
        """How many tokens those are."""
        return sum(len(turn.context) + len(turn.completion.tokens) for turn in node.path())

    def add(self, parent: Node, context: Sequence[int], completion: Completion, cause: str = "branch") -> Node:
        """One more turn, after `parent`. `cause` is counted if it is a fork: if others go on from there too."""
        if parent.children:
            self._count(f"fork: {cause}")
        node = Node(parent, context, completion)
        parent.children.append(node)
        parent.messages = ()
        self._order.append(node)
        return node

    def shorten(self, node: Node, kept: int) -> None:
        """Re-alignment: keep only the first `kept` drawn tokens of a turn that nothing goes on from yet."""
        assert not node.children
        assert not node.drawing
        drawn = node.completion
        self._count(REALIGNED, len(drawn.tokens) - kept)
        node.completion = Completion(drawn.tokens[:kept], drawn.logprobs[:kept], drawn.versions[:kept], "length")
        node.text = None

    def drop(self, node: Node, cause: str) -> None:
        """Take a turn away that nothing goes on from: it will not be trained."""
        assert node.parent is not None
        assert not node.children
        node.parent.children.remove(node)
        if not node.parent.children:  # it is a leaf again
            heard = list(node.messages[:-1])
            while heard and heard[-1].get("role") != "assistant":
                heard.pop()
            node.parent.messages = heard
        self._order.remove(node)
        self._count(f"drop: {cause}")

    def broke_off(self, cause: str) -> None:
        """A turn was broken off while it was drawn, so there is none."""
        self._count(f"drop: {cause}")

    def account(self, leaf: Node) -> dict[str, Any]:
        """For the rollout log: how long each turn up to this leaf took (s), and what is counted of the whole."""
        seconds = {"turn_seconds": [round(node.seconds, 3) for node in leaf.path()]}
        return {**seconds, "transcript": dict(self.counts)} if self.counts else seconds

    def rollout(
        self,
        reward: float,
        info: Callable[[Node], Mapping[str, Any]] | Mapping[str, Any],
        turn_rewards: Sequence[float | None] | None = None,
    ) -> Rollout:
        """What the rollout function returns. The lists are copies: the conversation may go on.

        Args:
            reward: Of the whole rollout.
            info: For the rollout log; a function is asked for each leaf.
            turn_rewards: One for each turn, in the order of `turns`; None for a turn without one.

        Raises:
            RolloutContractError: the policy has drawn nothing yet, or the turn rewards do not fit.
        """
        if not self._order:
            raise RolloutContractError(
                "this chat holds no token that the policy drew, so there is nothing to train on. "
                "Await chat.run() or chat.step() before chat.sample(...)."
            )
        if turn_rewards is not None and (not isinstance(turn_rewards, Sized) or isinstance(turn_rewards, Mapping)):
            raise RolloutContractError(f"turn_rewards is {brief(turn_rewards)}. Expected a list, one for each turn.")
        if turn_rewards is not None and len(turn_rewards) != len(self._order):
            raise RolloutContractError(
                f"there are {len(turn_rewards)} turn rewards, but the policy spoke {len(self._order)} turns. "
                "Expected one for each turn, in order."
            )
        rewards = dict(zip(map(id, self._order), turn_rewards or (), strict=False))
        trained: set[int] = set()
        samples = []
        for leaf in (node for node in self._order if not node.children):
            columns = _Columns()
            for node in leaf.path():
                columns.add(node, rewards.get(id(node)), trained=id(node) not in trained)
                trained.add(id(node))
            sample = columns.as_sample(reward, info(leaf) if callable(info) else info)
            samples.append(sample if turn_rewards is None else replace(sample, turn_rewards=columns.turn_rewards))
        return samples[0] if len(samples) == 1 else RolloutRun(samples)

    def _count(self, what: str, number: int = 1) -> None:
        self.counts[what] += number
        if self._totals is not None:
            self._totals[what] += number


def as_metrics(totals: Counter[str]) -> dict[str, float]:
    """What a step's record says of the transcripts of all rollouts; the causes are in the rollout log."""
    forks = sum(number for what, number in totals.items() if what.startswith("fork: "))
    drops = sum(number for what, number in totals.items() if what.startswith("drop: "))
    return {"forks": forks, "dropped_turns": drops, "realigned_tokens": totals[REALIGNED]}


class _Columns:
    """A sample in the making. All lists are [N]."""

    __slots__ = ("logprobs", "loss_mask", "tokens", "turn_rewards", "versions")

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.loss_mask: list[int] = []
        self.versions: list[int] = []
        self.turn_rewards: list[float | None] = []
        """One for each stretch of ones in `loss_mask`."""

    def add(self, node: Node, reward: float | None, *, trained: bool) -> None:
        """One turn: what was read, then what was drawn."""
        read, completion = len(node.context), node.completion
        if trained and not read and self.loss_mask and self.loss_mask[-1]:  # it goes on with the turn before
            begun = self.turn_rewards.pop()
            reward = reward if begun is None else begun + (reward or 0.0)
        self.tokens += node.context
        self.tokens += completion.tokens
        self.logprobs += [0.0] * read
        self.logprobs += completion.logprobs
        self.loss_mask += [0] * read
        self.loss_mask += [int(trained)] * len(completion.tokens)
        self.versions += [0] * read
        self.versions += completion.versions
        if trained:
            self.turn_rewards.append(reward)

    def as_sample(self, reward: float, info: Mapping[str, Any]) -> RolloutSample:
        return RolloutSample(
            tokens=self.tokens,
            logprobs=self.logprobs,
            loss_mask=self.loss_mask,
            reward=reward,
            versions=self.versions,
            info=info,
        )
