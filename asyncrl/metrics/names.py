"""Every metric of a step record: its name, unit and meaning, as one table.

`docs/metrics.md` is made from this table (`python -m asyncrl.cli.docs`), so the two cannot differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Part = Literal["progress", "reward", "groups", "staleness", "speed", "time", "scheduler", "objective", "evaluation"]

StepRecord = Mapping[str, float | int | str]
"""One optimizer step: metric name -> value. Flat, so that every tracker can take it."""


@dataclass(frozen=True, slots=True)
class Metric:
    """One column of `metrics.jsonl`."""

    name: str
    part: Part
    unit: str
    """`1` for a plain number or a share."""
    meaning: str


PARTS: dict[Part, str] = {
    "progress": "Where the run is.",
    "reward": "What the rollouts earned.",
    "groups": "What became of the groups and their members since the step before. A group is the "
    "`completions_per_prompt` rollouts of one prompt.",
    "staleness": "How old the weights were that drew the tokens of this step: optimizer steps taken before "
    "this one, minus the version that drew the token.",
    "speed": "Work done since the step before.",
    "time": "Where the trainer's time went. `wait_s`, `train_s` and `publish_wait_s` do not overlap and "
    "add up to nearly `step_s`.",
    "scheduler": "Who is busy, read when the step ended. `asyncrl train` shows these live.",
    "objective": "From the trainer, over the loss tokens of the whole optimizer batch. "
    "The formulas are in docs/objectives.md.",
    "evaluation": "One record per evaluation, in `evaluations.jsonl` and in the trackers, where `eval_version` is the "
    "axis: an evaluation ends some steps after the version that it measures. The numbers of an evaluation function are "
    "named `eval_<name>`. More in docs/evaluation.md.",
}

HELD = {
    "slots": "the concurrency window was full, and held rollouts back",
    "budget": "the staleness budget was used up, and held rollouts back",
    "unpublished": "groups that were trained kept their places in the staleness budget, because their weights were not "
    "live yet",
    "data": "nothing was left to begin",
}
"""What can hold rollouts back (rollout/held.py)."""

# fmt: off
METRICS: tuple[Metric, ...] = (
    Metric("step", "progress", "steps", "Optimizer steps taken, with this one: the version of the weights it made."),
    Metric("published", "progress", "steps", "The version that is live in the sampler."),
    Metric("time_s", "progress", "s", "Since the run began."),
    Metric("reward_mean", "reward", "1", "Before filtering: over every rollout of the groups that finished."),
    Metric("reward_trained_mean", "reward", "1", "After filtering: over the rollouts that were trained."),
    Metric("turn_reward_mean", "reward", "1", "Over the trained turns that have a reward of their own."),
    Metric("groups_trained", "groups", "groups", "In this step's batch."),
    Metric("groups_filtered", "groups", "groups", "All rewards equal: no signal, not trained."),
    Metric("groups_rejected", "groups", "groups", "Fewer than `rollout.min_group_size` members survived."),
    Metric("members_failed", "groups", "rollouts", "Rollouts that failed for good: their retries were used up."),
    Metric("members_retried", "groups", "rollouts", "Rollouts that failed recoverably and were drawn again."),
    Metric("members_dropped", "groups", "rollouts", "Rollouts for which the rollout function returned None."),
    Metric("forks", "groups", "turns", "Turns that parted from a history others go on from; causes are in the log."),
    Metric("dropped_turns", "groups", "turns", "Turns that were drawn and given up: `on_limit`, a lost connection."),
    Metric("realigned_tokens", "groups", "tokens", "Drawn tokens that `chat.realign_tokens` gave up."),
    Metric("rollouts_finished", "groups", "rollouts", "Rollouts that came back with a reward, trained or not."),
    Metric("samples", "groups", "samples", "Token sequences trained. A rollout whose history branched has several."),
    Metric("staleness_mean", "staleness", "steps", "Mean over the loss tokens."),
    Metric("staleness_max", "staleness", "steps", "Oldest loss token. Never above `staleness.max_staleness` under "
           "`wait`."),
    Metric("staleness_min", "staleness", "steps", "Youngest loss token."),
    *(Metric(f"staleness_share_{end}", "staleness", "1", f"Share of the loss tokens with a staleness of {what}.")
      for end, what in (("0", "0"), ("1", "1"), ("2", "2"), ("4", "3 to 4"), ("8", "5 to 8"), ("16", "9 to 16"),
                        ("more", "more than 16"))),
    Metric("stale_masked_tokens", "staleness", "tokens", 'Taken out of the loss by `on_stale = "mask"`.'),
    Metric("stale_requeued", "staleness", "groups", 'Rolled out again by `on_stale = "requeue"`.'),
    Metric("stale_dropped", "staleness", "groups", 'Thrown away by `on_stale = "drop"`.'),
    Metric("tokens_generated", "speed", "tokens", "Drawn by the sampler."),
    Metric("train_tokens", "speed", "tokens", "In the sequences that were trained, prompts and tool answers included."),
    Metric("row_tokens", "speed", "tokens", "That the model computed: of `train_tokens` those that sequences share "
           "once, and none after the last prediction."),
    Metric("shared_tokens", "speed", "tokens", "That were not computed again, because another sequence of the group "
           "had brought them."),
    Metric("loss_tokens", "speed", "tokens", "Those of `train_tokens` that carry loss."),
    Metric("sequences", "speed", "samples", "That went through the trainer."),
    Metric("microbatches", "speed", "microbatches", "Forward and backward passes of the step."),
    Metric("tokens_per_s", "speed", "tokens/s", "`tokens_generated` over `step_s`."),
    Metric("samples_per_s", "speed", "samples/s", "`samples` over `step_s`."),
    Metric("wait_s", "time", "s", "The trainer had no batch: it waited for rollouts."),
    *(Metric(f"wait_{reason}_s", "time", "s", f"The part of `wait_s` in which {why}.") for reason, why in HELD.items()),
    Metric("wait_straggler_s", "time", "s", "The part of `wait_s` in which finished groups were ready and might not "
           "pass an unfinished one, whose deadline was near: the price of a hard bound."),
    *(Metric(f"held_{reason}_s", "time", "s", f"How long {why}, while the trainer waited or not.")
      for reason, why in HELD.items()),
    Metric("rollout_s", "time", "s", "Rollout attempts that ended in this step: seconds, summed over all of them."),
    Metric("model_s", "time", "s", "The part of `rollout_s` in calls of the model; the rest: tools, your own code."),
    Metric("train_s", "time", "s", "Forward, backward and the optimizer step."),
    Metric("forward_s", "time", "s", "The part of `train_s` in forward passes."),
    Metric("reference_s", "time", "s", "The part of `forward_s` in the reference model."),
    Metric("backward_s", "time", "s", "The part of `train_s` in backward passes."),
    Metric("optimizer_s", "time", "s", "The part of `train_s` in the optimizer step."),
    Metric("publish_s", "time", "s", "The last finished hot-load, from the optimizer step to live in the sampler. It "
           "overlaps with the next step's training."),
    Metric("publish_wait_s", "time", "s", "The part of publishing that training had to wait for."),
    Metric("checkpoint_s", "time", "s", "How long training stood still for the checkpoint of the step before; the disk "
           "is written beside training."),
    Metric("step_s", "time", "s", "From the end of the step before to the end of this one."),
    Metric("loop_lag_s", "time", "s", "Largest delay of the event loop. Above 0.2 something blocks it, and every "
           "rollout waits: see `asyncrl.offload` in docs/rollouts.md."),
    Metric("eval_in_flight", "scheduler", "rollouts", "Rollouts of an evaluation that hold slots of the window; mean "
           "over the step."),
    Metric("replica_spread", "scheduler", "1", "Requests of the busiest vLLM replica over the mean of those that "
           "serve; mean over the step."),
    Metric("in_flight", "scheduler", "rollouts", "Rollouts that are running."),
    Metric("in_flight_peak", "scheduler", "rollouts", "Most rollouts at once since the step before."),
    Metric("queue_groups", "scheduler", "groups", "Finished groups that wait to be trained."),
    Metric("budget_free", "scheduler", "groups", "Groups that the staleness budget would still admit. 0: more "
           "concurrency would not help, a larger `staleness.max_staleness` would."),
    Metric("window", "scheduler", "rollouts", "Rollouts that may run at once, set by the concurrency controller."),
    Metric("window_changes", "scheduler", "changes", "How often the controller moved the window in this step."),
    Metric("sampler_running", "scheduler", "requests", "Requests that the sampler decodes."),
    Metric("sampler_waiting", "scheduler", "requests", "Requests that wait for room in the sampler."),
    Metric("replicas_up", "scheduler", "servers", "vLLM replicas that serve; there only where vLLM samples. Fewer than "
           "`sampler.replicas`: one is coming back, and the log says why."),
    Metric("replicas_lost", "scheduler", "servers", "How often a vLLM replica was lost in the life of the process."),
    Metric("kv_use", "scheduler", "1", "Share of the sampler's KV cache in use, where it can say."),
    Metric("loss", "objective", "1", "What was minimised, after the reduction that `loss.normalization` names."),
    Metric("grad_norm", "objective", "1", "Global gradient norm before clipping."),
    Metric("learning_rate", "objective", "1", "Of this step."),
    Metric("ppo_kl", "objective", "nats", "Mean k3 between the policy and the anchor. About 0 with one optimizer step "
           "per batch: that is correct, not a fault."),
    Metric("ref_kld", "objective", "nats", "Mean k3 between the policy and the reference model. Starts near 0 and "
           "grows as the policy drifts: the one to watch. Absent when `loss.kl_beta` is 0."),
    Metric("behavior_kl", "objective", "nats", "Mean k3 between the anchor and the sampler's log-probs: staleness, and "
           "any mismatch between sampler and trainer."),
    Metric("clip_frac_low", "objective", "1", "Share of loss tokens clipped below 1 - `loss.eps_low`."),
    Metric("clip_frac_high", "objective", "1", "Share of loss tokens clipped above 1 + `loss.eps_high`."),
    Metric("ratio_mean", "objective", "1", "Mean ratio of the policy to the anchor."),
    Metric("tis_weight_mean", "objective", "1", "Mean importance weight, after the cap."),
    Metric("tis_clip_frac", "objective", "1", "Share of loss tokens whose importance weight was capped."),
    Metric("entropy", "objective", "nats", "Mean entropy of the policy at the loss tokens. A fall to 0 means that "
           "exploration has ended."),
    Metric("ess", "objective", "1", "Effective sample size of the importance weights, as a share: 1 is on-policy, near "
           "0 means that a few tokens carry the step."),
    Metric("pack_efficiency", "objective", "1", "Share of the packed micro-batches that is tokens and not padding."),
    Metric("canary_diff", "objective", "nats", "Largest log-prob difference between sampler and trainer on the fixed "
           "probe, after the last hot-load."),
    Metric("eval_version", "evaluation", "steps", "The version that was measured."),
    Metric("eval_version_newest", "evaluation", "steps", "As `eval_version`; larger where the sampler has one version "
           "at a time (full weights in vLLM) and newer weights drew a part of it."),
    Metric("eval_reward", "evaluation", "1", "Mean over the held-out rows of the mean over a row's rollouts."),
    Metric("eval_reward_low", "evaluation", "1", "Lower end of its 95 % interval, over rows."),
    Metric("eval_reward_high", "evaluation", "1", "Upper end."),
    Metric("eval_pass_at_k", "evaluation", "1", "k = 1, 2, 4, ... up to `evaluation.samples`, from 2 on: how likely "
           "one of k rollouts of a row has a reward of at least 1."),
    Metric("eval_rollouts", "evaluation", "rollouts", "Rollouts that gave a reward."),
    Metric("eval_failed", "evaluation", "rollouts", "Rollouts that gave none; they count in no mean."),
    Metric("eval_s", "evaluation", "s", "How long it took."),
)
# fmt: on

METRIC_BY_NAME: dict[str, Metric] = {metric.name: metric for metric in METRICS}


def metrics_page() -> str:
    """The text of `docs/metrics.md`."""
    lines = [
        "# Metrics",
        "",
        "One record per optimizer step goes to `metrics.jsonl` in the run folder, and to the trackers of `trackers`.",
        "Counts are those since the step before. A value that is not a number is `null`; a metric that has no meaning",
        "in a run is left out.",
        "",
        "<!-- Made by `python -m asyncrl.cli.docs` from asyncrl/metrics/names.py: change it there. -->",
    ]
    for part, about in PARTS.items():
        lines += ["", f"## {part.capitalize()}", "", about, "", "| name | unit | meaning |", "|---|---|---|"]
        lines += [f"| `{m.name}` | {m.unit} | {m.meaning} |" for m in METRICS if m.part == part]
    return "\n".join(lines) + "\n"
