"""What varies from rollout to rollout, written down: `lognormal(median=30s, p95=2min)`.

    2s                                          always the same
    uniform(1s, 5s)
    exponential(mean=5s)
    lognormal(median=30s, p95=2min)             or mean= in place of median=, or mean= and sigma=
    pareto(median=10s, p95=2min, max=20min)     a long tail; or min= in place of median=
    file(durations.txt, unit=s)                 numbers of your own, one per line
    0.9 * lognormal(median=2s, p95=8s) + 0.1 * 60s      a mixture

Every one of them takes `max=`: what is above is set to it. Times need a unit, counts may end in `k`.
"""

from __future__ import annotations

import math
import random
import statistics
from dataclasses import dataclass
from typing import Protocol

from asyncrl.errors import ConfigError

P95 = statistics.NormalDist().inv_cdf(0.95)
STEEPEST = math.exp(P95 * P95 / 2)
"""p95 / mean of the lognormal that has the largest: with a wider one the mean outruns the p95."""
WIDEST = 10.0
"""Sigma of a lognormal, and 1 / alpha of a pareto, whose draws are still numbers that a computer has."""


class Distribution(Protocol):
    """Draws numbers: seconds, or tokens, or turns. All of them can be sent to other processes."""

    def draw(self, rng: random.Random) -> float: ...


@dataclass(frozen=True, slots=True)
class Constant:
    value: float

    def draw(self, rng: random.Random) -> float:
        return self.value


@dataclass(frozen=True, slots=True)
class Uniform:
    low: float
    high: float

    def draw(self, rng: random.Random) -> float:
        return rng.uniform(self.low, self.high)


@dataclass(frozen=True, slots=True)
class Exponential:
    mean: float

    def draw(self, rng: random.Random) -> float:
        return rng.expovariate(1 / self.mean)


@dataclass(frozen=True, slots=True)
class Lognormal:
    median: float
    sigma: float
    """Of the logarithm."""

    def draw(self, rng: random.Random) -> float:
        return self.median * math.exp(rng.gauss(0.0, self.sigma))


@dataclass(frozen=True, slots=True)
class Pareto:
    """P(more than x) = (low / x) ** alpha."""

    low: float
    alpha: float

    def draw(self, rng: random.Random) -> float:
        return self.low * math.pow(1.0 - rng.random(), -1 / self.alpha)


@dataclass(frozen=True, slots=True)
class Values:
    """Numbers that were measured, each as likely as the others."""

    values: tuple[float, ...]

    def draw(self, rng: random.Random) -> float:
        return self.values[int(rng.random() * len(self.values))]


@dataclass(frozen=True, slots=True)
class Mixture:
    parts: tuple[Distribution, ...]
    upto: tuple[float, ...]
    """Running sums of the weights; the last is 1."""

    def draw(self, rng: random.Random) -> float:
        at = rng.random()
        part = next(part for part, upto in zip(self.parts, self.upto, strict=True) if at < upto)
        return part.draw(rng)


@dataclass(frozen=True, slots=True)
class Capped:
    inner: Distribution
    most: float

    def draw(self, rng: random.Random) -> float:
        return min(self.most, self.inner.draw(rng))


@dataclass(frozen=True, slots=True)
class Shape:
    """What a distribution comes to."""

    mean: float
    median: float
    p95: float
    varies: bool


def shape(distribution: Distribution) -> Shape:
    """By drawing from it: right to about a percent where the tail is not very long."""
    rng, draws = random.Random(0), 20_000
    values = sorted(distribution.draw(rng) for _ in range(draws))
    return Shape(
        statistics.fmean(values), values[draws // 2], values[int(draws * 0.95)], varies=values[0] != values[-1]
    )


def lognormal(given: dict[str, float]) -> Distribution:
    """From two of: median, mean, p95, sigma.

    With m = ln(median) the mean is exp(m + sigma^2 / 2) and the p95 is exp(m + 1.645 sigma).
    """
    names = set(given)
    if names == {"median", "p95"}:
        _need(given["p95"] > given["median"], "its p95 must be above its median")
        sigma = math.log(given["p95"] / given["median"]) / P95
    elif names == {"mean", "p95"}:
        ratio = given["p95"] / given["mean"]
        _need(ratio > 1, "its p95 must be above its mean")
        _need(
            ratio <= STEEPEST,
            f"no lognormal has a p95 of {ratio:.2f} times its mean: {STEEPEST:.2f} is the most. Give median= and p95= "
            "(the median is what half of them stay below), or use pareto",
        )
        sigma = P95 - math.sqrt(max(0.0, P95 * P95 - 2 * math.log(ratio)))
    elif names in ({"median", "sigma"}, {"mean", "sigma"}):
        sigma = given["sigma"]
    else:
        raise ConfigError("it takes median= and p95=, or mean= and p95=, or one of them and sigma=")
    _need(sigma <= WIDEST, f"its values span too much: its sigma is {sigma:.3g}, and {WIDEST:g} is the most")
    return Lognormal(given["median"] if "median" in given else given["mean"] * math.exp(-sigma * sigma / 2), sigma)


def pareto(given: dict[str, float], capped: bool) -> Distribution:
    """From min and p95, or median and p95: p95 = low * 20^(1/alpha), median = low * 2^(1/alpha)."""
    names = set(given)
    if names not in ({"min", "p95"}, {"median", "p95"}):
        raise ConfigError("it takes min= and p95=, or median= and p95=")
    (start,) = names - {"p95"}
    _need(given["p95"] > given[start], f"its p95 must be above its {start}")
    alpha = math.log(20 if start == "min" else 10) / math.log(given["p95"] / given[start])
    low = given[start] if start == "min" else given[start] * 2 ** (-1 / alpha)
    _need(
        alpha > 1 or capped,
        f"its tail is so long that it has no mean (alpha {alpha:.2f}, at most 1). Say where it ends: max=... "
        "(rollout.timeout_s, say)",
    )
    _need(alpha >= 1 / WIDEST, f"its values span too much: its alpha is {alpha:.3g}, and {1 / WIDEST:g} is the least")
    return Pareto(low, alpha)


def mixture(weighted: list[tuple[float, Distribution]]) -> Distribution:
    total = sum(weight for weight, _ in weighted)
    _need(abs(total - 1) < 1e-6, f"the weights of a mixture must add up to 1, and these add up to {total:g}")
    upto, reached = [], 0.0
    for weight, _ in weighted:
        reached += weight
        upto.append(reached)
    return Mixture(tuple(part for _, part in weighted), (*upto[:-1], 1.0))


def _need(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ConfigError(otherwise)
