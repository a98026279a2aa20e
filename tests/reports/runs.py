"""Run folders for tests, written by what writes them in a run."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

from asyncrl.config import Config, StalenessConfig
from asyncrl.metrics.jsonl import JsonlFile
from asyncrl.storage.folder import RunFolder
from asyncrl.storage.ledger import Ledger
from asyncrl.storage.ledger_file import LedgerStore
from asyncrl.storage.rollouts import RolloutLog
from asyncrl.storage.timeline import DONE, TIMED_OUT, Timeline
from asyncrl.types import EvaluatedRun, Group, RolloutRun, RolloutSample

PROMPT, CALL, RESULT = "<|im_start|>user\nWhat is 2+2?<|im_end|>\n", "<tool_call>2+2", "<|im_start|>tool\n4<|im_end|>\n"
GROUPS, MEMBERS = 4, 2


def step_record(step: int, *, level: float = 0.5, **other: float) -> dict[str, float]:
    """As the engine writes it."""
    noise = random.Random(step).uniform(-0.1, 0.1)
    return {
        **{"step": step, "published": step - 1, "time_s": 2.0 * step, "step_s": 2.0, "wait_s": 1.0, "train_s": 0.6},
        **{"publish_wait_s": 0.1, "checkpoint_s": 0.1, "publish_s": 0.3, "wait_slots_s": 0.7, "wait_budget_s": 0.3},
        **{"reward_mean": level + noise, "reward_trained_mean": 0.4, "groups_trained": 4, "groups_filtered": 2},
        **{"groups_rejected": 0, "samples": 8, "samples_per_s": 4.0, "tokens_per_s": 900.0, "tokens_generated": 1800},
        **{"train_tokens": 2400, "loss_tokens": 1500, "staleness_mean": 0.8, "staleness_max": 2, "staleness_min": 0},
        **{"staleness_share_0": 0.5, "staleness_share_1": 0.25, "staleness_share_2": 0.25, "staleness_share_4": 0.0},
        **{"ess": 0.98, "behavior_kl": 0.002, "clip_frac_low": 0.01, "clip_frac_high": 0.02, "tis_clip_frac": 0.001},
        **{"entropy": 1.0 / step, "grad_norm": 0.7, "loss": 0.1, "in_flight": 30, "window": 32, "sampler_running": 20},
        **{"sampler_waiting": 1, "loop_lag_s": 0.002, **other},
    }


def make_run(
    root: Path, *, steps: int = 12, seed: int = 0, staleness: int = 2, says: str = "four", **other: Any
) -> Path:
    """A run of `steps` optimizer steps. `says`: how its rollouts end. `other`: values of every step record.

    Each step has four groups of two; every fourth is filtered, and rollouts of groups that are take twice as long.
    """
    config = Config(
        model="tiny",
        run_dir=root,
        seed=seed,
        max_steps=max(1, steps),
        staleness=StalenessConfig(max_staleness=staleness),
    )
    folder = RunFolder.create(config)
    with JsonlFile(folder.metrics) as metrics:
        for step in range(1, steps + 1):
            metrics.write(step_record(step, **other))
    with JsonlFile(folder.evaluations) as evaluations:
        for version in (0, steps):
            reward = 0.2 + 0.6 * version / max(1, steps)
            low, high = reward - 0.1, reward + 0.1
            evaluations.write(
                {"eval_version": version, "eval_reward": reward, "eval_reward_low": low, "eval_reward_high": high}
            )
    _write_draws(folder, steps)
    _write_rollouts(folder, steps, says)
    folder.write_summary({"steps": steps, "interrupted": False, "worst_staleness": 2})
    return root


def _write_draws(folder: RunFolder, steps: int) -> None:
    store = LedgerStore.open(folder.ledger, resumed_at=None)
    ledger, timeline = Ledger(store), Timeline(folder.root / "timeline")
    timeline.starts(100.0, 100.0)
    chance = random.Random(0)
    for sequence in range(steps * GROUPS):
        key, filtered = (0, sequence), sequence % 4 == 3
        ledger.admit(key, sequence, 0)
        began = 100.0 + sequence / 2
        for member in range(MEMBERS):
            seconds = chance.uniform(0.9, 1.1) * (2.0 if filtered else 1.0)
            tokens, reward = round(100 * seconds), float(member) if not filtered else 1.0
            place = (0, sequence, member)
            if sequence % 10 == 0 and member == 0:  # it is too slow once, and is drawn again
                nothing = (math.nan, 0, 0, 0, 0, 0)
                timeline.attempt([began, began, began + 9.0, *place, 0, sequence, TIMED_OUT, *nothing], [])
            slot, drawn, end = began + 0.1, began + 0.1 + seconds / 2, began + 0.1 + seconds
            came_to = (reward, tokens, tokens // 2, 1, seconds / 2, 0)
            timeline.attempt([began, slot, end, *place, 1, sequence, DONE, *came_to], [slot, drawn, 10, tokens // 2, 0])
        ledger.finished(key, 0, [0.0, 1.0])
        if filtered:
            ledger.filtered(key)
        else:
            ledger.trained(key, sequence // GROUPS + 1)
    timeline.span("publish", "hot-load of 1", 101.0, 102.0)
    timeline.close()
    ledger.close()


def _write_rollouts(folder: RunFolder, steps: int, says: str) -> None:
    log = rollout_log(folder.root)
    for step in range(1, steps + 1):
        log.write(step, [rollout_group(step, says)])
    log.write_evaluated(EvaluatedRun(steps, 0, RolloutRun([rollout_sample(1.0, "measured")]), 1.5))
    log.close()


def rollout_log(root: Path) -> RolloutLog:
    return RolloutLog(root / "rollouts.jsonl", lambda tokens: "".join(map(chr, tokens)), groups_per_step=1)


def rollout_group(step: int, says: str) -> Group:
    runs = [RolloutRun([rollout_sample(reward, f"{says} {step}")]) for reward in (0.0, 1.0)]
    return Group(step, step % 7, 0, max(0, step - 2), runs, [-1.0, 1.0], 1.0, 3.5, [2.0, 2.5])


def rollout_sample(reward: float, answer: str) -> RolloutSample:
    """Prompt, tool call, tool result, answer: one token per letter."""
    parts = [(PROMPT, 0), (CALL, 1), (RESULT, 0), (answer, 1)]
    mask = [trained for text, trained in parts for _ in text]
    call = {"id": "a", "function": {"name": "calculator", "arguments": {"expression": "2+2"}}}
    messages = [{"role": "assistant", "tool_calls": [call]}, {"role": "tool", "tool_call_id": "a", "content": "4"}]
    info = {"finish_reason": "stop", "messages": messages, "tool_seconds": [0.25], "judge": "sure"}
    tokens = [ord(letter) for text, _ in parts for letter in text]
    return RolloutSample(tokens, [-0.5 if trained else 0.0 for trained in mask], mask, reward, [0] * len(mask), info)
