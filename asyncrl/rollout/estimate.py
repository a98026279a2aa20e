"""What is made of rewards that were measured: a mean, pass@k, and how sure one may be of them. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

Z = 1.96
"""Standard deviations to either side that hold 95 % of a normal distribution."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over rows, with its 95 % interval."""

    mean: float
    low: float
    high: float
    rows: int

    @classmethod
    def over(cls, values: list[float]) -> Estimate:
        """One value for each row: the rollouts of one row are not independent.

        Values from 0 to 1: Wilson's score interval (J. Am. Stat. Assoc. 22, 209, 1927) for as many coin flips as would
        scatter like these values. It stays within 0 and 1, and ten rows that are all solved are no certainty in it.
        Other values: the normal interval; NaN where there are too few.
        """
        count = len(values)
        if not count:
            return cls(math.nan, math.nan, math.nan, 0)
        mean = sum(values) / count
        squares = sum((value - mean) ** 2 for value in values)
        error = math.sqrt(squares / (count - 1) / count) if count > 1 else math.nan
        if not all(0 <= value <= 1 for value in values):
            return cls(mean, mean - Z * error, mean + Z * error, count)
        coin = mean * (1 - mean)
        flips = max(coin / error**2, count) if error > 0 else count
        middle = (mean + Z**2 / (2 * flips)) / (1 + Z**2 / flips)
        half_width = Z / (1 + Z**2 / flips) * math.sqrt(coin / flips + Z**2 / (4 * flips**2))
        return cls(mean, max(0.0, middle - half_width), min(middle + half_width, 1.0), count)

    def __str__(self) -> str:
        return f"{self.mean:.3f}" + ("" if math.isnan(self.low) else f" [{self.low:.3f}, {self.high:.3f}]")


@dataclass(slots=True)
class EvalResult:
    """Mean reward over the rows that were rolled out."""

    per_row: dict[int, list[float]] = field(default_factory=dict)
    """Row index -> the rewards of its rollouts."""
    failed: int = 0
    """Rollouts that gave no reward; they count in no mean."""

    @property
    def n(self) -> int:
        """Rollouts that gave a reward."""
        return sum(map(len, self.per_row.values()))

    @property
    def reward(self) -> Estimate:
        """Mean over rows of the mean over a row's rollouts."""
        return Estimate.over([sum(rewards) / len(rewards) for rewards in self.per_row.values() if rewards])

    @property
    def mean(self) -> float:
        return self.reward.mean

    @property
    def ci_low(self) -> float:
        """Lower end of the 95 % interval."""
        return self.reward.low

    @property
    def ci_high(self) -> float:
        """Upper end of the 95 % interval."""
        return self.reward.high

    def pass_at(self, k: int, solved: float = 1.0) -> Estimate:
        """pass@k: how likely one of `k` rollouts of a row has a reward of at least `solved`.

        Of n rollouts of which c solve the row: 1 - C(n - c, k) / C(n, k), without bias (arXiv:2107.03374, eq. 1).
        Rows with fewer than `k` rollouts are left out.
        """
        counts = [(len(rewards), sum(reward >= solved for reward in rewards)) for rewards in self.per_row.values()]
        return Estimate.over([1 - math.comb(n - c, k) / math.comb(n, k) for n, c in counts if n >= k])

    def passes(self) -> dict[int, Estimate]:
        """pass@k for k = 1, 2, 4, ... up to the rollouts of a row; none where rows have only one."""
        most = max(map(len, self.per_row.values()), default=0)
        return {k: self.pass_at(k) for k in (1 << power for power in range(most.bit_length()))} if most > 1 else {}

    def __str__(self) -> str:
        failed = f", {self.failed} failed" if self.failed else ""
        return f"{self.reward} ({self.n} rollouts{failed})"
