"""Why an optimizer step could not be taken: which sequences, which weights, how much memory."""

from __future__ import annotations

import math
import traceback
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from asyncrl.config import TrainerConfig
from asyncrl.errors import StepFailed, TrainerError
from asyncrl.training.host_memory import available_bytes
from asyncrl.types import TrainSequence

NAMED = 4
"""So many are named; the others are counted."""

ADVICE = "Lower optimizer.learning_rate, or look for log-probs and rewards out of range in rollouts.jsonl."


def loss_not_finite(
    step: int, sequences: Sequence[TrainSequence], indices: Sequence[int], weights: Mapping[str, Tensor]
) -> TrainerError:
    """The error for a loss that is not finite, in microbatches with the sequences `indices`.

    Of these it names the ones whose own numbers are wrong; all of them, where none is.
    """
    at_fault = [index for index in indices if _fault(sequences[index])] or indices
    what = f"the loss of step {step} is not finite, with {sequences_named(sequences, at_fault)}"
    return _error(what, weights)


def step_not_finite(step: int, report: Mapping[str, float], norm: float, weights: Mapping[str, Tensor]) -> TrainerError:
    """The error for a whole batch whose loss or gradient is not finite."""
    gradients = _not_finite({name: weight.grad for name, weight in weights.items() if weight.grad is not None})
    return _error(
        f"optimizer step {step} was not taken: its loss is {report['loss']:g} and its gradient norm {norm:g}, and both "
        f"must be finite ({report['sequences']:.0f} sequences, {report['loss_tokens']:.0f} loss tokens; gradients that "
        f"are not: {_listed(gradients) or 'none, but their norm overflows'})",
        weights,
    )


def require_finite(weights: Mapping[str, Tensor], refused: str) -> None:
    """Raises `TrainerError`, which says what was `refused`, for weights that nobody wants to go on from, or to use."""
    if broken := _not_finite(weights):
        raise TrainerError(
            f"{refused}: {_listed(broken)} {'is' if len(broken) == 1 else 'are'} not finite. Go on from an "
            "earlier checkpoint, with a lower optimizer.learning_rate."
        )


def memory_exhausted(verb: str, device: torch.device, config: TrainerConfig) -> str:
    """What ran out of memory, how full it is, and which settings help."""
    return (
        f"{device.type} ran out of memory in {verb} ({_memory(device)}), with trainer.max_tokens_per_microbatch="
        f"{config.max_tokens_per_microbatch}. Lower it (results do not change), switch on "
        "trainer.gradient_checkpointing, or train an adapter (lora.rank)."
    )


def is_out_of_memory(error: BaseException) -> bool:
    # The CPU and MPS allocators have no exception type of their own.
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        words in str(error) for words in ("can't allocate memory", "not enough memory", "out of memory")
    )


def free_memory_of(error: BaseException, device: torch.device) -> None:
    """Let go of the activations in the frames that `error` came through, however long it is kept."""
    traceback.clear_frames(error.__traceback__)
    if device.type == "cuda":
        torch.cuda.empty_cache()


def sequences_named(sequences: Sequence[TrainSequence], indices: Sequence[int]) -> str:
    """As in "sequences 3 (41 tokens, group 1) and 7 (12 tokens, group 3)"."""
    parts = [
        f"{index} ({len(sequences[index].tokens)} tokens, group {sequences[index].group}{_fault(sequences[index])})"
        for index in indices
    ]
    return ("sequence " if len(parts) == 1 else "sequences ") + _listed(parts)


def _error(what: str, weights: Mapping[str, Tensor]) -> TrainerError:
    """Fatal where the weights are not finite either: no other batch would be any better."""
    if broken := _not_finite(weights):
        return TrainerError(
            f"{what}. The weights are not finite any more: {_listed(broken)}. Go on from a checkpoint, with a lower "
            "optimizer.learning_rate."
        )
    return StepFailed(f"{what}. The weights are unchanged. {ADVICE}")


def _fault(sequence: TrainSequence) -> str:
    """What is wrong in the numbers that were given for its loss tokens."""
    trained = [place for place, mask in enumerate(sequence.loss_mask) if mask]
    advantage = sequence.advantage
    numbers = {
        "behaviour log-probs": [sequence.behavior_logprobs[place] for place in trained],
        "advantages": [advantage[p] for p in trained] if isinstance(advantage, Sequence) else [advantage],
    }
    found = [name for name, values in numbers.items() if not all(map(math.isfinite, values))]
    return f", {' and '.join(found)} not finite" if found else ""


def _not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    return [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]


def _memory(device: torch.device) -> str:
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        held = torch.cuda.memory_allocated(device)
        return f"of {total / 1e9:.1f} GB, {held / 1e9:.1f} GB are held by the trainer and {free / 1e9:.1f} GB are free"
    available = available_bytes()
    return "how much is free is not known" if available is None else f"{available / 1e9:.1f} GB are free"


def _listed(parts: Iterable[str]) -> str:
    *first, last = [*parts] or [""]
    if len(first) >= NAMED:
        return f"{', '.join(first[:NAMED])} and {len(first) + 1 - NAMED} more"
    return f"{', '.join(first)} and {last}" if first else last
