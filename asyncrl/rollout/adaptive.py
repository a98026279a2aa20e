"""A staleness bound that moves, and with it the steps between hot-loads. A pure state machine: no clock, no task.

    controller.observe(facts)          # once per optimizer step
    controller.bound, controller.sync_interval, controller.reason

With O for the bound, it follows three rules, in this order:

1. Tokens that are too off-policy lower it. *Strain* is what was measured over what is allowed, 1 at the limit; it
   grows about linearly with staleness, which says how far the bound has to fall.
2. A trainer that waits while the bound holds rollouts back raises it: by Little's law a wait of w of the time is gone
   at (O + 1) / (1 - w) - 1, if rollouts do not get slower by being more. Never to where the strain would be over 1,
   and a raise that bought nothing is taken back.
3. Finished groups that nobody waits for, batches of them over a long time, lower it: as fast, and fresher tokens.

Each change is given time to show before the next: a raise until groups are trained that began after it, a fall until
all are.
The window of concurrency (concurrency.py) has its own rules, of the sampler alone. The two do not fight: while the
window holds rollouts back, the bound does not, and stays.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from asyncrl.config import Config

KL_LIMIT = 0.1
"""Of the KL between policy and sampler, in nats. On the demo's task a bound of 4, which costs hardly any accuracy,
stays below; 8 and 16, which cost some, have 0.2 to 0.4 while the policy moves fast."""
ESS_LOSS_LIMIT = 0.1
"""Of 1 - `ess`: a tenth of the batch's weight is lost."""
SUSTAINED = 2
"""Steps in a row over the limit: one alone may be an odd batch."""
LEAST_WINDOW = 2
"""Steps that are judged together; half of the budget's where that is more."""
STARVED = 0.05
"""Waiting for a smaller share of the time is not worth older tokens."""
MOST_GROWTH = 4
"""The budget grows at most so many times at once: what a wait promises is measured over few steps."""
IDLE = 0.01
"""Below this share nobody waits."""
SPARE_BATCHES = 2
"""Finished batches that always wait: one of them is a margin, the others are staleness for nothing."""
PATIENCE = 3
"""Idle windows before the bound falls. Doubled each time that it had to rise again, up to `MOST_PATIENCE`."""
MOST_PATIENCE = 24
WORTH = 0.25
"""A raise that brought less than this part of what Little's law promised bought nothing, ..."""
PROMISE = 0.1
"""... where that was at least this share of the step: less drowns in the noise."""
MEMORY = 16
"""Windows until what bought nothing is tried again; at once, when the trainer waits for `MORE` more of its time."""
MORE = 0.15
HOT_LOAD_SLACK = 0.1
"""A hot-load may be so much longer than the steps between two of them: that little is waited for."""


@dataclass(frozen=True, slots=True)
class StepFacts:
    """What one optimizer step tells."""

    now: float
    """When it was taken, in seconds."""
    oldest_at: float
    """When the oldest group of its batch was admitted, on the same clock."""
    newest_at: float
    """The same of the youngest."""
    seconds: float
    """From the step before, without waits for hot-loads and checkpoints."""
    starved_s: float
    """The part of it in which the trainer waited for rollouts, and the bound held them back."""
    ready_groups: int
    """Finished groups that wait to be trained."""
    hot_load_s: float
    """How long the last hot-load took."""
    staleness: float
    """Mean over the loss tokens, in steps."""
    kl: float
    """Between the policy and the sampler, in nats. 0 where the trainer does not tell."""
    ess: float
    """A share. 1 where the trainer does not tell."""

    @property
    def strain(self) -> float:
        """How off-policy the tokens were, 1 at the limit."""
        return max(self.kl / KL_LIMIT, (1 - self.ess) / ESS_LOSS_LIMIT)


