"""A workload and a machine that nobody has yet, from a few words: `asyncrl tune CONFIG.toml --tokens ...`."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

from asyncrl.config import Config
from asyncrl.errors import ConfigError
from asyncrl.planning.distributions import Distribution, shape
from asyncrl.planning.notation import COUNTS, TIMES, Kind, distribution
from asyncrl.planning.predict import Machine
from asyncrl.planning.sampler_model import SamplerModel
from asyncrl.planning.speeds import SAMPLER, Said, replicas, trainer, with_hot_loads, with_speed
from asyncrl.planning.words import in_words
from asyncrl.planning.workload import Attempt, Workload

ROWS = 2000
TICK_S = 1e-3
"""Where only the time of whole rollouts is known, a `token` is what is drawn in so long."""
NEEDED = (
    "a config file says nothing of how long things take. Name a run folder instead to learn it from that run, or say "
    "how long: --tokens 'lognormal(median=300, p95=2k)' (drawn in a turn) or --rollout 'lognormal(median=30s, "
    "p95=2min)' (a whole one), and --step '2s' (an optimizer step)."
)


@dataclass(frozen=True, slots=True)
class Description:
    """What was said on the command line, as it was said. None: not at all."""

    rollout: str | None = None
    turns: str | None = None
    prompt: str | None = None
    tokens: str | None = None
    tools: str | None = None
    verifier: str | None = None
    no_signal: str | None = None
    sampler: str | None = None
    replicas: int | None = None
    step: str | None = None
    publish: str | None = None

    @property
    def of_rollouts(self) -> list[str]:
        """Options that say what rollouts do."""
        names = ("rollout", "turns", "prompt", "tokens", "tools", "verifier", "no_signal")
        return [f"--{name.replace('_', '-')}" for name in names if getattr(self, name) is not None]


@dataclass(frozen=True, slots=True)
class Modelled:
    """What is simulated, and how it was understood."""

    workload: Workload
    machine: Machine
    said: tuple[tuple[str, str], ...]
    """(what, how), in words: what was assumed says so."""


def described(config: Config, description: Description, group_size: int) -> Modelled:
    """The workload and machine of a description; `group_size` rollouts for each row.

    Raises:
        ConfigError: something is missing, cannot be read, or does not go together.
    """
    if description.step is None or (description.rollout is None and description.tokens is None):
        raise ConfigError(NEEDED)
    said: Said = []
    draw: _Whole | _ByTurns
    if description.rollout is not None:
        draw, sampler = _whole(description, said)
    else:
        draw, sampler = _by_turns(config, description, said)
    filtered = 0.0
    if description.no_signal is not None:
        filtered = share(description.no_signal, "--no-signal", "groups without signal")
        said.append(("no signal", f"{filtered:.0%} of the groups are filtered"))
    workload = _workload(draw, config, group_size, filtered)
    machine = Machine(
        with_hot_loads(sampler, config, description.publish, said),
        trainer(config, description.step, workload, said),
    )
    return Modelled(workload, machine, tuple(said))


def changed(config: Config, workload: Workload, machine: Machine, description: Description) -> Modelled:
    """A run's workload on another machine: what of it is described takes the place of what was measured.

    Raises:
        ConfigError: it describes rollouts, too.
    """
    if given := description.of_rollouts:
        raise ConfigError(
            f"what rollouts do is learned from the run, so {', '.join(given)} cannot be given. Leave it out, or name a "
            "config file in place of the run."
        )
    said: Said = []
    sampler, learner = machine.sampler, machine.trainer
    if description.sampler is not None:
        sampler = with_speed(replace(sampler, slowdown=0.0), config, description.sampler)
        said.append(("sampler", f"{description.sampler} in place of what was measured"))
    if description.replicas is not None:
        sampler = replace(sampler, replicas=description.replicas)
        said.append(("replicas", f"{description.replicas:,}, each as fast as a measured one"))
    if description.publish is not None:
        sampler = with_hot_loads(sampler, config, description.publish, said)
    if description.step is not None:
        learner = replace(trainer(config, description.step, workload, said), export_s=learner.export_s)
    return Modelled(workload, replace(machine, sampler=sampler, trainer=learner), tuple(said))


# Rollouts


@dataclass(frozen=True, slots=True)
class _Whole:
    """Rollouts of which only the time is known, as if they drew tokens all the time."""

    rollout: Distribution
    turns: Distribution

    def draw(self, rng: random.Random, reward: float) -> Attempt:
        turns = max(1, round(self.turns.draw(rng)))
        ticks = max(turns, round(self.rollout.draw(rng) / TICK_S))
        ends = [ticks * turn // turns for turn in range(turns + 1)]
        drawn = [end - start for start, end in pairwise(ends)]
        return Attempt.of_turns([(0.0, 0, count) for count in drawn], reward=reward)


@dataclass(frozen=True, slots=True)
class _ByTurns:
    """Rollouts that draw tokens, call tools, and are verified."""

    turns: Distribution
    prompt: Distribution
    tokens: Distribution
    tools: Distribution
    verifier: Distribution
    most_tokens: int

    def draw(self, rng: random.Random, reward: float) -> Attempt:
        turns, fresh = [], max(1, round(self.prompt.draw(rng)))
        for turn in range(max(1, round(self.turns.draw(rng)))):
            drawn = min(self.most_tokens, max(1, round(self.tokens.draw(rng))))
            turns.append((self.tools.draw(rng) if turn else 0.0, 0 if turn else fresh, drawn))
        return Attempt.of_turns(turns, after_s=self.verifier.draw(rng), reward=reward)


def _whole(description: Description, said: Said) -> tuple[_Whole, SamplerModel]:
    others = [option for option in description.of_rollouts if option not in ("--rollout", "--turns", "--no-signal")]
    others += [f"--{name}" for name in ("sampler", "replicas") if getattr(description, name) is not None]
    if others:
        raise ConfigError(
            f"--rollout is the time of a whole rollout, however many run: {', '.join(others)} cannot be given with it. "
            "Leave them out, or describe rollouts by --tokens and --tools, and the sampler's speed follows."
        )
    assert description.rollout is not None
    rollout = distribution(description.rollout, TIMES, "--rollout")
    turns = distribution(description.turns or "1", COUNTS, "--turns")
    said.append(("rollout", in_words(rollout, TIMES)))
    said.append(("turns", in_words(turns, COUNTS) + ("" if description.turns else " (assumed: --turns)")))
    said.append(("sampler", "no slower however many rollouts run (describe --tokens to have it modelled)"))
    return _Whole(rollout, turns), SamplerModel(token_s=TICK_S)


def _by_turns(config: Config, description: Description, said: Said) -> tuple[_ByTurns, SamplerModel]:
    def read(name: str, kind: Kind, default: str, what: str) -> Distribution:
        text = getattr(description, name)
        found = distribution(text or default, kind, f"--{name}")
        said.append((what, in_words(found, kind) + ("" if text else f" (assumed: --{name})")))
        return found

    rollouts = _ByTurns(
        turns=read("turns", COUNTS, "1", "turns"),
        prompt=read("prompt", COUNTS, "500", "prompt tokens"),
        tokens=read("tokens", COUNTS, "", "tokens a turn"),
        tools=read("tools", TIMES, "0s", "tools between turns"),
        verifier=read("verifier", TIMES, "0s", "verifier"),
        most_tokens=config.sampling.max_tokens,
    )
    if shape(rollouts.tokens).p95 > rollouts.most_tokens:
        said.append(("", f"turns are cut off at sampling.max_tokens = {rollouts.most_tokens:,}, as in the config"))
    text, count = description.sampler or SAMPLER, description.replicas or replicas(config)
    speed = text + ("" if description.sampler else " (assumed: --sampler)")
    said.append(("sampler", f"{count:,} {'replica' if count == 1 else 'replicas'}, each {speed}"))
    return rollouts, with_speed(SamplerModel(replicas=count), config, text)


def _workload(draw: _Whole | _ByTurns, config: Config, group_size: int, no_signal: float) -> Workload:
    rng = random.Random(0)
    retries, limit_s = config.rollout.retries, config.rollout.timeout_s

    def member(signal: bool) -> Iterator[Attempt]:
        """Other attempts behind one that the time limit will end."""
        for _ in range(retries + 1):
            yield (attempt := draw.draw(rng, rng.random() if signal else 0.0))
            if attempt.idle_s < limit_s:
                return

    rows = []
    for _ in range(ROWS):
        signal = rng.random() >= no_signal
        rows.append(tuple(tuple(member(signal)) for _ in range(group_size)))
    return Workload(tuple(rows), "described")


def share(text: str, option: str, what: str) -> float:
    """`30%` or `0.3`, below 1. Raises `ConfigError`."""
    number = text.strip().removesuffix("%")
    try:
        value = float(number) / (100 if number != text.strip() else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 0.99:
        raise ConfigError(f"{option} is {text!r}. Expected the share of the {what}, such as 30%.")
    return value
