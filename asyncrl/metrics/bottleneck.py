"""What binds: the one thing whose change would speed the run up, from what its steps recorded. Pure.

Whatever the trainer does not spend on training is lost, so the largest loss is looked at: hot-loads, checkpoints, or
waiting for rollouts. Rollouts are late for one of three reasons. Their work is thrown away or is not training's own
(filtered, failed, evaluations); or it goes on as fast as the sampler can (more at once would only wait longer); or
more at once would help, and the window or the staleness bound holds them back.

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

WORTH = 0.15
"""Share of the time from which a loss is worth a change; below it the trainer is what binds."""
HALF = 0.5
EVALUATING = 0.25
"""Share of the rollouts under way."""
QUEUED = 0.1
"""Requests that wait for room in the sampler, for each that it decodes. Less only keeps it fed."""
KV_FULL = 0.9
UNEVEN = 1.5
"""`replica_spread`, where the same replica is the busiest `MOSTLY`: chance makes another one the busiest each time."""
MOSTLY = 0.8
MOST_STALENESS = 16
"""A bound above it is no advice: the objective would suffer, whatever it gained."""


@dataclass(frozen=True, slots=True)
class Bottleneck:
    """What binds, and what would change it."""

    kind: Kind
    sentence: str
    advice: str

    def __str__(self) -> str:
        return f"{self.sentence} {self.advice}"


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
    if (blocked := account.share("loop_blocked_s")) >= 2 * WORTH:
        return _loop(blocked)
    unpublished = account.share("wait_unpublished_s")
    losses: dict[Callable[[Account], Bottleneck], float] = {
        _rollouts: shares.waiting - unpublished,
        _publish: shares.publishing + unpublished,
        _checkpoint: shares.saving,
    }
    explain, largest = max(losses.items(), key=lambda loss: loss[1])
    if largest >= WORTH:
        return explain(account)
    return _trainer(account) if shares.training >= HALF else _balanced()


def _loop(blocked: float) -> Bottleneck:
    return Bottleneck(
        "loop",
        f"The event loop was blocked {blocked:.0%} of the time, and every rollout and request stood still meanwhile.",
        "The log names the line that blocks: make it async, or put it into asyncrl.offload.",
    )


def _trainer(account: Account) -> Bottleneck:
    return Bottleneck(
        "trainer",
        f"The trainer was busy {account.share('train_s'):.0%} of the time and rollouts hide behind it, which is where a "
        "run should be.",
        "A faster device, lora.rank or a larger trainer.max_tokens_per_microbatch would speed it up.",
    )


def _balanced() -> Bottleneck:
    return Bottleneck("balanced", "No part dominates: rollouts and training are in balance.", "Nothing to change.")


def _publish(account: Account) -> Bottleneck:
    shares = account.shares()
    unpublished = account.share("wait_unpublished_s")
    lost = account.share("publish_wait_s") + unpublished
    if unpublished > lost / 2:
        return Bottleneck(
            "publish",
            f"The trainer waited {lost:.0%} of the time for weights to come into the sampler: rollouts might not begin "
            "before.",
            "Raise staleness.max_staleness, so that they go on meanwhile, or train an adapter (lora.rank), which is "
            "loaded without a pause.",
        )
    return Bottleneck(
        "publish",
        f"Hot-loads take longer than the steps between them: the trainer waited {lost:.0%} of the time for them.",
        "Raise publish.weight_sync_interval, or train an adapter (lora.rank), which is loaded without a pause.",
    )


def _checkpoint(account: Account) -> Bottleneck:
    return Bottleneck(
        "checkpoint",
        f"Training stood still for checkpoints {account.share('checkpoint_s'):.0%} of the time.",
        "Raise checkpoint.interval.",
    )


# Rollouts are late


def _rollouts(account: Account) -> Bottleneck:
    late = f"The trainer waited {account.share('wait_s'):.0%} of the time for rollouts: "
    for look in (_no_data, _wasted, _evaluating, _uneven, _saturated, _held):
        if found := look(account, late):
            return found
    raise AssertionError("something always holds rollouts back")


def _no_data(account: Account, late: str) -> Bottleneck | None:
    if account.sum("wait_data_s") < HALF * account.sum("wait_s"):
        return None
    return Bottleneck(
        "data",
        f"{late}nothing was left to begin, and the last ones were waited for.",
        "A longer run (data.epochs, more rows, max_steps) spends a smaller part of its time on its end.",
    )


def _wasted(account: Account, late: str) -> Bottleneck | None:
    """Most of the rollouts taught nothing."""
    retried, finished = account.sum("members_retried"), account.sum("rollouts_finished")
    if retried > HALF * (retried + finished):
        return Bottleneck(
            "failures",
            f"{late}{retried:,.0f} of {retried + finished:,.0f} attempts failed and were made again.",
            "The log has their errors; a rollout that needs longer than rollout.timeout_s fails each time.",
        )
    filtered, trained = account.sum("groups_filtered"), account.sum("groups_trained")
    if filtered > HALF * (filtered + trained):
        return Bottleneck(
            "filter",
            f"{late}{filtered:,.0f} of {filtered + trained:,.0f} groups had equal rewards and were thrown away.",
            "Use prompts that the model solves sometimes, a finer reward, or a larger completions_per_prompt.",
        )
    return None


def _evaluating(account: Account, late: str) -> Bottleneck | None:
    """An evaluation has slots, or room in the sampler, that training needs."""
    evaluating, training = account.mean("eval_in_flight"), account.share("rollout_s")
    share = evaluating / (evaluating + training) if evaluating else 0.0
    if share < EVALUATING or not (_queues(account) or _by_slots(account)):
        return None
    return Bottleneck(
        "evaluation",
        f"{late}{share:.0%} of the rollouts under way were those of evaluations.",
        "Raise evaluation.interval, or lower evaluation.concurrency or evaluation.samples.",
    )


def _uneven(account: Account, late: str) -> Bottleneck | None:
    up, most, spread = account.mean("replicas_up"), account.most("replicas_up"), account.mean("replica_spread")
    if up and up < (1 - EVALUATING) * most:
        return Bottleneck(
            "replicas",
            f"{late}{up:.1f} of {most:.0f} vLLM replicas were up on the mean.",
            "The log says why they were lost.",
        )
    number, share = account.busiest_replica()
    if spread < UNEVEN or share < MOSTLY:
        return None
    return Bottleneck(
        "replicas",
        f"{late}replica {number} had {spread:.1f} times the requests of the mean one, and the others had room.",
        "It is slower than they are: look at its log, its GPU, and what else runs there.",
    )


def _saturated(account: Account, late: str) -> Bottleneck | None:
    waiting, running, kv = (account.mean(name) for name in ("sampler_waiting", "sampler_running", "kv_use"))
    if not _queues(account) and not (_by_slots(account) and account.mean("window_congested") > HALF):
        return None
    if kv > KV_FULL:
        said = f"the sampler's KV cache was {kv:.0%} full."
    elif waiting >= 1:
        said = f"the sampler was full, with {running:,.0f} requests running and {waiting:,.0f} waiting."
    else:
        said = f"a window of {account.mean('window'):,.0f} rollouts is what the sampler bears."
    if account.knows("replicas_up"):
        advice = "Add sampler.replicas, give it more memory (sampler.gpu_memory_utilization), or lower"
    else:
        advice = "Raise sampler.max_running, if the device has room, or lower"
    return Bottleneck("sampler", late + said, f"{advice} sampling.max_tokens.")


def _held(account: Account, late: str) -> Bottleneck | None:
    outside = 1 - account.sum("model_s") / account.sum("rollout_s") if account.sum("rollout_s") else 0.0
    wanted = 1 / max(1 - account.share("wait_s"), 0.01)
    slow = f" {outside:.0%} of a rollout's time was outside of the model (tools, rewards)." if outside > HALF else ""
    if _by_slots(account):
        window = account.mean("window")
        return Bottleneck(
            "slots",
            f"{late}all {window:,.0f} slots were taken, and the sampler had room.{slow}",
            "Raise concurrency.max_window.",
        )
    bound = account.most("staleness_max")
    needed = math.ceil((bound + 1) * wanted) - 1
    if slow and needed > MOST_STALENESS:
        return Bottleneck("tools", f"{late}{slow.strip()}", "Make the tools faster.")
    return Bottleneck(
        "staleness",
        f"{late}the staleness budget was used up while rollouts were running.{slow}",
        "Raise staleness.max_staleness.",
    )


def _by_slots(account: Account) -> bool:
    return account.sum("wait_slots_s") >= account.sum("wait_budget_s")


def _queues(account: Account) -> bool:
    waiting, running = account.mean("sampler_waiting"), account.mean("sampler_running")
    return waiting > QUEUED * running or account.mean("kv_use") > KV_FULL
