"""The rollout log: what the policy said, in words, for some groups of each step.

Decoding thousands of tokens takes longer than the event loop may stand still, so one worker thread
decodes and writes; `write` only hands the groups over.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import compress, groupby
from pathlib import Path
from typing import Any

from asyncrl.metrics.jsonl import JsonlFile
from asyncrl.types import Group, RolloutSample

Decode = Callable[[list[int]], str]
"""Token ids to text, special tokens included. Called from the log's thread: give it a tokenizer that no
other thread uses."""


class RolloutLog:
    """Writes `rollouts.jsonl`: one line per group.

    Owns the file and the thread. A write that fails (a full disk, a decoder that raises) is raised by the
    next `write`, or by `close`.
    """

    def __init__(self, path: Path, decode: Decode, groups_per_step: int) -> None:
        self._file = JsonlFile(path)
        self._decode = decode
        self._groups_per_step = groups_per_step
        self._thread = ThreadPoolExecutor(1, "rollout-log")
        self._writes: list[Future[None]] = []

    def write(self, step: int, groups: Sequence[Group]) -> None:
        """Take the first groups of optimizer step `step`. They must not change any more."""
        chosen = list(groups[: self._groups_per_step])
        for done in [write for write in self._writes if write.done()]:
            self._writes.remove(done)
            done.result()
        if chosen:
            self._writes.append(self._thread.submit(self._write, step, chosen))

    def close(self) -> None:
        """Wait until all is written."""
        self._thread.shutdown()
        self._file.close()
        for write in self._writes:
            write.result()

    def _write(self, step: int, groups: list[Group]) -> None:
        for group in groups:
            self._file.write(describe(step, group, self._decode))


def describe(step: int, group: Group, decode: Decode) -> dict[str, Any]:
    """One group as the log shows it."""
    seconds_of_runs: Sequence[float | None] = group.seconds or [None] * len(group.runs)
    return {
        "step": step,
        "row": group.row,
        "epoch": group.epoch,
        "group": group.sequence,
        "version": group.version,
        "rewards": group.rewards,
        "advantages": group.advantages,
        "seconds": round(group.finished_at - group.admitted_at, 3),
        "rollouts": [
            {
                "reward": run.reward,
                "advantage": advantage,
                "seconds": round(seconds, 3) if seconds is not None else None,
                "samples": [_describe_sample(sample, decode) for sample in run.segments],
            }
            for run, advantage, seconds in zip(group.runs, group.advantages, seconds_of_runs, strict=True)
        ],
    }


def _describe_sample(sample: RolloutSample, decode: Decode) -> dict[str, Any]:
    trained = sum(map(bool, sample.loss_mask))
    versions = sample.versions or []
    drawn_by = {version for version, mask in zip(versions, sample.loss_mask, strict=False) if mask}
    described: dict[str, Any] = {
        "tokens": len(sample.tokens),
        "loss_tokens": trained,
        "versions": sorted(drawn_by),
        "text": _stretches(sample, decode),
    }
    if trained:
        logprobs = list(compress(sample.logprobs, sample.loss_mask))
        described |= {"logprob_mean": round(sum(logprobs) / trained, 4), "logprob_min": round(min(logprobs), 4)}
    if sample.advantages is not None:
        described["advantage_mean"] = sum(compress(sample.advantages, sample.loss_mask)) / trained
    if sample.turn_rewards is not None:
        described["turn_rewards"] = list(sample.turn_rewards)
    return described | ({"info": dict(sample.info)} if sample.info else {})


def _stretches(sample: RolloutSample, decode: Decode) -> list[dict[str, Any]]:
    """The text cut where the mask changes: `policy` is what is trained, `context` is everything else."""
    stretches: list[dict[str, Any]] = []
    versions = sample.versions or [0] * len(sample.tokens)
    columns = zip(sample.loss_mask, sample.tokens, sample.logprobs, versions, strict=True)
    for trained, rows in groupby(columns, key=lambda row: bool(row[0])):
        _, tokens, logprobs, drawn_by = zip(*rows, strict=True)
        stretch: dict[str, Any] = {"kind": "policy" if trained else "context", "text": decode(list(tokens))}
        if trained:
            stretch |= {
                "tokens": len(tokens),
                "versions": sorted(set(drawn_by)) if sample.versions else [],
                "logprob_mean": round(sum(logprobs) / len(logprobs), 4),
            }
        stretches.append(stretch)
    return stretches
