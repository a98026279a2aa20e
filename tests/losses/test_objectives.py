"""All eight objectives: numbers worked by hand, slow twins in plain Python, identities, and what must never leak."""

from __future__ import annotations

import inspect
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncrl.errors import ConfigError
from asyncrl.losses import POLICY_LOSSES, TIS, LossInputs, clip_of, policy_loss, reduce
from asyncrl.sections import LOSS_SETTING_OWNERS, POLICY_LOSS_NAMES
from tests.losses.cases import make_inputs, random_inputs
from tests.losses.slow import slow_loss

NAMES = sorted(POLICY_LOSSES)
TIS_CASES = [
    None,
    TIS(),
    TIS(cap=1.05),
    TIS(cap=2.0, icepop=1.2),
    TIS(cap=1.1, level="sequence"),
    TIS(mis=(0.95, 1.04)),
]
LOG2 = math.log(2)


def base_settings(name: str) -> dict[str, Any]:
    """What lets an objective run without a reference."""
    return {"kl_beta": 0.0} if name == "grpo" else {}


def takes(name: str, tis: TIS | None) -> bool:
    """`reinforce` has only the correction itself, no filter of it."""
    return name != "reinforce" or tis is None or (tis.level == "token" and tis.icepop is None and tis.mis is None)


PAIRS = [(name, tis) for name in NAMES for tis in TIS_CASES if takes(name, tis)]


def gradient(name: str, inputs: LossInputs, **settings_: Any) -> torch.Tensor:
    logprobs = inputs.logprobs.detach().clone().requires_grad_()
    policy_loss(name, replace(inputs, logprobs=logprobs), **settings_).sum().backward()
    assert logprobs.grad is not None
    return logprobs.grad


# By hand: r = 2 and 0.5, A = 1 and -2, w = 3 and 1.

TWO = {
    "logprobs": [math.log(0.4), math.log(0.2)],
    "old": [math.log(0.2), math.log(0.4)],
    "behavior": [math.log(0.2 / 3), math.log(0.4)],
    "advantages": [1.0, -2.0],
}


@pytest.mark.parametrize(
    ("name", "settings_", "losses", "gradients"),
    [
        # both clipped: at 1.2 above, at 0.8 below
        ("grpo", {"kl_beta": 0.0}, [-1.2 * 3, 0.8 * 2], [0, 0]),
        ("grpo", {"kl_beta": 0.0, "eps_low": 0.6, "eps_high": 1.5}, [-2 * 3, 0.5 * 2], [-6, 1]),
        ("importance_sampling", {}, [-2 * 3, 0.5 * 2], [-6, 1]),
        ("importance_sampling", {"eps_high": 0.5}, [-1.5 * 3, 0.5 * 2], [0, 1]),
        ("importance_sampling", {"eps_low": 0.2}, [-2 * 3, 0.8 * 2], [-6, 0]),
        # pi / mu is 6 and 0.5
        ("reinforce", {}, [-6, 0.5 * 2], [-6, 1]),
        ("reinforce", {"tis": None}, [-math.log(0.4), 2 * math.log(0.2)], [-1, 2]),
        ("dapo", {}, [-1.28 * 3, 0.8 * 2], [0, 0]),
        # a sequence of one token is its own mean
        ("cispo", {}, [-1.28 * 3 * math.log(0.4), 0.8 * 2 * math.log(0.2)], [-1.28 * 3, 0.8 * 2]),
        (
            "dro",
            {"dro_beta": 0.1},
            [-math.log(0.4) * 3 + 0.05 * LOG2**2, math.log(0.2) * 2 + 0.05 * LOG2**2],
            [-3 + 0.1 * LOG2, 2 - 0.1 * LOG2],
        ),
    ],
)
def test_by_hand(name: str, settings_: dict[str, Any], losses: list[float], gradients: list[float]) -> None:
    inputs = make_inputs(**TWO)
    assert policy_loss(name, inputs, **settings_).tolist() == pytest.approx(losses)
    assert gradient(name, inputs, **settings_).tolist() == pytest.approx(gradients, abs=1e-12)


def test_dual_clip_by_hand() -> None:
    """r = 10 with A = -1: PPO's pessimism says 10, the dual clip says at most 3."""
    inputs = make_inputs(logprobs=[math.log(0.5)], old=[math.log(0.05)], advantages=[-1.0])
    assert policy_loss("dapo", inputs).item() == pytest.approx(10.0)
    assert policy_loss("dapo", inputs, dual_clip=3.0).item() == pytest.approx(3.0)
    assert gradient("dapo", inputs, dual_clip=3.0).item() == 0.0


