"""From finished groups to what one optimizer step trains on. Pure. N is the number of tokens of a sample."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, compress

from asyncrl.rollout.staleness import Verdict, judge, mask_stale
from asyncrl.rollout.turns import turn_rewards
from asyncrl.types import Group, RolloutSample, TrainSequence


def chunk_sizes(groups: int, chunks: int) -> list[int]:
    """`groups` in `chunks` balanced parts: 10 in 4 is 3, 3, 2, 2."""
    return [groups // chunks + (part < groups % chunks) for part in range(chunks)]


def loss_versions(sample: RolloutSample) -> list[int]:
    """The versions of the tokens of a sample that carry loss."""
    assert sample.versions is not None
    return list(compress(sample.versions, sample.loss_mask))


STALENESS_BUCKETS = (0, 1, 2, 4, 8, 16)
"""Upper ends of the histogram's buckets, in optimizer steps; a last one takes what is older."""


@dataclass(slots=True)
class StalenessStats:
    """Staleness of the loss tokens of one batch, in optimizer steps."""

    tokens: int = 0
    total: int = 0
    highest: int = 0
    lowest: int = 0
    masked_tokens: int = 0
    histogram: list[int] = field(default_factory=lambda: [0] * (len(STALENESS_BUCKETS) + 1))
    """Tokens in each bucket."""

    def add(self, step: int, versions: list[int]) -> None:
        oldest, newest = step - min(versions), step - max(versions)
        counts = {newest: len(versions)} if oldest == newest else Counter(step - version for version in versions)
        for staleness, count in counts.items():
            self.histogram[bisect_left(STALENESS_BUCKETS, staleness)] += count
        self.highest = max(self.highest, oldest) if self.tokens else oldest
        self.lowest = min(self.lowest, newest) if self.tokens else newest
        self.tokens += len(versions)
        self.total += step * len(versions) - sum(versions)

    @property
    def mean(self) -> float:
        return self.total / self.tokens if self.tokens else 0.0

    def shares(self) -> dict[str, float]:
        """The share of the tokens in each bucket, as metrics."""
        names = [f"staleness_share_{end}" for end in STALENESS_BUCKETS] + ["staleness_share_more"]
        return {name: count / max(self.tokens, 1) for name, count in zip(names, self.histogram, strict=True)}


@dataclass(slots=True)
class Batch:
    """The groups of one optimizer step, which is taken when `step` steps have been taken before."""

    step: int
    max_staleness: int
    on_stale: Verdict
    hard: bool
    """Assert that no token is over the bound when it is handed over."""
    chunks: list[list[Group]] = field(default_factory=list)
    """What is trained at once, in this order."""
    sequences: int = 0
    staleness: StalenessStats = field(default_factory=StalenessStats)

    @property
    def groups(self) -> list[Group]:
        return list(chain.from_iterable(self.chunks))

    @property
    def trained(self) -> list[Group]:
        """The groups that carry signal."""
        return [group for group in self.groups if group.advantages]

    def turn_rewards(self) -> dict[str, float]:
        """Their mean over the trained groups, as a metric; nothing where no turn has one."""
        rewards = turn_rewards(run for group in self.trained for run in group.runs)
        return {"turn_reward_mean": sum(rewards) / len(rewards)} if rewards else {}

    def verdict(self, group: Group) -> Verdict:
        """Whether the group can be trained in this batch. A mask that would leave nothing is a drop."""
        if not group.advantages:
            return "train"
        versions = [loss_versions(sample) for run in group.runs for sample in run.segments]
        verdict = judge([min(v) for v in versions], self.step, self.max_staleness, self.on_stale)
        if verdict == "mask" and max(max(v) for v in versions) < self.step - self.max_staleness:
            return "drop"
        return verdict

    def add(self, groups: Iterable[Group]) -> list[TrainSequence]:
        """Take a chunk in. Returns its sequences, tokens over the bound masked where that was asked for."""
        chunk = list(groups)
        self.chunks.append(chunk)
        sequences = [sequence for group in chunk if group.advantages for sequence in self._sequences(group)]
        self.sequences += len(sequences)
        return sequences

    def _sequences(self, group: Group) -> Iterator[TrainSequence]:
        oldest_allowed = self.step - self.max_staleness
        for run, advantage in zip(group.runs, group.advantages, strict=True):
            for sample in run.segments:
                mask, versions = sample.loss_mask, loss_versions(sample)
                if self.on_stale == "mask" and min(versions) < oldest_allowed:
                    assert sample.versions is not None
                    mask = mask_stale(mask, sample.versions, oldest_allowed)
                    self.staleness.masked_tokens += len(versions) - sum(mask)
                    versions = [version for version in versions if version >= oldest_allowed]
                if not versions:
                    continue
                if self.hard:
                    assert min(versions) >= oldest_allowed, (
                        f"a token drawn by version {min(versions)} was about to be trained at step {self.step}, "
                        f"over the bound of {self.max_staleness}"
                    )
                self.staleness.add(self.step, versions)
                own = advantage if sample.advantages is None else sample.advantages
                yield TrainSequence(sample.tokens, sample.logprobs, mask, own, group.sequence)
