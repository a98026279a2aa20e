"""What a run stands on between two optimizer steps: taken out of an engine, and put into a new one. No I/O.

The groups that are finished are kept as they are and will be trained. Prompts whose rollouts are not finished begin
again, in the order in which they were admitted, before anything new.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from asyncrl.data import Cursor
from asyncrl.storage.ledger import Key
from asyncrl.types import Group

if TYPE_CHECKING:
    from asyncrl.engine import Engine


@dataclass(frozen=True, slots=True)
class RunState:
    """The loop's part of a checkpoint; the trainer's part is the trainer's."""

    step: int
    """Optimizer steps taken."""
    loop: Mapping[str, Any]
    """As JSON holds it."""
    groups: Sequence[Group] = field(default_factory=list)
    """Finished, and not trained yet; in the order of admission."""


def capture(engine: Engine) -> RunState:
    """How things stand now. No optimizer step may be under way."""
    scheduler = engine.scheduler
    groups = sorted([*engine.taken, *engine.queue.order.waiting()], key=lambda group: group.sequence)
    finished = {(group.epoch, group.row) for group in groups}
    stream = scheduler.stream
    loop = {
        "step": engine.step,
        "elapsed_s": engine.elapsed_s(),
        "worst_staleness": engine.worst_staleness,
        "rollouts": scheduler.finished_rollouts,
        "admissions": scheduler.admissions,
        "groups_used": scheduler.budget.used,
        "cursor": [stream.cursor.epoch, stream.cursor.position],
        "unfinished": [list(key) for key in _in_order(engine, engine.ledger.sequences) if key not in finished],
        "ledger": engine.ledger.state(),
        "window": engine.slots.learned(),
        "recent_signal": scheduler.patience.recent,
        "errors_forgiven": scheduler.failures.forgiven,
        "staleness": _staleness(engine),
        "deadlines": [engine.queue.order.deadline(group) for group in groups],
        "adaptive": engine.adaptive.learned() if engine.adaptive is not None else {},
        "random": _random_state(),
    }
    return RunState(engine.step, loop, groups)


def restore(engine: Engine, state: RunState) -> None:
    """Bring an engine that has not run yet to where `state` was taken. The weights of that step must be live."""
    loop, scheduler = state.loop, engine.scheduler
    engine.go_on(state.step, elapsed_s=loop["elapsed_s"], worst_staleness=loop["worst_staleness"])
    engine.ledger.restore(loop["ledger"])
    engine.slots.go_on(loop["window"])
    scheduler.finished_rollouts = loop["rollouts"]
    scheduler.admissions = loop["admissions"]
    scheduler.failures.forgiven = loop["errors_forgiven"]
    for signal in loop["recent_signal"]:
        scheduler.patience.finished(signal)
    most = engine.settings.max_steps
    ahead = None if most is None else max(0, most - state.step) * engine.settings.groups_per_step
    scheduler.budget.go_on(loop["groups_used"], ahead)
    scheduler.stream.go_on(Cursor(*loop["cursor"]))
    unfinished = [(epoch, row) for epoch, row in loop["unfinished"]]
    # Under another bound or batch they might not find their places in time; beyond the last step they have none.
    kept = state.groups[:ahead] if loop["staleness"] == _staleness(engine) else []
    if engine.adaptive is not None:
        engine.adaptive.go_on(loop["adaptive"])
    restarted = unfinished + [(group.epoch, group.row) for group in state.groups[len(kept) :]]
    for epoch, row in _in_order(engine, restarted):
        scheduler.stream.give_back(epoch, row)
    for group, deadline in zip(kept, loop["deadlines"], strict=False):
        scheduler.take_finished(group, deadline)
    _restore_random_state(loop["random"])


def _in_order(engine: Engine, keys: Iterable[Key]) -> list[Key]:
    """Pending draws in the order of their admission."""
    return sorted(keys, key=engine.ledger.sequences.__getitem__)


def _staleness(engine: Engine) -> list[Any]:
    settings = engine.settings
    return [settings.groups_per_step, settings.max_staleness, settings.hard_bound]


def _random_state() -> list[Any]:
    """Of Python's own generator, which rollout functions use."""
    version, numbers, gauss = random.getstate()
    return [version, list(numbers), gauss]


def _restore_random_state(state: Sequence[Any]) -> None:
    version, numbers, gauss = state
    random.setstate((version, tuple(numbers), gauss))
