"""The trainer's verbs: gradients that do not depend on the cut, the anchor, the reference, failures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from asyncrl.config import Config
from asyncrl.errors import ConfigError, TrainerError
from asyncrl.losses import POLICY_LOSSES, LossInputs, cross_entropy
from asyncrl.training import logprobs
from asyncrl.training.model import PolicyModel
from asyncrl.training.trainer import TorchTrainer
from asyncrl.types import TrainSequence
from tests.training.cases import (
    VOCABULARY,
    fresh_model,
    gradients,
    make_trainer,
    model_folder,
    plain_logprobs,
    token_lists,
    train_sequences,
    weights,
)

LENGTHS = (40, 33, 21, 20, 20, 9, 4, 3)
NORMALIZATIONS = ["num_loss_tokens", "num_sequences", "sequence_mean", "none", 50.0]


def with_shared_prompts(sequences: Sequence[TrainSequence], prompt: int) -> list[TrainSequence]:
    """The second of each group begins as the first does, loss tokens included, where both are that long."""
    return [
        replace(one, tokens=[*sequences[index - index % 2].tokens[:prompt], *one.tokens[prompt:]])
        if len(one.tokens) > prompt
        else one
        for index, one in enumerate(sequences)
    ]


def step_in_double(
    chunks: Sequence[Sequence[TrainSequence]], monkeypatch: pytest.MonkeyPatch, **settings: Any
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Normalised gradients and metrics of one optimizer batch, computed in float64.

    GPT-2, because the norms of younger models compute in float32 inside, whatever they are given.
    """
    trainer = make_trainer("gpt2", optimizer={"grad_clip_norm": None}, **settings)
    trainer.policy.causal_lm.double()
    object.__setattr__(trainer.policy, "compute_dtype", torch.float64)
    monkeypatch.setattr(PolicyModel, "autocast", lambda self: torch.enable_grad())
    for chunk in chunks:
        trainer.forward_backward(chunk)
    taken: dict[str, torch.Tensor] = {}
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: taken.update(gradients(trainer)))
    return taken, dict(trainer.optim_step().metrics)


@pytest.mark.parametrize(
    ("name", "normalization"),
    [*(("grpo", normalization) for normalization in NORMALIZATIONS), *((name, "auto") for name in POLICY_LOSSES)],
)
def test_gradient_does_not_depend_on_the_cut(
    name: str, normalization: str | float, monkeypatch: pytest.MonkeyPatch
) -> None:
    sequences = with_shared_prompts(train_sequences(0, LENGTHS), 14)
    loss = {"normalization": normalization, "kl_beta": 0.0, "anchor": "rollout"}
    apart = {"share_prompts": False}
    whole, metrics = step_in_double([sequences], monkeypatch, loss=loss, policy_loss=name, trainer=apart)
    monkeypatch.setattr(logprobs, "CHUNK_LOGITS", 7 * VOCABULARY)
    cuts = {
        "prompts shared": ([sequences], 8192),
        "chunks": ([sequences[:3], sequences[3:4], sequences[4:]], 8192),
        "microbatches": ([sequences], 45),
        "both, shuffled": ([sequences[5:], sequences[:5][::-1]], 1),
    }
    for cut, (chunks, budget) in cuts.items():
        parts, found = step_in_double(
            chunks,
            monkeypatch,
            loss=loss,
            policy_loss=name,
            trainer={"max_tokens_per_microbatch": budget},
        )
        torch.testing.assert_close(parts, whole, rtol=1e-6, atol=1e-9)
        for metric in ("loss", "grad_norm", "loss_tokens", "sequences", "train_tokens", "ratio_mean", "entropy"):
            assert found[metric] == pytest.approx(metrics[metric], rel=1e-5), cut
        assert (found["shared_tokens"] > 0) == (cut != "both, shuffled"), cut
    assert metrics["shared_tokens"] == 0


