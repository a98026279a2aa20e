"""A setting to try, and what it would give."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from asyncrl.config import Config
from asyncrl.storage.folder import OFF

Policy = Literal["wait", "pace", "mask", "requeue", "drop"]
"""`wait`, `pace` with `on_stale = "train"`, and `pace` with the other choices of `on_stale` by their names."""
POLICIES: tuple[Policy, ...] = get_args(Policy)


@dataclass(frozen=True, slots=True)
class Setting:
    """What `asyncrl tune` varies of a config."""

    policy: Policy
    max_staleness: int
    window: int | None
    """Rollouts at once, fixed. None: whatever the config's controller makes of it."""
    groups_per_step: int
    group_size: int
    sync_interval: int
    min_staleness: int | None = None
    """Where the bound moves: its lower end. What is tried stays at `max_staleness`."""

    @classmethod
    def of(cls, config: Config) -> Setting:
        staleness, slots = config.staleness, config.concurrency
        paced: Policy = "pace" if staleness.on_stale == "train" else staleness.on_stale
        return cls(
            policy="wait" if staleness.policy == "wait" else paced,
            max_staleness=staleness.max_staleness,
            window=slots.max_window if slots.min_window == slots.max_window else None,
            groups_per_step=config.prompt_groups_per_step,
            group_size=config.completions_per_prompt,
            sync_interval=config.publish.weight_sync_interval,
            min_staleness=staleness.min_staleness,
        )

    def config(self, base: Config) -> Config:
        """`base` with this setting. Raises `ConfigError` where that cannot work."""
        settings = base.model_dump() | self._batch(base)
        for name, values in self._sections(base).items():
            settings[name] = {**settings[name], **values}
        return Config(**settings)

    def toml(self, base: Config) -> str:
        """What to write into a config file to get from `base` here. Empty: nothing."""
        lines = [f"{name} = {value}" for name, value in self._batch(base).items() if getattr(base, name) != value]
        for name, values in self._sections(base).items():
            old = getattr(base, name)
            if any(getattr(old, field) != value for field, value in values.items()):
                lines += ["", f"[{name}]", *(f"{field} = {_toml(value)}" for field, value in values.items())]
        return "\n".join(lines).strip("\n")

    def _batch(self, base: Config) -> dict[str, int]:
        return {
            "completions_per_prompt": self.group_size,
            "prompt_groups_per_step": self.groups_per_step,
            "pipeline_chunks_per_step": min(base.pipeline_chunks_per_step, self.groups_per_step),
        }

    def _sections(self, base: Config) -> dict[str, dict[str, Any]]:
        """The settings of `base`'s sections that this one says, where they may differ from the default."""
        on_stale = "train" if self.policy in ("wait", "pace") else self.policy
        staleness: dict[str, Any] = {
            "policy": "wait" if self.policy == "wait" else "pace",
            "max_staleness": self.max_staleness,
        }
        if "train" not in (on_stale, base.staleness.on_stale) or on_stale != base.staleness.on_stale:
            staleness["on_stale"] = on_stale
        if self.min_staleness != base.staleness.min_staleness:
            staleness["min_staleness"] = self.min_staleness
        sections = {"staleness": staleness, "publish": {"weight_sync_interval": self.sync_interval}}
        if self.window is not None:
            sections["concurrency"] = dict.fromkeys(("min_window", "max_window", "initial_window"), self.window)
        return sections

    @property
    def name(self) -> str:
        """`wait 4`."""
        return f"{self.policy} {self.max_staleness}"

    @property
    def demand(self) -> int:
        """Rollouts that the staleness budget lets be under way at once. More slots than that are never used."""
        return (self.max_staleness + 1) * self.groups_per_step * self.group_size

    def but(self, **changes: Any) -> Setting:
        return replace(self, **changes)


@dataclass(frozen=True, slots=True)
class Point:
    """A setting and its prediction."""

    setting: Setting
    samples_per_s: float
    """Samples trained per second; a sample of which a part is masked counts for what is left of it."""
    share: float
    """`samples_per_s` over the ideal rate."""
    error: float
    """Standard error of `share`: how much another simulation of the same length would differ."""
    staleness_mean: float
    """Optimizer steps, over the tokens that are trained."""
    staleness_worst: float
    lost: float = 0.0
    """Share of the tokens drawn for training that is never trained: masked, dropped, or rolled out again."""
    wait_share: float = 0.0
    """Of the trainer's time, for rollouts."""
    publish_share: float = 0.0
    """Of the time, in which hot-loads held the trainer or the rollouts up."""
    busy: float = 0.0
    """Share of the sampler's capacity, or of the slots, that is used."""
    step_s: float = 0.0
    binds: str = ""
    """What would have to change first for it to go faster."""

    why: str = ""
    """The same, in a sentence."""

    def against(self, ideal: float) -> Point:
        """The same, its share taken of another ideal rate (samples/s)."""
        share = self.samples_per_s / ideal
        return replace(self, share=share, error=self.error * share / self.share if self.share else 0.0)


@dataclass(frozen=True, slots=True)
class Failure:
    """A setting under which the run would end early, and what it would say then."""

    setting: Setting
    why: str


def _toml(value: object) -> str:
    return f'"{OFF if value is None else value}"' if value is None or isinstance(value, str) else str(value)
