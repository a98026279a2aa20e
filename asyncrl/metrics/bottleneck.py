"""What binds: the one thing whose change would speed the run up, from what its steps recorded. Pure.

Whatever the trainer does not spend on training is lost, so the largest loss is looked at: hot-loads, checkpoints, or
waiting for rollouts. Rollouts are late because their work is thrown away or is not training's own (failed, filtered,
evaluations), because the sampler gives no more (more at once would only wait longer), or because the window or the
staleness bound holds them back.

tests/metrics/test_bottleneck.py follows the advice in simulated runs: it must pay, and other advice must not.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from asyncrl.metrics.report import Account

Kind = Literal[
    "trainer",
    "publish",
    "checkpoint",
    "loop",
    "data",
    "failures",
    "filter",
    "evaluation",
    "replicas",
    "sampler",
    "tools",
    "slots",
    "staleness",
    "balanced",
]

WORTH = 0.2
"""Share of the time from which a loss is worth a change; below it the trainer is what binds."""
HALF = 0.5
BLOCKED = 0.35
"""Share of the time. A machine whose cores are all busy is late for a fifth of it, and no line is to blame."""
FAILING = 0.2
"""Share of the attempts. Those that failed pause before they are made again, so fewer cost more than their work."""
FILTERED = 0.65
"""Share of the groups. Fewer cost no more than a larger staleness bound or window brings."""
EVALUATING = 0.4
"""Share of the rollouts under way."""
OUTSIDE = 0.7
"""Share of a rollout's time. Where less of it goes by outside of the model, faster tools alone bring little."""
KV_FULL = 0.9
UNEVEN = 1.5
"""`replica_spread`, where the same replica is the busiest `MOSTLY`: by chance it is another one each time."""
MOSTLY = 0.75
DOWN = 0.75
"""Fewer of the replicas that there were are up."""
MOST_STALENESS = 8
"""A bound above it is no advice: docs/staleness.md says what it costs."""


@dataclass(frozen=True, slots=True)
class Bottleneck:
    """What binds, and what would change it."""

    kind: Kind
    sentence: str
    advice: str

    def __str__(self) -> str:
        return f"{self.sentence} {self.advice}".strip()


def where_time_went(account: Account) -> str:
    """The shares of the time, what binds, and what to change."""
    found = bottleneck(account)
    if found is None:
        return "No optimizer step was finished, so there is no time to account for."
    return f"Time: {account.shares()}. {found}"


def bottleneck(account: Account) -> Bottleneck | None:
    """What binds over all steps of the account together; None where they took no time."""
    shares = account.shares()
    if shares is None:
        return None
    if account.share("loop_blocked_s") >= BLOCKED:
        return _loop(account)
    losses: dict[Callable[[Account], Bottleneck], float] = {
        _rollouts: shares.waiting,
        _publish: shares.publishing,
        _checkpoint: shares.saving,
    }
    explain, largest = max(losses.items(), key=lambda loss: loss[1])
    if largest >= WORTH:
        return explain(account)
    return _trainer(account) if shares.training >= HALF else _balanced()


def _loop(account: Account) -> Bottleneck:
    return Bottleneck(
        "loop",
        f"The event loop was blocked {account.share('loop_blocked_s'):.0%} of the time, and every rollout and request "
        "stood still meanwhile.",
        "Make the line async that the log names, or put it into asyncrl.offload; where it names none, the machine has "
        "too few cores.",
    )


def _trainer(account: Account) -> Bottleneck:
    return Bottleneck(
        "trainer",
        f"The trainer was busy {account.share('train_s'):.0%} of the time and rollouts hide behind it, which is where "
        "a run should be.",
        "A faster device, lora.rank or a larger trainer.max_tokens_per_microbatch would speed it up.",
    )


def _balanced() -> Bottleneck:
    return Bottleneck("balanced", "No part dominates: rollouts and training are in balance.", "")