def test_denominators_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same sums under each normalization: 5 + 2 + 1 loss tokens of 3 sequences."""
    sequences = train_sequences(0, (8, 5, 4))
    assert [sum(sequence.loss_mask) for sequence in sequences] == [5, 2, 1]
    norms = {}
    for normalization in ("none", "num_loss_tokens", "num_sequences", 50.0):
        loss = {"normalization": normalization, "kl_beta": 0.0}
        norms[normalization] = step_in_double([sequences], monkeypatch, loss=loss)[1]
    for normalization, divisor in (("num_loss_tokens", 8), ("num_sequences", 3), (50.0, 50)):
        for name in ("grad_norm", "loss"):
            assert norms[normalization][name] == pytest.approx(norms["none"][name] / divisor, rel=1e-9)


@pytest.mark.parametrize("name", sorted(POLICY_LOSSES))
def test_gradient_equals_a_plain_loop(name: str) -> None:
    """On policy every objective is REINFORCE: one sample at a time through the model's own forward, -A log pi."""
    loss = {"kl_beta": 0.0, "tis_cap": None, "normalization": "num_loss_tokens"}
    trainer = make_trainer(policy_loss=name, loss=loss, sampling={"temperature": 0.8})
    sequences = train_sequences(1, (12, 30, 7))
    model = fresh_model()
    tokens = sum(sum(sequence.loss_mask[1:]) for sequence in sequences)
    for sequence in sequences:
        ids = torch.tensor([sequence.tokens])
        logits = model(input_ids=ids).logits[0, :-1] / 0.8
        logprobs = logits.log_softmax(1).gather(1, ids[0, 1:, None]).squeeze(1)
        mask = torch.tensor(sequence.loss_mask[1:])
        (-(logprobs * mask).sum() * sequence.advantage / tokens).backward()
    trainer.forward_backward(sequences)
    found = {name: gradient / tokens for name, gradient in gradients(trainer).items()}
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_on_policy_identity() -> None:
    trainer = make_trainer()
    trainer.forward_backward(train_sequences(0, LENGTHS))
    metrics = trainer.optim_step().metrics
    assert metrics["ppo_kl"] == 0.0
    assert metrics["ratio_mean"] == 1.0
    assert metrics["ref_kld"] == 0.0
    assert metrics["clip_frac_low"] == metrics["clip_frac_high"] == 0.0


def test_anchor_rollout_takes_the_ratio_to_the_sampler() -> None:
    trainer = make_trainer(loss={"anchor": "rollout", "kl_beta": 0.0})
    trainer.forward_backward(train_sequences(0, LENGTHS))
    metrics = trainer.optim_step().metrics
    assert metrics["behavior_kl"] == 0.0
    assert metrics["tis_weight_mean"] == 1.0
    assert metrics["ppo_kl"] > 0.01


@pytest.mark.parametrize("rank", [0, 4])
def test_the_reference_is_the_model_at_the_start(rank: int) -> None:
    """After a step the policy has left it, and the reference gives the log-probs of the start."""
    seen: list[LossInputs] = []

    def spy(inputs: LossInputs, *, kl_beta: float) -> torch.Tensor:
        assert kl_beta == 0.1
        seen.append(inputs)
        return -inputs.logprobs * inputs.advantages

    trainer = make_trainer(lora={"rank": rank}, loss={"kl_beta": 0.1}, policy_loss=spy)
    sequences = train_sequences(0, LENGTHS)
    start = trainer.forward([sequences[0].tokens])
    for _ in range(2):
        trainer.forward_backward(sequences[:1])
        result = trainer.optim_step()
    mask = torch.tensor(sequences[0].loss_mask[1:]).bool()
    expected = torch.tensor(start[0])[mask]
    for inputs in seen:
        assert inputs.ref_logprobs is not None
        torch.testing.assert_close(inputs.ref_logprobs, expected, rtol=0, atol=1e-5)
    assert (seen[1].logprobs - expected).abs().max() > 1e-3
    assert result.metrics["ref_kld"] > 0


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.3)])
def test_the_frozen_copy_can_be_smaller_or_elsewhere(dtype: str, tolerance: float) -> None:
    trainer = make_trainer(loss={"kl_beta": 0.1}, trainer={"reference_dtype": dtype, "reference_device": "cpu"})
    assert trainer._reference is not None
    copy = trainer._reference.model.causal_lm
    assert {parameter.dtype for parameter in copy.parameters()} == {getattr(torch, dtype)}
    assert not any(parameter.requires_grad for parameter in copy.parameters())
    assert {parameter.dtype for parameter in trainer.policy.causal_lm.parameters()} == {torch.float32}
    trainer.forward_backward(train_sequences(0, LENGTHS))
    assert 0 <= trainer.optim_step().metrics["ref_kld"] < tolerance


