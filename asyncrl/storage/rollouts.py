"""The rollout log: what the policy said, in words, for some groups of each step.

Decoding thousands of tokens takes longer than the event loop may stand still, so one worker thread
decodes and writes; `write` only hands the groups over.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import compress, groupby
from pathlib import Path
from typing import Any

from asyncrl.metrics.jsonl import JsonlFile
from asyncrl.types import EvaluatedRun, Group, RolloutRun, RolloutSample

MOST_WAITING = 64
"""Steps that may wait for the disk or the decoder; what comes while so many do is left out, for it is but a sample."""

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
        self._submit([partial(describe, step, group, self._decode) for group in chosen])

    def write_evaluated(self, evaluated: EvaluatedRun) -> None:
        """Take a rollout of an evaluation, if it is of one of the first rows: the same rows each time."""
        if evaluated.row < self._groups_per_step:
            self._submit([partial(describe_evaluated, evaluated, self._decode)])

    def close(self) -> None:
        """Wait until all is written."""
        self._thread.shutdown()
        self._file.close()
        for write in self._writes:
            write.result()

    def _submit(self, lines: list[Callable[[], dict[str, Any]]]) -> None:
        for done in [write for write in self._writes if write.done()]:
            self._writes.remove(done)
            done.result()
        if lines and len(self._writes) < MOST_WAITING:
            self._writes.append(self._thread.submit(self._write, lines))

    def _write(self, lines: list[Callable[[], dict[str, Any]]]) -> None:
        for line in lines:
            self._file.write(line())


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
            _describe_run(run, advantage, seconds, decode)
            for run, advantage, seconds in zip(group.runs, group.advantages, seconds_of_runs, strict=True)
        ],
    }


def describe_evaluated(evaluated: EvaluatedRun, decode: Decode) -> dict[str, Any]:
    """A rollout of an evaluation, in the form of a group; `step` is the version that was measured."""
    return {
        "evaluation": True,
        "step": evaluated.version,
        "row": evaluated.row,
        "version": evaluated.version,
        "rewards": [evaluated.run.reward],
        "rollouts": [_describe_run(evaluated.run, None, evaluated.seconds, decode)],
    }


def _describe_run(run: RolloutRun, advantage: float | None, seconds: float | None, decode: Decode) -> dict[str, Any]:
    return {
        "reward": run.reward,
        "advantage": advantage,
        "seconds": round(seconds, 3) if seconds is not None else None,
        "samples": [_describe_sample(sample, decode) for sample in run.segments],
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
