"""Groups as bytes and back: exactly as they were, without pickle. N is the number of tokens of a sample.

What is there once per token goes into columns of numbers (packing.py), everything else into JSON.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from asyncrl.metrics.jsonl import encode
from asyncrl.storage.packing import Array, narrow, pack, unpack
from asyncrl.types import Group, RolloutRun, RolloutSample


def encode_groups(groups: Sequence[Group]) -> bytes:
    """`decode_groups` gives back equal ones; of `info` what JSON can hold, and of all else its `str`.

    Takes about 0.2 µs per token. The interpreter is held for one sample at a time: call it from a thread.
    """
    return pack({}, columns_of(groups))


def decode_groups(data: bytes) -> list[Group]:
    """Their sequences are lists.

    Raises:
        DataError: these are not the bytes that were written.
    """
    _, columns = unpack(data)
    return groups_of(columns)


def columns_of(groups: Iterable[Group]) -> dict[str, Array]:
    """The columns of a frame that holds `groups`."""
    groups = list(groups)
    samples = [sample for group in groups for run in group.runs for sample in run.segments]
    for sample in samples:
        per_token = (sample.logprobs, sample.loss_mask, sample.versions, sample.advantages)
        lengths = {len(sample.tokens), *(len(column) for column in per_token if column is not None)}
        assert len(lengths) == 1, f"a sample with columns of {sorted(lengths)} tokens passed the contract"
    return {
        "groups": _text(json.dumps([_described(group) for group in groups], allow_nan=False)),
        "info": _text("\n".join(encode(dict(sample.info)) for sample in samples)),
        "tokens": _column((sample.tokens for sample in samples), "<i8"),
        "loss_mask": _column((sample.loss_mask for sample in samples), "<i8"),
        "logprobs": _column((sample.logprobs for sample in samples), "<f8"),
        "versions": _column((sample.versions for sample in samples if sample.versions is not None), "<i8"),
        "advantages": _column((sample.advantages for sample in samples if sample.advantages is not None), "<f8"),
    }


def groups_of(columns: Mapping[str, Array]) -> list[Group]:
    """The groups out of the columns of their frame."""
    described = json.loads(_words(columns["groups"]))
    infos = iter(_words(columns["info"]).split("\n"))
    samples = _Samples(columns)
    groups = []
    for facts, runs in described:
        made = [RolloutRun([samples.take(*segment, info=next(infos)) for segment in run]) for run in runs]
        groups.append(Group(runs=made, **facts))
    return groups


class _Samples:
    """Takes one sample after the other off the columns."""

    def __init__(self, columns: Mapping[str, Array]) -> None:
        self._columns = columns
        self._taken = dict.fromkeys(columns, 0)

    def take(
        self,
        length: int,
        reward: float,
        turn_rewards: list[float | None] | None,
        has_versions: bool,
        has_advantages: bool,
        *,
        info: str,
    ) -> RolloutSample:
        return RolloutSample(
            tokens=self._next("tokens", length),
            logprobs=self._next("logprobs", length),
            loss_mask=self._next("loss_mask", length),
            reward=reward,
            versions=self._next("versions", length) if has_versions else None,
            info=json.loads(info),
            advantages=self._next("advantages", length) if has_advantages else None,
            turn_rewards=turn_rewards,
        )

    def _next(self, name: str, length: int) -> list[Any]:
        start = self._taken[name]
        self._taken[name] = start + length
        values: list[Any] = self._columns[name][start : start + length].tolist()
        return values


def _described(group: Group) -> list[Any]:
    facts = {
        "sequence": group.sequence,
        "row": group.row,
        "epoch": group.epoch,
        "version": group.version,
        "advantages": group.advantages,
        "admitted_at": group.admitted_at,
        "finished_at": group.finished_at,
        "seconds": group.seconds,
    }
    return [facts, [[_shape(sample) for sample in run.segments] for run in group.runs]]


def _shape(sample: RolloutSample) -> list[Any]:
    """The arguments of `_Samples.take`."""
    turn_rewards = None if sample.turn_rewards is None else list(sample.turn_rewards)
    return [len(sample.tokens), sample.reward, turn_rewards, sample.versions is not None, sample.advantages is not None]


def _column(values: Iterable[Sequence[Any]], kind: Literal["<i8", "<f8"]) -> Array:
    """All samples in one column; one at a time, since other threads wait for the interpreter meanwhile."""
    parts = [np.fromiter(sequence, kind, len(sequence)) for sequence in values]
    return narrow(np.concatenate([np.empty(0, kind), *parts]))


def _text(text: str) -> Array:
    return np.frombuffer(text.encode("utf-8", "surrogatepass"), "|u1")


def _words(column: Array) -> str:
    return column.tobytes().decode("utf-8", "surrogatepass")