def test_a_reference_device_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match=r"trainer.reference_device is 'cuda:93'"):
        make_trainer(loss={"kl_beta": 0.1}, trainer={"reference_device": "cuda:93"})


def test_a_custom_loss_sees_reference_and_groups() -> None:
    trainer = make_trainer(loss={"kl_beta": 0.0})
    with pytest.raises(ConfigError, match="made without a reference"):
        trainer.forward_backward_custom(train_sequences(0, LENGTHS), cross_entropy, reference=True)
    trainer = TorchTrainer(
        Config(model=model_folder("llama")), total_steps=None, weights_format="tensors", reference=True
    )
    seen: list[LossInputs] = []

    def spy(inputs: LossInputs) -> torch.Tensor:
        seen.append(inputs)
        return -inputs.logprobs

    trainer.forward_backward_custom(train_sequences(0, LENGTHS), spy, reference=True, whole_groups=True)
    (inputs,) = seen
    assert inputs.ref_logprobs is not None
    torch.testing.assert_close(inputs.ref_logprobs, inputs.logprobs.detach())
    assert inputs.group_ids is not None
    assert len(inputs.group_ids.unique()) == len(LENGTHS) // 2
    pairs = {(int(s), int(g)) for s, g in zip(inputs.sequence_ids, inputs.group_ids, strict=True)}
    assert len(pairs) == len(LENGTHS)


def test_a_normalization_of_the_step_itself() -> None:
    """The gradients are sums until the step divides them; those of `sequence_mean` are not."""
    norms = {}
    for normalization in (None, "none", 4.0):
        trainer = make_trainer(optimizer={"grad_clip_norm": None})
        trainer.forward_backward(train_sequences(0, (8, 5, 4)))
        norms[normalization] = trainer.optim_step(normalization).metrics["grad_norm"]
    assert norms["none"] == pytest.approx(norms[None] * 8) == pytest.approx(norms[4.0] * 4)
    trainer.forward_backward(train_sequences(0, (8, 5, 4)))
    with pytest.raises(ConfigError, match="cannot be normalised by 'sequence_mean' any more"):
        trainer.optim_step("sequence_mean")


def test_a_loss_by_reference_that_has_no_kl(tmp_path: Path) -> None:
    (tmp_path / "no_kl.py").write_text("def mine(inputs):\n    return -inputs.logprobs\n")
    with pytest.raises(ConfigError, match="takes no `kl_beta`"):
        make_trainer(policy_loss=f"{tmp_path}/no_kl.py:mine", loss={"kl_beta": 0.1})


def test_no_reference_without_a_kl() -> None:
    trainer = make_trainer(loss={"kl_beta": 0.0})
    assert trainer._reference is None
    trainer.forward_backward(train_sequences(0, (9, 5)))
    assert "ref_kld" not in trainer.optim_step().metrics


def test_lora_trains_the_adapter_alone() -> None:
    trainer = make_trainer(lora={"rank": 4})
    before = weights(trainer)
    for _ in range(2):  # B is 0 at first, so A moves from the second step on
        trainer.forward_backward(train_sequences(0, LENGTHS))
        trainer.optim_step()
    moved = {name for name, tensor in weights(trainer).items() if not torch.equal(tensor, before[name])}
    assert moved == {name for name in before if "lora_" in name}


def test_a_step_moves_up_what_was_rewarded() -> None:
    trainer = make_trainer()
    good, bad = (
        replace(sequence, advantage=sign)
        for sequence, sign in zip(train_sequences(0, (20, 20)), (1.0, -1.0), strict=True)
    )
    before = [sum(logprobs) for logprobs in trainer.forward([good.tokens, bad.tokens])]
    for _ in range(3):
        trainer.forward_backward([good, bad])
        trainer.optim_step()
    after = [sum(logprobs) for logprobs in trainer.forward([good.tokens, bad.tokens])]
    assert after[0] - after[1] > before[0] - before[1] + 1.0