@dataclass(slots=True)
class _Window:
    """Sums over the steps that are judged together."""

    steps: int = 0
    seconds: float = 0.0
    starved_s: float = 0.0
    least_ready: float = math.inf
    hot_load_s: float = 0.0
    strain: float = 0.0
    staleness: float = 0.0

    def add(self, facts: StepFacts) -> None:
        self.steps += 1
        self.seconds += facts.seconds
        self.starved_s += facts.starved_s
        self.least_ready = min(self.least_ready, facts.ready_groups)
        self.hot_load_s += facts.hot_load_s
        self.strain += facts.strain
        self.staleness += facts.staleness

    @property
    def starved(self) -> float:
        """Share of the time."""
        return self.starved_s / self.seconds if self.seconds > 0 else 0.0

    @property
    def step_s(self) -> float:
        return self.seconds / self.steps

    @property
    def bearable(self) -> float:
        """The staleness at which the strain would be 1."""
        return bearable(self.staleness / self.steps, self.strain / self.steps)


@dataclass(frozen=True, slots=True)
class _Trial:
    """A raise that has to prove itself."""

    bound: int
    step_s: float
    busy_s: float
    """The part of a step in which the trainer did not wait."""


def bearable(staleness: float, strain: float) -> float:
    """The staleness at which the strain would be 1, when it grows linearly."""
    return (staleness + 1) / strain - 1 if strain > 0 else math.inf