@pytest.mark.parametrize("name", ["gspo", "gspo_token"])
def test_sequence_ratio_by_hand(name: str) -> None:
    """r = 4 and 1 in one sequence: s = 2. Clipped at 1.5 where A > 0, plain where the clip is far away."""
    inputs = make_inputs(logprobs=[math.log(0.4), -1.0], old=[math.log(0.1), -1.0], advantages=[1.0, 1.0])
    assert policy_loss(name, inputs, eps_high=0.5).tolist() == pytest.approx([-1.5, -1.5])
    assert gradient(name, inputs, eps_high=0.5).tolist() == [0, 0]
    assert policy_loss(name, inputs, eps_high=9.0).tolist() == pytest.approx([-2, -2])
    # gspo: each of two losses -s has the gradient -s / 2 at both tokens; gspo_token: -s at its own token
    assert gradient(name, inputs, eps_high=9.0).tolist() == pytest.approx([-2, -2])


def test_token_advantages_are_what_gspo_token_is_for() -> None:
    inputs = make_inputs(logprobs=[math.log(0.4), -1.0], old=[math.log(0.1), -1.0], advantages=[1.0, 3.0])
    assert gradient("gspo_token", inputs, eps_high=9.0).tolist() == pytest.approx([-2, -6])
    assert gradient("gspo", inputs, eps_high=9.0).tolist() == pytest.approx([-4, -4])


# Against the slow twins

lengths = st.lists(st.integers(1, 7), min_size=1, max_size=5)


