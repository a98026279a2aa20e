"""Text -> distribution: the notation of distributions.py, and quantities with their units."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from asyncrl.errors import ConfigError
from asyncrl.planning.distributions import (
    Capped,
    Constant,
    Distribution,
    Exponential,
    Uniform,
    Values,
    lognormal,
    mixture,
    pareto,
)

SECONDS: Mapping[str, float] = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0}
COUNT: Mapping[str, float] = {"": 1.0, "k": 1e3}
TOKEN = re.compile(
    r"\s*(?:(?P<number>-?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)\s*(?P<unit>[a-zµμ]*)|(?P<word>[A-Za-z_]\w*)"
    r"|(?P<mark>[()=,*+]))"
)
FAMILIES: Mapping[str, tuple[str, ...]] = {
    "uniform": ("low", "high"),
    "exponential": ("mean",),
    "lognormal": ("median", "mean", "p95", "sigma"),
    "pareto": ("min", "median", "p95"),
}
PLAIN = {"sigma"}
"""Numbers without a unit."""


@dataclass(frozen=True, slots=True)
class Kind:
    """What is written: times, or counts."""

    units: Mapping[str, float]
    example: str


TIMES = Kind(SECONDS, "2s, 250ms, or 1.5min")
COUNTS = Kind(COUNT, "400, or 2k")


def distribution(text: str, kind: Kind, where: str) -> Distribution:
    """Read `text`, which `where` (an option) holds. Times come out in seconds.

    Raises:
        ConfigError: it cannot be understood, or no such distribution exists.
    """
    try:
        return _Reader(text, kind).read()
    except ConfigError as error:
        raise ConfigError(f"{where} is {text!r}: {error}.") from None


def quantity(text: str, kind: Kind, where: str) -> float:
    """One number with its unit. Raises `ConfigError`."""
    found = distribution(text, kind, where)
    if not isinstance(found, Constant):
        raise ConfigError(f"{where} is {text!r}. Expected one number, such as {kind.example}.")
    return found.value


class _Reader:
    """One pass from left to right. A token is a match of `TOKEN`.

    mixture = part (+ part)*      part = [number *] single      single = quantity | family(name=value, ...)
    """

    def __init__(self, text: str, kind: Kind) -> None:
        self._text, self._kind = text, kind
        self._at = 0

    def read(self) -> Distribution:
        parts = [self._part()]
        while self._take("+"):
            parts.append(self._part())
        if rest := self._text[self._at :].strip():
            raise ConfigError(f"{rest!r} was not expected behind the rest")
        if len(parts) == 1 and parts[0][0] is None:
            return parts[0][1]
        weighted = [(weight, part) for weight, part in parts if weight is not None]
        if len(weighted) < len(parts):
            raise ConfigError("each part of a mixture needs its weight: 0.9 * 2s + 0.1 * 60s")
        return mixture(weighted)

    def _part(self) -> tuple[float | None, Distribution]:
        before = self._at
        token = self._next()
        if token["number"] and not token["unit"] and self._take("*"):
            weight = float(token["number"])
            if not 0 < weight <= 1:
                raise ConfigError(f"the weight {weight:g} of a mixture is not between 0 and 1")
            return weight, self._single()
        self._at = before
        return None, self._single()

    def _single(self) -> Distribution:
        token = self._next()
        if token["number"]:
            return Constant(self._value(token))
        if token["word"] == "file" and self._take("("):
            return self._file()
        if token["word"] in FAMILIES and self._take("("):
            return self._family(token["word"])
        raise ConfigError(
            f"{token[0].strip()!r} was found where {self._kind.example}, or {', '.join(FAMILIES)} or file with "
            "their values in brackets, was expected"
        )

    def _family(self, family: str) -> Distribution:
        names = FAMILIES[family]
        given: dict[str, float] = {}
        while not self._take(")"):
            if given:
                self._expect(",")
            name = self._name(family, names, len(given))
            token = self._next()
            if not token["number"]:
                raise ConfigError(f"{name} of {family} is {token[0].strip()!r}, and a number was expected")
            if name in given:
                raise ConfigError(f"{family} has {name} twice")
            given[name] = self._plain(name, token) if name in PLAIN else self._value(token)
        most = given.pop("max", None)
        if any(value <= 0 for name, value in given.items() if name != "low"):
            raise ConfigError(f"the values of {family} must be above 0")
        made = self._make(family, given, most is not None)
        return made if most is None else Capped(made, most)

    def _make(self, family: str, given: dict[str, float], capped: bool) -> Distribution:
        try:
            if family == "lognormal":
                return lognormal(given)
            if family == "pareto":
                return pareto(given, capped)
        except ConfigError as error:
            raise ConfigError(f"{family}: {error}") from None
        names = FAMILIES[family]
        if set(given) != set(names):
            raise ConfigError(f"{family} takes {' and '.join(names)}: {_example(family, self._kind)}")
        if family == "exponential":
            return Exponential(given["mean"])
        if not given["low"] < given["high"]:
            raise ConfigError(f"uniform goes from its lower to its higher value: {_example(family, self._kind)}")
        return Uniform(given["low"], given["high"])

    def _name(self, family: str, names: tuple[str, ...], place: int) -> str:
        """`mean=` before a value; values of uniform and exponential may stand without."""
        before = self._at
        token = self._next()
        if word := token["word"]:
            if word not in (*names, "max"):
                raise ConfigError(f"{family} has no {word}. It takes {', '.join(names)} and max")
            self._expect("=")
            return word
        self._at = before
        if family in ("uniform", "exponential") and place < len(names):
            return names[place]
        raise ConfigError(f"the values of {family} need their names: {_example(family, self._kind)}")

    def _file(self) -> Distribution:
        end = self._text.find(")", self._at)
        inside = self._text[self._at : end] if end >= 0 else ""
        path, _, about = inside.partition(",")
        name, _, unit = about.partition("=")
        path, unit = path.strip().strip('"'), unit.strip()
        if end < 0 or not path or (about and name.strip() != "unit"):
            raise ConfigError(f"a file is written {_file_example(self._kind)}")
        if unit not in self._kind.units:
            raise ConfigError(f"the numbers of {path} need a unit: {_file_example(self._kind)}")
        self._at = end + 1
        return Values(_numbers(Path(path), self._kind.units[unit]))

    def _value(self, token: re.Match[str]) -> float:
        units, text = self._kind.units, token[0].strip()
        unit = token["unit"].replace("µ", "u").replace("μ", "u")
        if unit not in units:
            found = f"has the unit {token['unit']!r}" if token["unit"] else "has no unit"
            known = ", ".join(name for name in units if name)
            raise ConfigError(f"{text} {found}. Expected {known}: {self._kind.example}")
        value = float(token["number"]) * units[unit]
        if value < 0 or not math.isfinite(value):
            raise ConfigError(f"{text} is below 0 or not finite")
        return value

    def _plain(self, name: str, token: re.Match[str]) -> float:
        if token["unit"]:
            raise ConfigError(f"{name} is a plain number, and {token[0].strip()} has a unit")
        return float(token["number"])

    def _next(self) -> re.Match[str]:
        found = TOKEN.match(self._text, self._at)
        if found is None:
            rest = self._text[self._at :].strip()
            raise ConfigError(f"{rest!r} cannot be read" if rest else "it ends too early")
        self._at = found.end()
        return found

    def _take(self, mark: str) -> bool:
        """Step over `mark` if it comes next."""
        found = TOKEN.match(self._text, self._at)
        if found is None or found["mark"] != mark:
            return False
        self._at = found.end()
        return True

    def _expect(self, mark: str) -> None:
        if not self._take(mark):
            rest = self._text[self._at :].strip()
            raise ConfigError(f"{mark!r} was expected " + (f"before {rest!r}" if rest else "at its end"))


def _numbers(path: Path, unit: float) -> tuple[float, ...]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the file {path} cannot be read ({error}). Expected one number per line") from None
    values = []
    for number, line in enumerate(lines, 1):
        if not (text := line.partition("#")[0].strip()):
            continue
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (value >= 0 and math.isfinite(value)):
            raise ConfigError(f"{path}:{number} is {text!r}, and a number from 0 up was expected")
        values.append(value * unit)
    if not values:
        raise ConfigError(f"{path} holds no number. Expected one per line")
    return tuple(values)


def _example(family: str, kind: Kind) -> str:
    low, high = ("1s", "5s") if kind is TIMES else ("100", "2k")
    return {
        "uniform": f"uniform({low}, {high})",
        "exponential": f"exponential(mean={low})",
        "lognormal": f"lognormal(median={low}, p95={high})",
        "pareto": f"pareto(median={low}, p95={high})",
    }[family]


def _file_example(kind: Kind) -> str:
    return "file(durations.txt, unit=s)" if kind is TIMES else "file(tokens.txt)"