class AdaptiveStaleness:
    """Owns the bound and the steps between hot-loads. `reason` says why the bound is what it is."""

    def __init__(self, least: int, most: int, batch_groups: int, least_interval: int) -> None:
        """`least` and `most` are the limits of the bound, in steps; hot-loads are at least `least_interval` apart."""
        assert least_interval <= least + 1 <= most + 1
        self._least, self._most, self._batch_groups = least, most, batch_groups
        self._least_interval = self._interval = least_interval
        self.bound = least
        self.reason = f"{least}: the start"
        self._window = _Window()
        self._now = self._moved_at = 0.0
        self._settling = self._falling = False
        self._strained = 0
        self._trial: _Trial | None = None
        self._idle = 0
        self._patience = PATIENCE
        self._lowered_when_idle = False
        self._useless: int | None = None
        self._useless_at = 0.0
        self._useless_for = 0

    @property
    def sync_interval(self) -> int:
        """Optimizer steps from one hot-load to the next. Half of the bound is left to rollouts."""
        return min(self._interval, max(self._least_interval, (self.bound + 1) // 2))

    def observe(self, facts: StepFacts) -> None:
        """One more optimizer step was taken."""
        self._now = facts.now
        self._settling &= (facts.oldest_at if self._falling else facts.newest_at) < self._moved_at
        self._strained = self._strained + 1 if facts.strain > 1 else 0
        if self._strained >= SUSTAINED and not (self._settling and self._falling) and self.bound > self._least:
            self._ease(facts)
        elif not self._settling:
            self._window.add(facts)
            if self._window.steps >= max(LEAST_WINDOW, (self.bound + 1) // 2):
                window, self._window = self._window, _Window()
                self._judge(window)

    def _ease(self, facts: StepFacts) -> None:
        bound = max(min(self.bound - 1, math.floor(bearable(facts.staleness, facts.strain))), self.bound // 2)
        self._move(bound, f"tokens are too off-policy: KL to the sampler {facts.kl:.3f}, ess {facts.ess:.2f}")

    def _judge(self, window: _Window) -> None:
        self._space_hot_loads(window)
        self._useless_for -= 1
        trial, self._trial = self._trial, None
        if trial is not None and self._bought_nothing(trial, window):
            self._useless, self._useless_at, self._useless_for = self.bound, window.starved, MEMORY
            self._move(trial.bound, f"a step takes {window.step_s:.2f} s as it did: rollouts wait for something else")
        elif window.starved >= STARVED:
            self._idle = 0
            self._raise(window)
        elif window.starved < IDLE and window.least_ready >= SPARE_BATCHES * self._batch_groups:
            self._idle += 1
            if self._idle >= self._patience and self.bound > self._least:
                spare = int(window.least_ready) // self._batch_groups - SPARE_BATCHES + 1
                self._move(self.bound - spare, f"{window.least_ready:.0f} finished groups always waited")
                self._lowered_when_idle = True
        else:
            self._idle = 0

    def _raise(self, window: _Window) -> None:
        waited = f"the trainer waited {window.starved:.0%} of {window.steps} steps, and the bound held rollouts back"
        wanted = math.ceil((self.bound + 1) / max(1 - window.starved, 1 / MOST_GROWTH)) - 1
        limits = {
            "max_staleness": float(self._most),
            "what tokens bear": window.bearable,
            "more bought nothing": self._bought_nothing_at(window),
        }
        limit = min(limits, key=limits.__getitem__)
        bound = math.floor(min(wanted, limits[limit]))
        if bound <= self.bound:
            self.reason = f"{self.bound}: {waited}, but {limit}"
            return
        if self._lowered_when_idle:
            self._patience = min(2 * self._patience, MOST_PATIENCE)
            self._lowered_when_idle = False
        before = self.bound
        self._move(bound, waited)
        self._trial = _Trial(before, window.step_s, window.step_s * (1 - window.starved))

    def _bought_nothing(self, trial: _Trial, window: _Window) -> bool:
        """Whether the raise left the rate as it was. A step that takes longer than before is another workload."""
        promised = trial.step_s - max(trial.busy_s, trial.step_s * (trial.bound + 1) / (self.bound + 1))
        gained = trial.step_s - window.step_s
        return promised > PROMISE * trial.step_s and abs(gained) < WORTH * promised

    def _bought_nothing_at(self, window: _Window) -> float:
        """The largest bound that is not known to buy nothing."""
        if self._useless is None or self._useless_for <= 0 or window.starved > self._useless_at + MORE:
            self._useless = None
            return math.inf
        return self._useless - 1

    def _space_hot_loads(self, window: _Window) -> None:
        """Hot-loads come so often that training hardly waits for one."""
        if window.step_s <= 0:
            return
        steps = window.hot_load_s / window.steps / window.step_s
        before = self._interval = self.sync_interval
        if steps > (1 + HOT_LOAD_SLACK) * self._interval:
            self._interval = math.ceil(min(steps / (1 + HOT_LOAD_SLACK), self._most + 1))
        elif steps < (1 - HOT_LOAD_SLACK) * (self._interval - 1):
            self._interval = max(self._least_interval, self._interval - 1)
        if self.sync_interval != before:
            self.reason = f"{self.bound}: a hot-load takes {steps:.1f} steps, and comes every {self.sync_interval}"

    def _move(self, bound: int, reason: str) -> None:
        bound = min(max(bound, self._least), self._most)
        if bound != self.bound:
            self.reason = f"{self.bound} -> {bound}: {reason}"
        self._settling, self._falling, self._moved_at = True, bound < self.bound, self._now
        self._strained = self._idle = 0
        self._trial = None
        self._window = _Window()
        self.bound = bound

    def gauges(self) -> dict[str, float]:
        """As the step record has it."""
        return {"staleness_bound": self.bound, "sync_interval": self.sync_interval}

    def learned(self) -> dict[str, int]:
        """As a checkpoint holds it."""
        return {"bound": self.bound, "interval": self._interval, "patience": self._patience}

    def go_on(self, learned: Mapping[str, int]) -> None:
        """Start from what an earlier life of the run had `learned`, within the limits of this one."""
        if learned:
            self.bound = min(max(learned["bound"], self._least), self._most)
            self._interval = max(learned["interval"], self._least_interval)
            self._patience = learned["patience"]
            self.reason = f"{self.bound}: as before the resume"


def controller(config: Config) -> AdaptiveStaleness | None:
    """The one that the settings ask for. None: the bound stays."""
    staleness = config.staleness
    if staleness.min_staleness is None:
        return None
    return AdaptiveStaleness(
        staleness.min_staleness,
        staleness.max_staleness,
        config.prompt_groups_per_step,
        config.publish.weight_sync_interval,
    )
