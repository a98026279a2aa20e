"""Numbers and distributions as people say them."""

from __future__ import annotations

from asyncrl.planning.distributions import Distribution, shape
from asyncrl.planning.notation import SECONDS, Kind


def in_words(found: Distribution, kind: Kind) -> str:
    """`mean 43 s, median 30 s, p95 2 min`."""
    told = duration if kind.units is SECONDS else count
    come = shape(found)
    if not come.mean:
        return "none"
    if not come.varies:
        return told(come.mean)
    return f"mean {told(come.mean)}, median {told(come.median)}, p95 {told(come.p95)}"


def duration(seconds: float) -> str:
    for unit, size in (("h", 3600.0), ("min", 60.0), ("s", 1.0)):
        if seconds >= 2 * size or (unit == "s" and seconds >= 1):
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e3:.3g} ms"


def count(number: float) -> str:
    return f"{number:,.0f}" if number >= 10 else f"{number:.3g}"
