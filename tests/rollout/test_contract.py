from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncrl.errors import RolloutContractError
from asyncrl.rollout.contract import Contract
from asyncrl.types import RolloutRun, RolloutSample

GOOD: dict[str, Any] = {
    "tokens": [5, 6, 7],
    "logprobs": [0.0, -0.5, -1.0],
    "loss_mask": [0, 1, 1],
    "reward": 1.0,
    "versions": [0, 3, 4],
}


def check(**changes: Any) -> RolloutRun:
    return Contract(vocabulary=10, max_tokens=8).check(RolloutSample(**(GOOD | changes)), oldest=3, newest=4)


def test_a_good_sample_comes_out_in_plain_lists() -> None:
    np = pytest.importorskip("numpy")
    run = check(
        tokens=np.array([5, 6, 7]), logprobs=np.array([0, -0.5, -1]), loss_mask=[False, True, True], reward=True
    )
    sample = run.segments[0]
    assert (sample.tokens, sample.logprobs, sample.loss_mask) == ([5, 6, 7], [0.0, -0.5, -1.0], [0, 1, 1])
    assert (run.reward, type(run.reward)) == (1.0, float)


def test_versions_that_are_left_out_are_taken_to_be_the_oldest() -> None:
    assert check(versions=None).segments[0].versions == [3, 3, 3]


def test_what_is_masked_may_hold_anything() -> None:
    assert check(logprobs=[float("nan"), -0.5, -1.0], versions=[99, 3, 4]).reward == 1.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": []}, "no tokens"),
        ({"tokens": [5, 6]}, "logprobs has 3 entries, but tokens has 2"),
        ({"tokens": [5, 6, 10]}, r"tokens\[2\] is 10. Expected token ids of the model: 0 to 9"),
        ({"tokens": [5, -1, 7]}, r"tokens\[1\] is -1"),
        ({"tokens": [5, 6.5, 7]}, "Expected a sequence of integers"),
        ({"tokens": "abc"}, "Expected a sequence of integers"),
        ({"tokens": None}, "Expected a sequence of integers"),
        (
            {"tokens": [1] * 9, "logprobs": [0.0] * 9, "loss_mask": [0, *[1] * 8]},
            "tokens has 9 entries, more than the 8 that are trained at most",
        ),
        ({"logprobs": [0.0, float("nan"), -1.0]}, r"logprobs\[1\] is nan"),
        ({"logprobs": [0.0, -0.5, float("-inf")]}, r"logprobs\[2\] is -inf"),
        ({"logprobs": [0.0, -0.5, 0.7]}, r"logprobs\[2\] is 0.7"),
        ({"logprobs": [0.0, "x", 0.7]}, "Expected a sequence of numbers"),
        ({"loss_mask": [0, 0, 0]}, "nothing to train"),
        ({"loss_mask": [1, 1, 1]}, r"loss_mask\[0\] is 1"),
        ({"loss_mask": [0, 2, 1]}, r"loss_mask\[1\] is 2"),
        ({"reward": float("inf")}, "the reward is inf"),
        ({"reward": "good"}, "Expected a number"),
        ({"reward": None}, "Expected a number"),
        ({"versions": [0, 2, 4]}, "are 2 to 4, but this rollout ran while 3 to 4 were live"),
        ({"versions": [0, 3, 5]}, "are 3 to 5"),
        ({"versions": [3]}, "versions has 1 entries"),
    ],
)
def test_each_violation_has_its_own_message(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RolloutContractError, match=message):
        check(**changes)


@pytest.mark.parametrize("result", [1, "sample", {"tokens": []}, [RolloutSample(**GOOD)]])
def test_other_types_are_refused(result: object) -> None:
    with pytest.raises(RolloutContractError, match="Expected a RolloutSample, a RolloutRun, or None"):
        Contract().check(result, oldest=0, newest=9)


def test_a_run_has_segments_and_one_reward() -> None:
    good, other = RolloutSample(**GOOD), RolloutSample(**(GOOD | {"reward": 0.0}))
    assert len(Contract().check(RolloutRun([good, good]), oldest=0, newest=9).segments) == 2
    with pytest.raises(RolloutContractError, match="without segments"):
        Contract().check(RolloutRun([]), oldest=0, newest=9)
    with pytest.raises(RolloutContractError, match=r"rewards \[1.0, 0.0\]"):
        Contract().check(RolloutRun([good, other]), oldest=0, newest=9)


junk = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=3),
    st.lists(st.one_of(st.integers(-3, 20), st.floats(), st.none(), st.text(max_size=2)), max_size=5),
)


@settings(max_examples=500)
@given(junk, junk, junk, junk, junk)
def test_whatever_is_returned_is_a_good_sample_or_a_message(
    tokens: Any, logprobs: Any, mask: Any, reward: Any, versions: Any
) -> None:
    message = ""
    try:
        run = Contract(10, 8).check(RolloutSample(tokens, logprobs, mask, reward, versions), oldest=0, newest=4)
    except RolloutContractError as error:
        message = str(error)
    if message:
        assert any(word in message for word in ("Expected", "Return None", "Raise", "Take")), message
        return
    sample = run.segments[0]
    assert len(sample.tokens) == len(sample.logprobs) == len(sample.loss_mask) > sum(sample.loss_mask) > 0