def _publish(account: Account) -> Bottleneck:
    waited = f"The trainer waited {account.share('publish_wait_s'):.0%} of the time for hot-loads: "
    return _down(account, waited) or Bottleneck(
        "publish",
        f"Hot-loads take longer than the steps between them: the trainer waited {account.share('publish_wait_s'):.0%} "
        "of the time for them.",
        "Raise publish.weight_sync_interval, or train an adapter (lora.rank), which is loaded without a pause.",
    )


def _checkpoint(account: Account) -> Bottleneck:
    return Bottleneck(
        "checkpoint",
        f"Training stood still for checkpoints {account.share('checkpoint_s'):.0%} of the time.",
        "Raise checkpoint.interval, or leave it out: then they take 1%.",
    )


# Rollouts are late


def _rollouts(account: Account) -> Bottleneck:
    late = f"The trainer waited {account.share('wait_s'):.0%} of the time for rollouts: "
    for look in (_no_data, _failing, _down, _uneven, _filtered, _evaluating, _full, _unpublished, _no_slots, _tools):
        if found := look(account, late):
            return found
    return _too_fresh(account, late)


def _no_data(account: Account, late: str) -> Bottleneck | None:
    if account.sum("wait_data_s") < HALF * account.sum("wait_s"):
        return None
    return Bottleneck(
        "data",
        f"{late}nothing was left to begin, and the last ones were waited for.",
        "A longer run (more rows, data.epochs, max_steps) spends a smaller part of its time on its end.",
    )


def _failing(account: Account, late: str) -> Bottleneck | None:
    again, ended = account.sum("members_retried"), account.sum("rollouts_finished")
    if again <= FAILING * (again + ended):
        return None
    return Bottleneck(
        "failures",
        f"{late}{again:,.0f} of {again + ended:,.0f} attempts failed and were made again.",
        "The log has their errors. One that needs longer than rollout.timeout_s fails each time.",
    )


def _down(account: Account, late: str) -> Bottleneck | None:
    """A hot-load waits for the first replica to come back too."""
    up, most = account.mean("replicas_up"), account.most("replicas_up")
    if up >= DOWN * most:
        return None
    if most == 1:
        return Bottleneck("replicas", f"{late}vLLM was up {up:.0%} of the time.", "The log says why it was lost.")
    return Bottleneck(
        "replicas",
        f"{late}of {most:.0f} vLLM replicas {up:.1f} were up on the mean.",
        "The log says why the others were lost.",
    )


def _uneven(account: Account, late: str) -> Bottleneck | None:
    spread, (number, share) = account.mean("replica_spread"), account.busiest_replica()
    if spread < UNEVEN or share < MOSTLY or _outside(account) > 1 - WORTH:
        return None
    return Bottleneck(
        "replicas",
        f"{late}replica {number} had {spread:.1f} times as many requests as the mean one.",
        "It is slower than the others: look at its log, at its GPU, and at what else runs there.",
    )


def _filtered(account: Account, late: str) -> Bottleneck | None:
    filtered, trained = account.sum("groups_filtered"), account.sum("groups_trained")
    if filtered <= FILTERED * (filtered + trained):
        return None
    return Bottleneck(
        "filter",
        f"{late}{filtered:,.0f} of {filtered + trained:,.0f} groups had equal rewards and were thrown away.",
        "Use prompts that the model solves sometimes, a finer reward, or a larger completions_per_prompt.",
    )


def _evaluating(account: Account, late: str) -> Bottleneck | None:
    """An evaluation has slots, or room in the sampler, that training needs."""
    evaluating, training = account.mean("eval_in_flight"), account.share("rollout_s")
    share = evaluating / (evaluating + training) if evaluating else 0.0
    if share < EVALUATING or not (_sampler_is_full(account) or _window_is_full(account)):
        return None
    return Bottleneck(
        "evaluation",
        f"{late}{share:.0%} of those under way were of evaluations.",
        "Raise evaluation.interval, or lower evaluation.concurrency or evaluation.samples.",
    )