@st.composite
def objectives(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """An objective and settings that it takes."""
    name = draw(st.sampled_from(NAMES))
    tis = draw(st.sampled_from([tis for tis in TIS_CASES if takes(name, tis)]))
    found: dict[str, Any] = {"tis": tis}
    if name in LOSS_SETTING_OWNERS["eps_low"]:
        found |= {"eps_low": draw(st.floats(0.01, 0.5)), "eps_high": draw(st.floats(0.01, 0.5))}
    if name == "grpo":
        found["kl_beta"] = draw(st.sampled_from([0.0, 0.3]))
    if name == "dapo" and draw(st.booleans()):
        found["dual_clip"] = draw(st.floats(1.01, 4))
    if name == "dro":
        found["dro_beta"] = draw(st.floats(0, 2))
    return name, found


@given(objective=objectives(), seed=st.integers(0, 10**6), lengths=lengths, stretch=st.sampled_from([1.0, 3.0, 200.0]))
@settings(max_examples=300, deadline=None)
def test_equals_the_slow_twin(
    objective: tuple[str, dict[str, Any]], seed: int, lengths: list[int], stretch: float
) -> None:
    """Over random shapes and masks, with log-ratios of a hundred and more, and NaN behind the mask."""
    name, given_settings = objective
    inputs = random_inputs(seed, lengths, stretch=stretch, behind=math.nan)
    fast = policy_loss(name, inputs, **given_settings)
    assert fast.tolist() == pytest.approx(slow_loss(name, inputs, **given_settings), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(("name", "tis"), [pair for pair in PAIRS if pair[0] not in ("cispo", "gspo_token")])
def test_gradcheck(name: str, tis: TIS | None) -> None:
    """Those two have a gradient that is not the derivative of their value, on purpose."""
    inputs = random_inputs(seed=5, lengths=(4, 6, 1))
    extra = {"kl_beta": 0.2} if name == "grpo" else {}

    def loss(logprobs: torch.Tensor) -> torch.Tensor:
        return policy_loss(name, replace(inputs, logprobs=logprobs), tis=tis, **extra)

    assert torch.autograd.gradcheck(loss, (inputs.logprobs.detach().requires_grad_(),))


@given(name=st.sampled_from(["cispo", "gspo_token"]), seed=st.integers(0, 10**6), lengths=lengths)
@settings(max_examples=60, deadline=None)
def test_stopped_gradients(name: str, seed: int, lengths: list[int]) -> None:
    """cispo: value / pi. gspo_token: the value itself where it is not clipped, else 0."""
    inputs = random_inputs(seed, lengths)
    losses = policy_loss(name, inputs, eps_low=0.1, eps_high=0.1)
    free = policy_loss(name, inputs, eps_low=1e9, eps_high=1e9)
    if name == "cispo":
        expected = torch.where(inputs.loss_mask, losses / inputs.logprobs.detach(), 0.0)
    else:
        expected = torch.where(losses == free, losses, 0.0)
    torch.testing.assert_close(gradient(name, inputs, eps_low=0.1, eps_high=0.1), expected.detach())


# Identities

any_inputs = st.builds(random_inputs, st.integers(0, 10**6), lengths)


def equal(first: torch.Tensor, second: torch.Tensor) -> None:
    torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-14)


@given(inputs=any_inputs)
@settings(max_examples=40, deadline=None)
def test_dapo_with_equal_clips_is_grpo_without_kl(inputs: LossInputs) -> None:
    equal(policy_loss("dapo", inputs, eps_high=0.2), policy_loss("grpo", inputs, kl_beta=0.0))


@given(inputs=any_inputs)
@settings(max_examples=40, deadline=None)
def test_grpo_without_clip_is_importance_sampling(inputs: LossInputs) -> None:
    equal(policy_loss("grpo", inputs, kl_beta=0.0, eps_low=1e9), policy_loss("importance_sampling", inputs))


@given(seed=st.integers(0, 10**6), size=st.integers(1, 9))
@settings(max_examples=40, deadline=None)
def test_gspo_of_single_tokens_is_grpo(seed: int, size: int) -> None:
    inputs = random_inputs(seed, [1] * size)
    clips = {"eps_low": 0.1, "eps_high": 0.1}
    for name in ("gspo", "gspo_token"):
        equal(policy_loss(name, inputs, **clips), policy_loss("grpo", inputs, kl_beta=0.0, **clips))
        equal(gradient(name, inputs, **clips), gradient("grpo", inputs, kl_beta=0.0, **clips))


@given(inputs=any_inputs)
@settings(max_examples=40, deadline=None)
def test_gspo_token_with_one_advantage_per_sequence_has_the_gradient_of_gspo(inputs: LossInputs) -> None:
    inputs = replace(inputs, advantages=inputs.advantages[inputs.sequence_ids])
    clips: dict[str, Any] = {"eps_low": 0.05, "eps_high": 0.05}
    for tis in (None, TIS(level="sequence")):  # weights that differ by token are such advantages, too
        equal(gradient("gspo_token", inputs, tis=tis, **clips), gradient("gspo", inputs, tis=tis, **clips))


@given(inputs=any_inputs)
@settings(max_examples=40, deadline=None)
def test_cispo_without_clip_has_the_gradient_of_importance_sampling(inputs: LossInputs) -> None:
    equal(gradient("cispo", inputs, eps_low=1e9, eps_high=1e9), gradient("importance_sampling", inputs))


@given(inputs=any_inputs)
@settings(max_examples=40, deadline=None)
def test_reinforce_is_importance_sampling_anchored_at_the_sampler(inputs: LossInputs) -> None:
    inputs = replace(inputs, old_logprobs=inputs.behavior_logprobs)
    equal(policy_loss("reinforce", inputs), policy_loss("importance_sampling", inputs))


@given(inputs=any_inputs)
@settings(max_examples=40, deadline=None)
def test_dro_without_pull_is_reinforce_without_correction(inputs: LossInputs) -> None:
    equal(policy_loss("dro", inputs, dro_beta=0.0, tis=None), policy_loss("reinforce", inputs, tis=None))


@pytest.mark.parametrize("name", NAMES)
def test_on_policy_gradient_is_that_of_reinforce(name: str) -> None:
    """With pi = old = mu and one advantage per sequence: d loss / d pi = -A for every objective."""
    drawn = random_inputs(seed=2, lengths=(4, 6, 3))
    pi, advantages = drawn.logprobs.detach(), drawn.advantages[drawn.sequence_ids]
    inputs = replace(drawn, old_logprobs=pi, behavior_logprobs=pi, advantages=advantages)
    equal(gradient(name, inputs, **base_settings(name)), -advantages * drawn.loss_mask)


# What must never leak, overflow, or pass


@pytest.mark.parametrize(("name", "tis"), PAIRS)
def test_nothing_leaks_from_behind_the_mask(name: str, tis: TIS | None) -> None:
    clean = random_inputs(seed=1, lengths=(6, 5, 8))
    hidden = ~clean.loss_mask
    assert hidden.any()
    extra = {"kl_beta": 0.1} if name == "grpo" else {}
    for garbage in (math.nan, math.inf, -math.inf):
        dirty = random_inputs(seed=1, lengths=(6, 5, 8), behind=garbage)
        assert torch.equal(policy_loss(name, clean, tis=tis, **extra), policy_loss(name, dirty, tis=tis, **extra))
        found = gradient(name, dirty, tis=tis, **extra)
        assert torch.equal(gradient(name, clean, tis=tis, **extra), found)
        assert not found[hidden].any()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("gap", [-100.0, 100.0])
@pytest.mark.parametrize("behavior", [-100.0, 0.0, 100.0])
def test_enormous_ratios_stay_finite_in_float32(name: str, gap: float, behavior: float) -> None:
    zero = torch.zeros(3)
    inputs = LossInputs(
        logprobs=torch.full((3,), gap),
        old_logprobs=zero,
        behavior_logprobs=zero + behavior,
        ref_logprobs=zero - gap,
        advantages=torch.tensor([-3.0, 3.0, 0.0]),
        loss_mask=torch.ones(3, dtype=torch.bool),
        sequence_ids=torch.zeros(3, dtype=torch.int64),
    )
    for tis in (None, TIS(), *([TIS(level="sequence")] if name != "reinforce" else [])):
        extra = {"kl_beta": 0.1} if name == "grpo" else {}
        assert policy_loss(name, inputs, tis=tis, **extra).isfinite().all()
        assert gradient(name, inputs, tis=tis, **extra).isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_all_masked_is_zero(name: str) -> None:
    inputs = make_inputs(logprobs=[math.nan, -1.0], old=[-1.0, math.inf], mask=[0, 0])
    losses = policy_loss(name, inputs, **base_settings(name))
    assert losses.tolist() == [0.0, 0.0]
    assert reduce(losses, inputs, "sequence_mean").item() == 0.0
    assert not gradient(name, inputs, **base_settings(name)).any()


@pytest.mark.parametrize("name", sorted({*NAMES} - {"grpo"}))
def test_kl_where_there_is_none_is_refused(name: str) -> None:
    inputs = make_inputs(logprobs=[-1.0])
    with pytest.raises(ConfigError, match=rf"loss_config.kl_beta must be 0/unset when method is {name.upper()}"):
        policy_loss(name, inputs, kl_beta=0.01)
    assert policy_loss(name, inputs, kl_beta=0.0).isfinite().all()


@pytest.mark.parametrize(
    ("name", "settings_", "words"),
    [
        ("dapo", {"dual_clip": 1.0}, "dual_clip is 1. Expected a number above 1"),
        ("dro", {"dro_beta": -1.0}, "dro_beta is -1"),
        ("reinforce", {"tis": TIS(icepop=2.0)}, "correction on or off"),
        ("reinforce", {"tis": TIS(level="sequence")}, "correction on or off"),
    ],
)
def test_refusals(name: str, settings_: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        policy_loss(name, make_inputs(logprobs=[-1.0]), **settings_)


def test_the_config_knows_which_objective_has_which_setting() -> None:
    assert set(POLICY_LOSS_NAMES) == set(NAMES)
    for setting, owners in LOSS_SETTING_OWNERS.items():
        having = {name for name in NAMES if setting in inspect.signature(POLICY_LOSSES[name]).parameters}
        assert having == set(NAMES if setting == "kl_beta" else owners), setting


def test_clip_of_reads_the_defaults() -> None:
    found = {name: clip_of(name, {}) for name in NAMES}
    ranges = {name: (round(clip.low, 6), round(clip.high, 6)) for name, clip in found.items()}
    free = (-math.inf, math.inf)
    assert ranges == {
        "grpo": (0.8, 1.2),
        "importance_sampling": free,
        "reinforce": free,
        "dapo": (0.8, 1.28),
        "gspo": (0.9997, 1.0004),
        "gspo_token": (0.9997, 1.0004),
        "cispo": (0.8, 1.28),
        "dro": free,
    }
    assert clip_of("grpo", {"eps_low": 0.1}).high == pytest.approx(1.1)
    assert clip_of("dapo", {"eps_low": 0.1}).high == pytest.approx(1.28)
    assert {name for name in NAMES if found[name].ratio == "sequence"} == {"gspo", "gspo_token"}
    assert {name for name in NAMES if not found[name].pessimistic} == {"importance_sampling", "cispo"}