def test_supervised_warm_start() -> None:
    """Cross entropy on the loss tokens; its loss is their mean, at temperature 1."""
    trainer = make_trainer(sampling={"temperature": 0.5})
    sequences = train_sequences(0, (20, 11))
    logprobs = trainer.forward([sequence.tokens for sequence in sequences])
    losses = [
        -p for row, s in zip(logprobs, sequences, strict=True) for p, m in zip(row, s.loss_mask[1:], strict=True) if m
    ]
    found = []
    for _ in range(5):
        trainer.forward_backward_custom(sequences, cross_entropy)
        found.append(trainer.optim_step().metrics["loss"])
    assert found[0] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert found[-1] < found[0] - 0.5


def test_metrics_of_a_step() -> None:
    trainer = make_trainer(
        trainer={"max_tokens_per_microbatch": 50}, optimizer={"learning_rate": 0.25, "warmup_steps": 2}
    )
    trainer.forward_backward(train_sequences(0, (40, 10, 30)))
    result = trainer.optim_step()
    assert (result.step, trainer.step) == (1, 1)
    expected = {"learning_rate": 0.125, "train_tokens": 80, "sequences": 3, "microbatches": 2}
    assert {name: result.metrics[name] for name in expected} == pytest.approx(expected)
    assert result.metrics["loss_tokens"] == 80 - 3 * 3
    assert result.metrics["row_tokens"] == 80 - 3  # the last token of a sequence predicts nothing
    assert result.metrics["shared_tokens"] == 0
    assert result.metrics["pack_efficiency"] == 1.0  # no two of these are similar enough to share a block
    assert all(result.metrics[name] > 0 for name in ("forward_s", "backward_s", "optimizer_s", "grad_norm", "entropy"))


def test_a_batch_starts_from_nothing() -> None:
    """The gradient of the step before must not be in the next one."""
    trainer = make_trainer()
    trainer.forward_backward(train_sequences(0, LENGTHS))
    trainer.optim_step()
    trainer.forward_backward(train_sequences(1, (12, 7)))
    once = gradients(trainer)
    trainer.forward_backward(train_sequences(1, (12, 7)))
    twice = gradients(trainer)
    torch.testing.assert_close(twice, {name: 2 * gradient for name, gradient in once.items()})


def test_deterministic_for_a_seed() -> None:
    def run(seed: int) -> tuple[dict[str, torch.Tensor], float]:
        trainer = make_trainer(lora={"rank": 4}, seed=seed)
        for seed_ in range(2):
            trainer.forward_backward(train_sequences(seed_, LENGTHS))
            loss = trainer.optim_step().metrics["loss"]
        return weights(trainer), loss

    first, again, other = run(3), run(3), run(4)
    assert first[1] == again[1]
    assert all(torch.equal(first[0][name], again[0][name]) for name in first[0])
    assert any(not torch.equal(first[0][name], other[0][name]) for name in first[0])


def test_the_global_random_state_is_left_alone() -> None:
    state = torch.random.get_rng_state()
    make_trainer(lora={"rank": 4}, seed=9)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_forward_is_at_temperature_one_and_in_order() -> None:
    trainer = make_trainer(sampling={"temperature": 0.3})
    sequences = token_lists(0, (3, 50, 1, 9))
    found = trainer.forward(sequences)
    assert [len(row) for row in found] == [2, 49, 0, 8]
    for tokens, row in zip(sequences, found, strict=True):
        expected = plain_logprobs(fresh_model(), tokens)
        assert row == pytest.approx([float(p) for p in expected], abs=1e-5)


def unchanged(trainer: TorchTrainer, before: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, before[name]) for name, tensor in weights(trainer).items())


def test_a_loss_that_is_not_finite() -> None:
    """NaN behaviour log-probs on trained tokens: loud, weights unchanged, and the next batch starts clean."""
    trainer = make_trainer()
    before = weights(trainer)
    sequences = train_sequences(0, (9, 7))
    broken = replace(sequences[0], behavior_logprobs=[math.nan] * 9)
    with pytest.raises(TrainerError, match=r"loss of step 1 is not finite.*unchanged"):
        trainer.forward_backward([broken, sequences[1]])
    assert unchanged(trainer, before)
    assert not gradients(trainer)
    trainer.forward_backward(sequences)
    assert math.isfinite(trainer.optim_step().metrics["loss"])


