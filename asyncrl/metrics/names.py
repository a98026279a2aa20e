"""Every metric that a run records: its name, its unit, what it means, and what to do when it looks bad. One table.

`docs/metrics.md` is made from it (`python -m asyncrl.cli.docs`), so the two cannot differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

# fmt: off
Part = Literal["progress", "reward", "groups", "staleness", "speed", "time", "scheduler", "objective", "evaluation",
               "rollouts", "supervised"]
# fmt: on

StepRecord = Mapping[str, float | int | str]
"""One optimizer step: metric name -> value. Flat, so that every tracker can take it."""


@dataclass(frozen=True, slots=True)
class Metric:
    """One column of `metrics.jsonl`, `evaluations.jsonl` or `producer.jsonl`."""

    name: str
    part: Part
    unit: str
    """`1` for a plain number or a share."""
    meaning: str
    bad: str = ""
    """What looks bad, and which setting helps. Empty: there is nothing to do about it."""


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
    "rollouts": "The rollout side, whatever the trainer does: a record each time that `prompt_groups_per_step` groups "
    "have ended, at most one a second, in `producer.jsonl` and in the trackers, where `rollouts_ended` is the axis "
    "(TensorBoard: a run of its own, `rollouts`). Means and counts are since the record before. Evaluations are not in "
    "them.",
    "supervised": "What `asyncrl sft`, `dpo` and `orpo` record beside `step`, `time_s`, `step_s` and what the trainer "
    "says above. More in docs/supervised.md.",
}

HELD = {
    "slots": (
        "the concurrency window was full, and held rollouts back",
        "Raise `concurrency.max_window` while `sampler_waiting` is 0 and `kv_use` is below 0.9; beyond, only a faster "
        "sampler helps (`sampler.replicas`).",
    ),
    "budget": (
        "the staleness budget was used up, and held rollouts back",
        "Raise `staleness.max_staleness`, if `ess` allows it; `asyncrl tune` says by how much. More concurrency would "
        "not help.",
    ),
    "unpublished": (
        "groups that were trained kept their places in the staleness budget, because their weights were not live yet",
        "Lower `publish.weight_sync_interval`, or make hot-loads shorter (`publish_s`).",
    ),
    "data": (
        "nothing was left to begin",
        "Only right at the end of the data. A run that ends while the trainer waits was short: raise `data.epochs`.",
    ),
}
"""What can hold rollouts back (rollout/held.py), and what helps."""

# fmt: off
METRICS: tuple[Metric, ...] = (
    Metric("step", "progress", "steps", "Optimizer steps taken, with this one: the version of the weights it made."),
    Metric("published", "progress", "steps", "The version that is live in the sampler.",
           "Behind `step` by more than `publish.weight_sync_interval`: hot-loads do not keep up, see `publish_s`."),
    Metric("time_s", "progress", "s", "Since the run began."),
    Metric("reward_mean", "reward", "1", "Before filtering: over every rollout of the groups that finished.",
           "Flat from the start: there is no signal (`groups_filtered`), or `optimizer.learning_rate` is too low. "
           "Falls after a rise: lower `optimizer.learning_rate` or `staleness.max_staleness`, by what `ess` and "
           "`entropy` say, and read rollouts (`asyncrl inspect`)."),
    Metric("reward_trained_mean", "reward", "1", "After filtering: over the rollouts that were trained.",
           "Far from `reward_mean`: most groups are too easy or too hard to train on, see `groups_filtered`."),
    Metric("turn_reward_mean", "reward", "1", "Over the trained turns that have a reward of their own."),
    Metric("groups_trained", "groups", "groups", "In this step's batch."),
    Metric("groups_filtered", "groups", "groups", "All rewards equal: no signal, not trained.",
           "More than `groups_trained`: most rollouts are paid for in vain. Choose rows that the model solves "
           "sometimes, raise `completions_per_prompt`, or give rewards more than two values."),
    Metric("groups_rejected", "groups", "groups", "Fewer than `rollout.min_group_size` members survived.",
           "Above 0 for long: rollouts fail, see `members_failed`."),
    Metric("members_failed", "groups", "rollouts", "Rollouts that failed for good: their retries were used up.",
           "The log names each cause. Raise `rollout.timeout_s` for what is slow, `rollout.retries` for what passes by "
           "itself."),
    Metric("members_retried", "groups", "rollouts", "Rollouts that failed recoverably and were drawn again.",
           "Many: as `members_failed`; each was paid for twice."),
    Metric("members_dropped", "groups", "rollouts", "Rollouts for which the rollout function returned None.",
           "Many: your function gives up more often than it should."),
    Metric("forks", "groups", "turns", "Turns that parted from a history others go on from; causes are in the log.",
           "Many: a rollout becomes several sequences, and prompts are computed again. `chat.history` says how a "
           "history is kept."),
    Metric("dropped_turns", "groups", "turns", "Turns that were drawn and given up: `on_limit`, a lost connection.",
           "Many: answers do not fit; raise `sampling.max_tokens` or `max_seq_len`."),
    Metric("realigned_tokens", "groups", "tokens", "Drawn tokens that `chat.realign_tokens` gave up."),
    Metric("rollouts_finished", "groups", "rollouts", "Rollouts that ended, trained or not."),
    Metric("samples", "groups", "samples", "Token sequences trained. A rollout whose history branched has several."),
    Metric("staleness_mean", "staleness", "steps", "Mean over the loss tokens.",
           "It is no harm by itself: `ess` and `behavior_kl` say what it costs. Lower `staleness.max_staleness` if "
           "they are bad."),
    Metric("staleness_max", "staleness", "steps", "Oldest loss token. Never above `staleness.max_staleness` under "
           "`wait`.",
           "Far above the bound: `staleness.policy` is `pace`, which keeps the mean alone. Use `wait`, or set "
           "`staleness.on_stale`."),
    Metric("staleness_min", "staleness", "steps", "Youngest loss token.",
           "Always above 0 with a fast sampler: finished groups wait (`queue_groups`)."),
    *(Metric(f"staleness_share_{end}", "staleness", "1", f"Share of the loss tokens with a staleness of {what}.")
      for end, what in (("0", "0"), ("1", "1"), ("2", "2"), ("4", "3 to 4"), ("8", "5 to 8"), ("16", "9 to 16"),
                        ("more", "more than 16"))),
    Metric("staleness_bound", "staleness", "steps", "The bound from this step on, where `staleness.min_staleness` lets "
           "it move.", "It stays low while `wait_budget_s` is large: tokens are too off-policy (`behavior_kl`, `ess`), "
           "as the log says; a lower learning rate bears more staleness. It never rests: narrow the limits."),
    Metric("sync_interval", "staleness", "steps", "From one hot-load to the next, where the bound moves.",
           "Above `publish.weight_sync_interval`: a hot-load takes longer than a step, see `publish_s`."),
    Metric("stale_masked_tokens", "staleness", "tokens", 'Taken out of the loss by `on_stale = "mask"`.',
           "More than a tenth of `loss_tokens`: they were paid for in vain. Raise `staleness.max_staleness`, or use "
           "`wait`."),
    Metric("stale_requeued", "staleness", "groups", 'Rolled out again by `on_stale = "requeue"`.',
           "As `stale_masked_tokens`."),
    Metric("stale_dropped", "staleness", "groups", 'Thrown away by `on_stale = "drop"`.', "As `stale_masked_tokens`."),
    Metric("tokens_generated", "speed", "tokens", "Drawn by the sampler."),
    Metric("train_tokens", "speed", "tokens", "In the sequences that were trained, prompts and tool answers included."),
    Metric("row_tokens", "speed", "tokens", "That the model computed: of `train_tokens` those that sequences share "
           "once, and none after the last prediction."),
    Metric("shared_tokens", "speed", "tokens", "That were not computed again, because another sequence of the group "
           "had brought them.",
           "0 with long prompts: `trainer.share_prompts` is off, or this model cannot share."),
    Metric("loss_tokens", "speed", "tokens", "Those of `train_tokens` that carry loss.",
           "A small part of `train_tokens`: prompts and tool answers are most of the work."),
    Metric("sequences", "speed", "samples", "That went through the trainer."),
    Metric("microbatches", "speed", "microbatches", "Forward and backward passes of the step.",
           "Many: raise `trainer.max_tokens_per_microbatch` as far as memory goes."),
    Metric("tokens_per_s", "speed", "tokens/s", "`tokens_generated` over `step_s`.",
           "Falls while `in_flight` stays: answers grow, or the sampler's cache is full (`kv_use`)."),
    Metric("samples_per_s", "speed", "samples/s", "`samples` over `step_s`."),
    Metric("wait_s", "time", "s", "The trainer had no batch: it waited for rollouts.",
           "A large part of `step_s`: rollouts are what limits the run. The next five say what held them back; if it "
           "was nothing of these, they just take long: a faster sampler, or fewer tokens."),
    *(Metric(f"wait_{reason}_s", "time", "s", f"The part of `wait_s` in which {why}.", help)
      for reason, (why, help) in HELD.items()),
    Metric("wait_straggler_s", "time", "s", "The part of `wait_s` in which finished groups were ready and might not "
           "pass an unfinished one, whose deadline was near: the price of a hard bound.",
           "Lower `rollout.timeout_s`, raise `staleness.max_staleness`, or use `pace` with `staleness.on_stale`."),
    *(Metric(f"held_{reason}_s", "time", "s", f"How long {why}, while the trainer waited or not.",
             f"Harmless while `wait_{reason}_s` is near 0.") for reason, (why, _) in HELD.items()),
    Metric("rollout_s", "time", "s", "Rollout attempts that ended in this step: seconds, summed over all of them."),
    Metric("model_s", "time", "s", "The part of `rollout_s` in calls of the model; the rest: tools, your own code.",
           "A small part: tools bind. More rollouts at once hide them (`concurrency.max_window`); heavy code of your "
           "own belongs into `asyncrl.offload`."),
    Metric("train_s", "time", "s", "Forward, backward and the optimizer step.",
           "Nearly all of `step_s` is where a run should be: the trainer never waits. Only a faster trainer helps then "
           "(a device, `lora.rank`, `trainer.max_tokens_per_microbatch`)."),
    Metric("forward_s", "time", "s", "The part of `train_s` in forward passes."),
    Metric("reference_s", "time", "s", "The part of `forward_s` in the reference model.",
           "`loss.kl_beta = 0` saves it, if the objective may go without a KL."),
    Metric("backward_s", "time", "s", "The part of `train_s` in backward passes.",
           "Three times `forward_s` or more: `trainer.gradient_checkpointing` trades time for memory; switch it off if "
           "memory allows."),
    Metric("optimizer_s", "time", "s", "The part of `train_s` in the optimizer step."),
    Metric("publish_s", "time", "s", "The last finished hot-load, from the optimizer step to live in the sampler. It "
           "overlaps with the next step's training.",
           "Longer than a step: the next hot-load has to wait. Train an adapter (`lora.rank`), or raise "
           "`publish.weight_sync_interval`."),
    Metric("publish_wait_s", "time", "s", "The part of publishing that training had to wait for.",
           "A large part of `step_s`: as `publish_s`."),
    Metric("checkpoint_s", "time", "s", "How long training stood still for the checkpoint of the step before; the disk "
           "is written beside training.",
           "A large part of `step_s`: raise `checkpoint.interval`."),
    Metric("step_s", "time", "s", "From the end of the step before to the end of this one."),
    Metric("loop_lag_s", "time", "s", "Largest delay of the event loop.",
           "Above 0.2: something blocks it, and every rollout waits. The log names the line; see `asyncrl.offload` in "
           "docs/rollouts.md."),
    Metric("loop_blocked_s", "time", "s", "All delays of the event loop together, measured 20 times a second: about "
           "how long it was blocked.",
           "A large part of `step_s`: every rollout and request stood still for so long; as for `loop_lag_s`."),
    Metric("eval_in_flight", "scheduler", "rollouts", "Rollouts of an evaluation that hold slots of the window; mean "
           "over the step.",
           "A large part of `window`: training goes short. Lower `evaluation.concurrency`, or raise "
           "`evaluation.interval`."),
    Metric("replica_spread", "scheduler", "1", "Requests of the busiest vLLM replica over the mean of those that "
           "serve, each by its own mean over the step.",
           "Far above 1, and `replica_busiest` the same in each step: one replica has most of the work while others "
           "idle. It is slow; see its log, and what else runs on its GPU."),
    Metric("replica_busiest", "scheduler", "servers", "Which replica that is, from 1."),
    Metric("in_flight", "scheduler", "rollouts", "Rollouts that are running.",
           "Well below `window`: not concurrency holds them back, see `budget_free`."),
    Metric("in_flight_peak", "scheduler", "rollouts", "Most rollouts at once since the step before."),
    Metric("queue_groups", "scheduler", "groups", "Finished groups that wait to be trained.",
           "Always high: rollouts come faster than they are trained, and only grow old. A lower "
           "`staleness.max_staleness` costs nothing then."),
    Metric("budget_free", "scheduler", "groups", "Groups that the staleness budget would still admit.",
           "0: more concurrency would not help, a larger `staleness.max_staleness` would."),
    Metric("window", "scheduler", "rollouts", "Rollouts that may run at once, set by the concurrency controller.",
           "Stands at `concurrency.max_window` while `wait_slots_s` is large: raise that."),
    Metric("window_changes", "scheduler", "changes", "How often the controller moved the window in this step."),
    Metric("window_congested", "scheduler", "1", "1 once the sampler had more requests than it could serve: the window "
           "is what it bears."),
    Metric("sampler_running", "scheduler", "requests", "Requests that the sampler decodes."),
    Metric("sampler_waiting", "scheduler", "requests", "Requests that wait for room in the sampler.",
           "Above 0 for long: there are more rollouts than it takes. Lower `concurrency.max_window`, raise "
           "`sampler.gpu_memory_utilization`, or add `sampler.replicas`."),
    Metric("sampler_full", "scheduler", "1", "Share of the step in which requests waited for room in the sampler: more "
           "than a twentieth of those that it decoded.",
           "Near 1: the sampler is as fast as it gets, and more concurrency or staleness would gain nothing. Add "
           "`sampler.replicas`, or lower `sampling.max_tokens`."),
    Metric("replicas_up", "scheduler", "servers", "vLLM replicas that serve, on the mean of the step; there only "
           "where vLLM samples.",
           "Fewer than `sampler.replicas`: one is coming back, and the log says why."),
    Metric("replicas_lost", "scheduler", "servers", "How often a vLLM replica was lost in the life of the process.",
           "Grows: the log of the replica in the run folder says what it died of."),
    Metric("kv_use", "scheduler", "1", "Share of the sampler's KV cache in use, where it can say.",
           "Near 1: requests are thrown out and computed again. As `sampler_waiting`."),
    Metric("loss", "objective", "1", "What was minimised, after the reduction that `loss.normalization` names.",
           "Its size says little here: watch the reward."),
    Metric("grad_norm", "objective", "1", "Global gradient norm before clipping.",
           "Jumps by a factor of ten: lower `optimizer.learning_rate` or `optimizer.grad_clip_norm`."),
    Metric("learning_rate", "objective", "1", "Of this step."),
    Metric("ppo_kl", "objective", "nats", "Mean k3 between the policy and the anchor. About 0 with one optimizer step "
           "per batch: that is correct, not a fault.",
           "Above 0.1 with `loss.anchor = \"rollout\"`: the data are too old, lower `staleness.max_staleness`."),
    Metric("ref_kld", "objective", "nats", "Mean k3 between the policy and the reference model. Starts near 0 and "
           "grows as the policy drifts: the one to watch. Absent when `loss.kl_beta` is 0.",
           "Grows while the reward stands: raise `loss.kl_beta`, or lower `optimizer.learning_rate`."),
    Metric("behavior_kl", "objective", "nats", "Mean k3 between the anchor and the sampler's log-probs: staleness, and "
           "any mismatch between sampler and trainer.",
           "Above 0.01 where `staleness_max` is 0: sampler and trainer compute differently, see `canary_diff`. Grows "
           "with staleness: lower `staleness.max_staleness`."),
    Metric("clip_frac_low", "objective", "1", "Share of loss tokens clipped below 1 - `loss.eps_low`.",
           "Above 0.2: those tokens teach nothing. Lower `staleness.max_staleness` or `optimizer.learning_rate`."),
    Metric("clip_frac_high", "objective", "1", "Share of loss tokens clipped above 1 + `loss.eps_high`.",
           "As `clip_frac_low`."),
    Metric("ratio_mean", "objective", "1", "Mean ratio of the policy to the anchor.",
           "Far from 1: as `clip_frac_low`."),
    Metric("tis_weight_mean", "objective", "1", "Mean importance weight, after the cap.",
           "Far from 1: as `ess`."),
    Metric("tis_clip_frac", "objective", "1", "Share of loss tokens whose importance weight was capped.",
           "Above 0.05: as `ess`; a higher `loss.tis_cap` would only let single tokens weigh more."),
    Metric("entropy", "objective", "nats", "Mean entropy of the policy at the loss tokens.",
           "Falls to 0: exploration has ended. Raise `loss.eps_high` or `loss.kl_beta`, lower "
           "`optimizer.learning_rate`, or take harder rows."),
    Metric("ess", "objective", "1", "Effective sample size of the importance weights, as a share: 1 is on-policy.",
           "Below 0.5: a few tokens carry the step. Lower `staleness.max_staleness`, or use an objective that bears "
           "more (`policy_loss = \"gspo\"`)."),
    Metric("pack_efficiency", "objective", "1", "Share of the packed micro-batches that is tokens and not padding.",
           "Below 0.8: raise `trainer.max_tokens_per_microbatch`."),
    Metric("canary_diff", "objective", "nats", "Largest log-prob difference between sampler and trainer on the fixed "
           "probe, after the last hot-load.",
           "Grows from step to step: the sampler does not hold what was trained. Above `publish.canary_tolerance` the "
           "run ends by itself."),
    Metric("eval_version", "evaluation", "steps", "The version that was measured. The axis."),
    Metric("eval_version_newest", "evaluation", "steps", "As `eval_version`; larger where the sampler has one version "
           "at a time (full weights in vLLM) and newer weights drew a part of it."),
    Metric("eval_reward", "evaluation", "1", "Mean over the held-out rows of the mean over a row's rollouts.",
           "Stands or falls while `reward_mean` rises: the training rows are learned by heart, or the reward is "
           "gamed. Read rollouts (`asyncrl inspect`); more rows, fewer `data.epochs`."),
    Metric("eval_reward_low", "evaluation", "1", "Lower end of its 95 % interval, over rows.",
           "Far from `eval_reward`: too few held-out rows to tell one step from the next."),
    Metric("eval_reward_high", "evaluation", "1", "Upper end."),
    Metric("eval_pass_at_k", "evaluation", "1", "k = 1, 2, 4, ... up to `evaluation.samples`, from 2 on: how likely "
           "one of k rollouts of a row has a reward of at least 1.",
           "Falls for a large k while the reward rises: the policy becomes surer, not better; see `entropy`."),
    Metric("eval_rollouts", "evaluation", "rollouts", "Rollouts that gave a reward."),
    Metric("eval_failed", "evaluation", "rollouts", "Rollouts that gave none; they count in no mean.",
           "Above 0: the mean is over what was left; the log names the causes."),
    Metric("eval_s", "evaluation", "s", "How long it took.",
           "Longer than `evaluation.interval` steps: evaluations are left out. Raise `evaluation.concurrency` or that "
           "interval."),
    Metric("rollouts_ended", "rollouts", "rollouts", "Since the run began, whatever became of them. The axis."),
    Metric("rollout_step", "rollouts", "steps", "The optimizer step that was under way."),
    Metric("rollout_time_s", "rollouts", "s", "Since the run began."),
    Metric("rollout_version", "rollouts", "steps", "The version that was live in the sampler."),
    Metric("rollout_reward_mean", "rollouts", "1", "Over the rollouts with a reward.", "As `reward_mean`."),
    Metric("rollout_reward_std", "rollouts", "1", "Their standard deviation.",
           "0: there is nothing to learn from, see `groups_filtered`."),
    Metric("rollout_mean_s", "rollouts", "s", "How long they took, from their slot to their reward; mean."),
    Metric("rollout_p50_s", "rollouts", "s", "Half of them took less."),
    Metric("rollout_p95_s", "rollouts", "s", "All but a twentieth took less.",
           "Many times `rollout_p50_s`: a long tail, which a hard bound waits for. Lower `rollout.timeout_s` or "
           "`sampling.max_tokens`, or raise `staleness.max_staleness`; `asyncrl tune` says what each would bring."),
    Metric("rollout_max_s", "rollouts", "s", "The longest.", "As `rollout_p95_s`."),
    Metric("rollout_queue_s", "rollouts", "s", "From the admission of a group to the slot of a member; mean.",
           "Long against `rollout_mean_s`: there are fewer slots than a group has members; raise "
           "`concurrency.max_window`."),
    Metric("rollout_model_share", "rollouts", "1", "Share of their time in calls of the model; above 1 where calls ran "
           "beside each other.",
           "Low: as `model_s`."),
    Metric("rollout_turns_mean", "rollouts", "turns", "Calls of the model in a rollout; mean."),
    Metric("rollout_turns_max", "rollouts", "turns", "The most."),
    Metric("rollout_tokens_mean", "rollouts", "tokens", "Of all sequences of a rollout, prompts and tool answers "
           "included; mean.",
           "Grows without the reward: the model pads its answers. Lower `sampling.max_tokens`, or reward brevity."),
    Metric("rollout_tokens_max", "rollouts", "tokens", "The most.",
           "Near `max_seq_len`: answers are cut off; raise it."),
    Metric("rollout_loss_tokens_mean", "rollouts", "tokens", "Those that carry loss; mean."),
    Metric("rollout_attempts_dropped", "rollouts", "attempts", "The rollout function returned None.",
           "As `members_dropped`."),
    Metric("rollout_attempts_failed", "rollouts", "attempts", "An error ended them.", "As `members_failed`."),
    Metric("rollout_attempts_timed_out", "rollouts", "attempts", "They took longer than `rollout.timeout_s`.",
           "As `members_failed`."),
    Metric("rollout_lost", "rollouts", "rollouts", "Without a reward, since their retries were used up.",
           "As `members_failed`."),
    Metric("rollout_lag_mean", "rollouts", "steps", "Optimizer steps taken, minus the version that drew a token; mean "
           "over the tokens drawn. What it will be in training is `staleness_mean`.",
           "Near `staleness.max_staleness`: rollouts take as long as the bound allows, so the budget binds."),
    Metric("rollout_rate_per_s", "rollouts", "rollouts/s", "Rollouts that ended.",
           "Falls while `rollout_mean_s` stays: fewer run at once, see `rollout_in_flight`."),
    Metric("rollout_tokens_per_s", "rollouts", "tokens/s", "Drawn by rollouts that ended.", "As `tokens_per_s`."),
    Metric("rollout_groups", "rollouts", "groups", "Ended."),
    Metric("rollout_groups_filtered", "rollouts", "groups", "Those without signal.", "As `groups_filtered`."),
    Metric("rollout_groups_rejected", "rollouts", "groups", "Those of which too few members survived.",
           "As `members_failed`."),
    Metric("rollout_in_flight", "rollouts", "rollouts", "Running, when the record was made.", "As `in_flight`."),
    Metric("rollout_queue_groups", "rollouts", "groups", "Finished, and waiting to be trained, when the record was "
           "made.",
           "As `queue_groups`."),
    Metric("epoch", "supervised", "epochs", "Passes over the data, with this one."),
    Metric("units", "supervised", "rows", "Rows or pairs of the step."),
    Metric("reward_chosen", "supervised", "1", "DPO: beta (policy - reference), summed over the chosen answer. ORPO: "
           "lambda times the mean log-prob of it.",
           "Falls below 0 and on: both answers become unlikely, and only their distance grows. Lower "
           "the learning rate, or add supervised examples first."),
    Metric("reward_rejected", "supervised", "1", "The same of the rejected answer."),
    Metric("reward_margin", "supervised", "1", "Chosen minus rejected."),
    Metric("reward_accuracy", "supervised", "1", "Share of pairs whose chosen answer has the higher reward; a tie is "
           "half.",
           "1 in training and lower on held-out pairs: fewer epochs."),
    Metric("log_odds_ratio", "supervised", "nats", "ORPO: log odds of the chosen answer minus those of the rejected."),
    Metric("nll_chosen", "supervised", "nats", "ORPO: minus the mean log-prob of the chosen answer."),
)
# fmt: on

METRIC_BY_NAME: dict[str, Metric] = {metric.name: metric for metric in METRICS}

_INTRODUCTION = """\
# Metrics

One record per optimizer step goes to `metrics.jsonl` in the run folder, one per evaluation to `evaluations.jsonl`, and
those of the rollout side to `producer.jsonl`; the trackers of `trackers` get them all, each kind with an axis of its
own. Counts are those since the record before. A value that is not a number is `null`; a metric that has no meaning in
a run is left out. A tracker that fails or hangs is left out from then on, with a warning, and the run goes on.

<!-- Made by `python -m asyncrl.cli.docs` from asyncrl/metrics/names.py: change it there. -->"""


def metrics_page() -> str:
    """The text of `docs/metrics.md`."""
    lines = [_INTRODUCTION]
    for part, about in PARTS.items():
        lines += ["", f"## {part.capitalize()}", "", about, ""]
        lines += ["| name | unit | meaning | when it looks bad |", "|---|---|---|---|"]
        lines += [f"| `{m.name}` | {m.unit} | {m.meaning} | {m.bad} |" for m in METRICS if m.part == part]
    return "\n".join(lines) + "\n"
