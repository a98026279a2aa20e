from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from asyncrl.storage.rollouts import RolloutLog, describe
from asyncrl.types import Group, RolloutRun, RolloutSample


def decode(tokens: list[int]) -> str:
    return "".join(chr(token) for token in tokens)


def group(row: int = 5) -> Group:
    tokens = [ord(letter) for letter in "2+2=4!ok"]
    sample = RolloutSample(
        tokens=tokens,
        logprobs=[-9.0, -9.0, -9.0, -9.0, -0.1, -0.1, -9.0, -0.4],
        loss_mask=[0, 0, 0, 0, 1, 1, 0, 1],
        reward=1.0,
        versions=[0, 0, 0, 0, 3, 3, 0, 4],
        info={"messages": [{"role": "user", "content": "2+2="}], "score": float("nan")},
    )
    plain = RolloutSample(tokens=tokens[:5], logprobs=[0.0] * 5, loss_mask=[0, 0, 0, 0, 1], reward=0.0)
    return Group(
        sequence=9,
        row=row,
        epoch=1,
        version=3,
        runs=[RolloutRun([sample]), RolloutRun([plain])],
        advantages=[1.0, -1.0],
        admitted_at=10.0,
        finished_at=12.5,
    )


def test_a_group_reads_like_a_conversation() -> None:
    said = describe(4, group(), decode)
    assert {"step": 4, "row": 5, "epoch": 1, "group": 9, "version": 3, "seconds": 2.5}.items() <= said.items()
    assert (said["rewards"], said["advantages"]) == ([1.0, 0.0], [1.0, -1.0])
    first, second = (rollout["samples"][0] for rollout in said["rollouts"])
    assert [(stretch["kind"], stretch["text"]) for stretch in first["text"]] == [
        ("context", "2+2="), ("policy", "4!"), ("context", "o"), ("policy", "k"),
    ]  # fmt: skip
    assert (first["tokens"], first["loss_tokens"], first["versions"]) == (8, 3, [3, 4])
    assert first["info"]["messages"][0]["role"] == "user"
    assert (first["logprob_mean"], first["logprob_min"]) == (-0.2, -0.4)  # of -0.1, -0.1 and -0.4; context is left out
    assert second == {
        "tokens": 5,
        "loss_tokens": 1,
        "versions": [],
        "text": [
            {"kind": "context", "text": "2+2="},
            {"kind": "policy", "text": "4", "tokens": 1, "versions": [], "logprob_mean": 0.0},
        ],
        "logprob_mean": 0.0,
        "logprob_min": 0.0,
    }


def test_some_groups_of_each_step_are_written_off_the_calling_thread(tmp_path: Path) -> None:
    threads = set()

    def watched(tokens: list[int]) -> str:
        threads.add(threading.current_thread())
        return decode(tokens)

    log = RolloutLog(tmp_path / "rollouts.jsonl", watched, groups_per_step=2)
    log.write(1, [group(row) for row in range(3)])
    log.write(2, [group(7)])
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "rollouts.jsonl").read_text().splitlines()]
    assert [(line["step"], line["row"]) for line in lines] == [(1, 0), (1, 1), (2, 7)]
    assert lines[0]["rollouts"][0]["samples"][0]["info"]["score"] is None
    assert len(threads) == 1
    assert threading.current_thread() not in threads


def test_nothing_is_written_when_it_is_switched_off(tmp_path: Path) -> None:
    log = RolloutLog(tmp_path / "rollouts.jsonl", decode, groups_per_step=0)
    log.write(1, [group()])
    log.close()
    assert (tmp_path / "rollouts.jsonl").read_text() == ""


def test_a_decoder_that_raises_is_not_swallowed(tmp_path: Path) -> None:
    def broken(tokens: list[int]) -> str:
        raise OverflowError("token 999 is not in the vocabulary")

    log = RolloutLog(tmp_path / "rollouts.jsonl", broken, groups_per_step=1)
    log.write(1, [group()])
    with pytest.raises(OverflowError, match="token 999"):
        log.close()