def test_a_gradient_that_is_not_finite() -> None:
    trainer = make_trainer()
    before = weights(trainer)
    trainer.forward_backward(train_sequences(0, (9, 7)))
    grad = trainer.policy.trained_parameters()[0].grad
    assert grad is not None
    grad[0, 0] = math.inf
    with pytest.raises(TrainerError, match=r"optimizer step 1 was not taken.*gradient norm inf.*unchanged"):
        trainer.optim_step()
    assert unchanged(trainer, before)
    assert trainer.step == 0


def test_nan_behind_the_mask_does_not_matter() -> None:
    def run(hidden: float) -> dict[str, torch.Tensor]:
        trainer = make_trainer()
        sequences = [
            replace(
                s, behavior_logprobs=[p if m else hidden for p, m in zip(s.behavior_logprobs, s.loss_mask, strict=True)]
            )
            for s in train_sequences(0, (9, 7))
        ]
        trainer.forward_backward(sequences)
        return gradients(trainer)

    clean, dirty = run(0.0), run(math.nan)
    assert all(torch.equal(clean[name], dirty[name]) for name in clean)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried 8 bytes"),
        MemoryError(),
    ],
)
def test_out_of_memory_names_the_setting(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer()

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(PolicyModel, "token_logprobs", fail)
    with pytest.raises(TrainerError, match=r"ran out of memory in .*max_tokens_per_microbatch=8192\. Lower it"):
        trainer.forward_backward(train_sequences(0, (9, 7)))


def test_other_errors_pass_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer()

    def fail(*_: object) -> None:
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr(PolicyModel, "token_logprobs", fail)
    with pytest.raises(RuntimeError, match="shapes"):
        trainer.forward_backward(train_sequences(0, (9, 7)))


def test_a_loss_of_your_own_that_fails_leaves_no_gradient() -> None:
    """It fails in the second microbatch: the first one's gradient must not be in the next step."""

    def fail(inputs: LossInputs) -> torch.Tensor:
        calls.append(inputs)
        if len(calls) == 2:
            raise ValueError("my loss cannot do this")
        return cross_entropy(inputs)

    calls: list[LossInputs] = []
    trainer = make_trainer(trainer={"max_tokens_per_microbatch": 10})
    with pytest.raises(ValueError, match="my loss"):
        trainer.forward_backward_custom(train_sequences(0, (9, 7)), fail)
    assert len(calls) == 2
    assert not gradients(trainer)


def test_a_normalization_that_is_refused_costs_nothing() -> None:
    plain, trainer = make_trainer(), make_trainer()
    for each in (plain, trainer):
        each.forward_backward(train_sequences(0, (9, 7)))
    with pytest.raises(ConfigError, match="cannot be normalised"):
        trainer.optim_step("sequence_mean")
    assert trainer.optim_step().metrics["grad_norm"] == plain.optim_step().metrics["grad_norm"]


def test_nothing_to_train() -> None:
    trainer = make_trainer()
    trainer.forward_backward([])
    with pytest.raises(TrainerError, match="optimizer step 1 has nothing to train"):
        trainer.optim_step()


@pytest.mark.parametrize(("tokens", "words"), [([1, 101], "token id 101.*0 to 100"), ([1] * 129, "at most 128")])
def test_sequences_that_the_model_cannot_read(tokens: list[int], words: str) -> None:
    trainer = make_trainer()
    size = len(tokens)
    with pytest.raises(TrainerError, match=words):
        trainer.forward_backward([TrainSequence(tokens, [0.0] * size, [1] * size, 1.0, 0)])
    with pytest.raises(TrainerError, match=words):
        trainer.forward([tokens])


def test_files_need_a_folder() -> None:
    from asyncrl.config import Config

    with pytest.raises(ConfigError, match="publish_folder"):
        TorchTrainer(Config(model=model_folder("llama")), total_steps=None, weights_format="files")
