"""A step that cannot be taken: which of the errors, what it says, and that the next batch is as if nothing had been."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from asyncrl.errors import StepFailed, TrainerError
from asyncrl.losses import LossInputs
from asyncrl.training import diagnosis
from asyncrl.training.trainer import TorchTrainer
from tests.training.cases import make_trainer, token_lists, train_sequences, weights

SEQUENCES = train_sequences(0, (9, 7, 12, 11))


def failed(trainer: TorchTrainer, act: Callable[[], Any], kind: type[TrainerError] = StepFailed) -> str:
    """The message of the step that `act` fails in. Where the engine may go on, all is as if it had not been tried."""
    before, step = weights(trainer), trainer.step
    with pytest.raises(TrainerError) as found:
        act()
    assert type(found.value) is kind
    if kind is StepFailed:
        assert all(torch.equal(tensor, before[name]) for name, tensor in weights(trainer).items())
        assert all(weight.grad is None for weight in trainer.policy.causal_lm.parameters())
        trainer.forward_backward(SEQUENCES[:2])
        assert trainer.optim_step().metrics["sequences"] == 2, "nothing of the failed batch is left"
        assert trainer.step == step + 1
    return str(found.value)


def test_a_loss_names_the_sequences_whose_numbers_were_wrong() -> None:
    broken = replace(SEQUENCES[2], behavior_logprobs=[math.nan] * 12)
    infinite = replace(SEQUENCES[3], advantage=math.inf)
    trainer = make_trainer(trainer={"max_tokens_per_microbatch": 64})
    trainer.forward_backward(SEQUENCES[:2])
    message = failed(trainer, lambda: trainer.forward_backward([*SEQUENCES[:2], broken, infinite]))
    assert "the loss of step 1 is not finite" in message
    assert "sequences 2 (12 tokens, group 1, behaviour log-probs not finite)" in message
    assert "and 3 (11 tokens, group 1, advantages not finite). The weights are unchanged." in message


def test_a_loss_names_the_microbatch_where_the_numbers_were_right() -> None:
    def breaks_where_large(inputs: LossInputs) -> torch.Tensor:
        return inputs.logprobs * torch.where(inputs.advantages > 100, math.nan, 1.0)

    sequences = [*SEQUENCES[:2], *(replace(sequence, advantage=101.0) for sequence in SEQUENCES[2:])]
    trainer = make_trainer(trainer={"max_tokens_per_microbatch": 24})
    message = failed(trainer, lambda: trainer.forward_backward_custom(sequences, breaks_where_large))
    assert "2 (12 tokens, group 1)" in message
    assert "3 (11 tokens, group 1)" in message
    assert "group 0" not in message


def test_a_gradient_names_its_weights() -> None:
    trainer = make_trainer()

    def act() -> None:
        trainer.forward_backward(SEQUENCES)
        grad = trainer.policy.trained_parameters()[1].grad
        assert grad is not None
        grad[0, 0] = math.nan
        trainer.optim_step()

    message = failed(trainer, act)
    assert "optimizer step 1 was not taken: its loss is " in message
    assert "gradient norm nan, and both must be finite (4 sequences, " in message
    assert "gradients that are not: model.layers.0.self_attn.q_proj.weight)" in message


def test_a_norm_that_overflows() -> None:
    trainer = make_trainer()

    def act() -> None:
        trainer.forward_backward(SEQUENCES)
        for weight in trainer.policy.trained_parameters():
            assert weight.grad is not None
            weight.grad.fill_(1e38)
        trainer.optim_step()

    assert "gradients that are not: none, but their norm overflows" in failed(trainer, act)


@pytest.mark.parametrize("verb", ["forward_backward", "optim_step"])
def test_weights_that_are_not_finite_are_fatal(verb: str) -> None:
    """No other batch would be any better."""
    trainer = make_trainer()
    trainer.forward_backward(SEQUENCES)
    trainer.policy.trained_parameters()[3].data[0, 0] = math.nan
    if verb == "optim_step":
        grad = trainer.policy.trained_parameters()[3].grad
        assert grad is not None
        grad[0, 0] = math.nan
        message = failed(trainer, trainer.optim_step, TrainerError)
    else:
        message = failed(trainer, lambda: trainer.forward_backward(SEQUENCES), TrainerError)
    assert "The weights are not finite any more: model.layers.0.self_attn.v_proj.weight. Go on from a check" in message


def exhausted(*_: object, **__: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")


def test_out_of_memory_names_the_microbatch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis, "available_bytes", lambda: 3_210_000_000)
    trainer = make_trainer()

    def act() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(type(trainer.policy), "token_logprobs", exhausted)
            trainer.forward_backward(SEQUENCES)

    message = failed(trainer, act)
    assert "cpu ran out of memory in forward and backward of step 1, with sequences " in message
    assert "2 (12 tokens, group 1)" in message
    assert "(3.2 GB are free), with trainer.max_tokens_per_microbatch=8192. Lower it" in message


def test_out_of_memory_in_the_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the update the weights are whole; within it nobody knows."""
    trainer = make_trainer()

    def before() -> None:
        trainer.forward_backward(SEQUENCES)
        with monkeypatch.context() as patch:
            patch.setattr(torch.linalg, "vector_norm", exhausted)
            trainer.optim_step()

    def within() -> None:
        trainer.forward_backward(SEQUENCES)
        with monkeypatch.context() as patch:
            patch.setattr(trainer._optimizer, "step", exhausted)
            trainer.optim_step()

    assert "ran out of memory in optimizer step 1 (" in failed(trainer, before)
    assert "in the update of optimizer step 2 (" in failed(trainer, within, TrainerError)


def test_out_of_memory_in_a_forward_alone_is_fatal(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer()
    monkeypatch.setattr(type(trainer.policy), "token_logprobs", exhausted)
    assert "ran out of memory in forward (" in failed(
        trainer, lambda: trainer.forward(token_lists(0, (9,))), TrainerError
    )


def test_a_failure_that_is_kept_holds_no_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine keeps the error while the next batch is trained."""
    trainer, held = make_trainer(), []

    def exhaust(*_: object) -> None:
        activations = torch.zeros(100)
        held.append(weakref.ref(activations))
        exhausted()

    monkeypatch.setattr(type(trainer.policy), "token_logprobs", exhaust)
    with pytest.raises(StepFailed) as found:
        trainer.forward_backward(SEQUENCES)
    gc.collect()
    assert found.value.__cause__ is not None
    assert held[0]() is None


def test_many_are_counted() -> None:
    named = diagnosis.sequences_named([SEQUENCES[0]] * 9, range(9))
    assert named == "sequences " + ", ".join(f"{i} (9 tokens, group 0)" for i in range(4)) + " and 5 more"
    assert diagnosis.sequences_named(SEQUENCES, [1]) == "sequence 1 (7 tokens, group 0)"
