"""How fast a machine is, from a few words: the sampler, its hot-loads, the trainer."""

from __future__ import annotations

import random
import re
from dataclasses import replace

from asyncrl.config import Config
from asyncrl.errors import ConfigError
from asyncrl.planning.distributions import Constant
from asyncrl.planning.notation import COUNTS, TIMES, distribution, quantity
from asyncrl.planning.sampler_model import SamplerModel
from asyncrl.planning.trainer_model import TrainerModel
from asyncrl.planning.words import duration, in_words
from asyncrl.planning.workload import Workload

SAMPLER = "60 tokens/s at 1, 3000 tokens/s at 128"
PUBLISH = "1s"
HOT_LOADS = 200
"""Durations that a simulation draws from."""
SPEED = re.compile(r"(?P<rate>\d+\.?\d*k?)\s*tokens/s\s+at\s+(?P<running>\d+)$")
PROMPTS = re.compile(r"prompts\s+(?P<rate>\d+\.?\d*k?)\s*tokens/s$")
PER_TOKEN = re.compile(r"(?P<step>[^+]+?)\s*\+\s*(?P<token>[^+]+?)\s+per\s+token$")
Said = list[tuple[str, str]]
"""(what, how), in words."""


def with_speed(sampler: SamplerModel, config: Config, text: str) -> SamplerModel:
    """`sampler`, as fast as `--sampler` says."""
    points: dict[int, float] = {}
    prompt_s = 0.0
    for part in (part.strip() for part in text.split(",")):
        if found := SPEED.match(part):
            points[int(found["running"])] = quantity(found["rate"], COUNTS, "--sampler")
        elif found := PROMPTS.match(part):
            if not (rate := quantity(found["rate"], COUNTS, "--sampler")):
                raise _bad_speed(text, "a speed must be above 0")
            prompt_s = 1 / rate
        else:
            raise _bad_speed(text, f"{part!r} cannot be read")
    if not 1 <= len(points) <= 2 or min(points) < 1 or min(points.values()) <= 0:
        raise _bad_speed(text, "one or two speeds are expected, with from 1 request up")
    (few, few_rate), (many, many_rate) = min(points.items()), max(points.items())
    running_s = 0.0
    if few != many:
        running_s = (many / many_rate - few / few_rate) / (many - few)
        if running_s < 0:
            raise _bad_speed(text, f"each of {many} requests is faster than each of {few}")
    token_s = few / few_rate - (few - 1) * running_s
    if token_s <= 0:
        raise _bad_speed(text, f"a single request would take no time at all; say the speed at 1 in place of {few}")
    max_running = config.sampler.max_running or (many if few != many else None)
    return replace(sampler, token_s=token_s, running_s=running_s, prompt_s=prompt_s, max_running=max_running)


def _bad_speed(text: str, why: str) -> ConfigError:
    return ConfigError(
        f"--sampler is {text!r}: {why}. Expected the speed of one replica with few and with most requests, such as "
        f"'{SAMPLER}', and ', prompts 20k tokens/s' where reading prompts takes time."
    )


def replicas(config: Config) -> int:
    return len(config.sampler.urls) or config.sampler.replicas


def with_hot_loads(sampler: SamplerModel, config: Config, text: str | None, said: Said) -> SamplerModel:
    """`sampler`, with hot-loads that take as long as `--publish` says."""
    lora = config.lora.rank > 0
    found = distribution(text or PUBLISH, TIMES, "--publish")
    rng = random.Random(0)
    pauses = "nothing pauses (LoRA)" if lora else "the sampler pauses for it"
    said.append(("hot-load", f"{in_words(found, TIMES)}, {pauses}" + ("" if text else " (assumed: --publish)")))
    return replace(
        sampler,
        hot_load_s=tuple(found.draw(rng) for _ in range(1 if isinstance(found, Constant) else HOT_LOADS)),
        pause_share=0.0 if lora else 1.0,
        side_by_side=lora,
        drain=not lora and config.sampler.in_flight == "drain",
    )


def trainer(config: Config, text: str, workload: Workload, said: Said) -> TrainerModel:
    """`2s` is a step of the config's batch, and others take as much longer as they have more tokens."""
    if found := PER_TOKEN.match(text.strip()):
        step_s, token_s = quantity(found["step"], TIMES, "--step"), quantity(found["token"], TIMES, "--step")
        said.append(("optimizer step", text))
        return TrainerModel(step_s=step_s, token_s=token_s)
    seconds = quantity(text, TIMES, "--step")
    if not seconds:
        raise ConfigError("--step is 0. An optimizer step takes time: expected such as 2s.")
    groups, size = config.prompt_groups_per_step, config.completions_per_prompt
    said.append(
        ("optimizer step", f"{duration(seconds)} for {groups} groups of {size}; others in proportion to tokens")
    )
    return TrainerModel(token_s=seconds / (groups * size * workload.mean_tokens))