def _full(account: Account, late: str) -> Bottleneck | None:
    """More rollouts at once would wait in the sampler instead of outside it."""
    if not _sampler_is_full(account):
        return None
    running, waiting, kv = (account.mean(name) for name in ("sampler_running", "sampler_waiting", "kv_use"))
    said = f"the sampler is full, with {running:,.0f} requests running and {waiting:,.0f} waiting."
    if kv > KV_FULL:
        said = f"the sampler is full, with {kv:.0%} of its KV cache in use."
    more = "Raise sampler.max_running if the device has room,"
    if account.knows("replicas_up"):
        more = "Add sampler.replicas, give it more memory (sampler.gpu_memory_utilization),"
    return Bottleneck(
        "sampler",
        late + said,
        f"{more} or lower sampling.max_tokens. More concurrency or staleness would gain nothing.",
    )


def _unpublished(account: Account, late: str) -> Bottleneck | None:
    if account.share("wait_unpublished_s") < HALF:
        return None
    return Bottleneck(
        "publish",
        f"{late}for {account.share('wait_unpublished_s'):.0%} they might not begin because new weights were on their "
        "way into the sampler.",
        "Train an adapter (lora.rank), which is loaded faster, or raise staleness.max_staleness, so that rollouts go "
        "on meanwhile.",
    )


def _no_slots(account: Account, late: str) -> Bottleneck | None:
    if not _window_is_full(account):
        return None
    return Bottleneck(
        "slots",
        f"{late}the window was full ({account.mean('window'):,.0f} rollouts on average), and the sampler had room."
        f"{_outside_said(account)}",
        "Raise concurrency.initial_window, or concurrency.max_window where the window has reached it"
        + ("; tools that bear no more at once must get faster instead." if _outside(account) > HALF else "."),
    )


def _tools(account: Account, late: str) -> Bottleneck | None:
    """No staleness that anybody wants would hide them."""
    if _outside(account) <= OUTSIDE or _needed_staleness(account) <= MOST_STALENESS:
        return None
    return Bottleneck(
        "tools",
        f"{late}{_outside(account):.0%} of a rollout's time went by outside of the model, in tools and your own code.",
        "Make them faster, or more of them run at once; else raise staleness.max_staleness.",
    )


def _too_fresh(account: Account, late: str) -> Bottleneck:
    if account.sum("wait_straggler_s") > HALF * account.sum("wait_s"):
        said = "finished groups might not pass an unfinished one without breaking the staleness bound."
    else:
        said = "the staleness budget was used up while they were running."
    needed = _needed_staleness(account)
    advice = f"Raise staleness.max_staleness ({needed} would hide them, if they get no slower by being more)"
    if needed > MOST_STALENESS:
        advice = "Shorten them (sampling.max_tokens, rollout.timeout_s), or raise staleness.max_staleness"
    return Bottleneck("staleness", f"{late}{said}{_outside_said(account)}", f"{advice}; asyncrl tune shows the trade.")


def _window_is_full(account: Account) -> bool:
    by_staleness = account.sum("wait_budget_s") + account.sum("wait_unpublished_s")
    return account.sum("wait_slots_s") >= by_staleness


def _sampler_is_full(account: Account) -> bool:
    """Requests wait for it most of the time; or it is what keeps the window from growing."""
    if account.mean("sampler_full") >= HALF or account.mean("kv_use") > KV_FULL:
        return _outside(account) < 1 - WORTH
    return _window_is_full(account) and account.mean("window_congested") >= HALF and _outside(account) < HALF


def _outside(account: Account) -> float:
    """Share of the rollouts' time in which the model was not asked."""
    rollout_s = account.sum("rollout_s")
    return max(0.0, 1 - account.sum("model_s") / rollout_s) if rollout_s else 0.0


def _outside_said(account: Account) -> str:
    outside = _outside(account)
    return f" {outside:.0%} of a rollout's time went by in tools and your own code." if outside > HALF else ""


def _needed_staleness(account: Account) -> int:
    """The bound at which the trainer would not wait, by Little's law, if rollouts get no slower by being more."""
    pace = max(1 - account.share("wait_s"), 0.01)
    return math.ceil((account.most("staleness_max") + 1) / pace) - 1
