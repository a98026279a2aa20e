"""The objectives of docs/objectives.md once more: one token at a time, on plain floats, as one would read them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from asyncrl.losses import TIS, LossInputs


def bounded_exp(x: float) -> float:
    return math.exp(max(-20.0, min(20.0, x)))


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


@dataclass(frozen=True)
class Token:
    """One loss token, and what it must know of its sequence."""

    pi: float
    old: float
    mu: float
    ref: float | None
    advantage: float
    mean_pi_old: float
    """Mean of pi - old over the loss tokens of its sequence."""
    mean_old_mu: float

    def weight(self, tis: TIS | None) -> float:
        if tis is None:
            return 1.0
        token, sequence = bounded_exp(self.old - self.mu), bounded_exp(self.mean_old_mu)
        raw = sequence if tis.level == "sequence" else token
        weight = 1.0 if tis.cap is None else min(raw, tis.cap)
        if tis.icepop is not None and not 1 / tis.icepop <= raw <= tis.icepop:
            return 0.0
        if tis.mis is not None and not tis.mis[0] <= sequence <= tis.mis[1]:
            return 0.0
        return weight


def clip(ratio: float, low: float, high: float) -> float:
    return min(max(ratio, low), high)


def clipped(ratio: float, token: Token, low: float, high: float) -> float:
    return max(-ratio * token.advantage, -clip(ratio, 1 - low, 1 + high) * token.advantage)


def grpo(t: Token, eps_low: float, eps_high: float, kl_beta: float, tis: TIS | None) -> float:
    loss = clipped(bounded_exp(t.pi - t.old), t, eps_low, eps_high) * t.weight(tis)
    if kl_beta:
        assert t.ref is not None
        loss += kl_beta * (bounded_exp(t.ref - t.pi) - max(-20.0, min(20.0, t.ref - t.pi)) - 1)
    return loss


def importance_sampling(t: Token, tis: TIS | None, eps_low: float = math.inf, eps_high: float = math.inf) -> float:
    return -clip(bounded_exp(t.pi - t.old), 1 - eps_low, 1 + eps_high) * t.advantage * t.weight(tis)


def reinforce(t: Token, tis: TIS | None) -> float:
    return -t.pi * t.advantage if tis is None else -bounded_exp(t.pi - t.mu) * t.advantage


def dapo(t: Token, tis: TIS | None, eps_low: float = 0.2, eps_high: float = 0.28, dual_clip: float = math.inf) -> float:
    loss = clipped(bounded_exp(t.pi - t.old), t, eps_low, eps_high)
    if t.advantage < 0:
        loss = min(loss, -dual_clip * t.advantage)
    return loss * t.weight(tis)


def gspo(t: Token, tis: TIS | None, eps_low: float = 3e-4, eps_high: float = 4e-4) -> float:
    return clipped(bounded_exp(t.mean_pi_old), t, eps_low, eps_high) * t.weight(tis)


def cispo(t: Token, tis: TIS | None, eps_low: float = 0.2, eps_high: float = 0.28) -> float:
    return -clip(bounded_exp(t.pi - t.old), 1 - eps_low, 1 + eps_high) * t.advantage * t.pi * t.weight(tis)


def dro(t: Token, tis: TIS | None, dro_beta: float = 0.05) -> float:
    return -(t.pi * t.advantage * t.weight(tis) - 0.5 * dro_beta * (t.pi - t.old) ** 2)


SLOW: dict[str, Callable[..., float]] = {
    "grpo": grpo,
    "importance_sampling": importance_sampling,
    "reinforce": reinforce,
    "dapo": dapo,
    "gspo": gspo,
    "gspo_token": gspo,  # the same value; the gradient differs
    "cispo": cispo,
    "dro": dro,
}


def slow_loss(name: str, inputs: LossInputs, **settings: Any) -> list[float]:
    """[N], 0 on masked tokens."""
    fields = {
        "pi": inputs.logprobs.detach().tolist(),
        "old": inputs.old_logprobs.tolist(),
        "mu": inputs.behavior_logprobs.tolist(),
        "advantage": inputs.advantages.tolist(),
    }
    ref = None if inputs.ref_logprobs is None else inputs.ref_logprobs.tolist()
    mask, sequences = inputs.loss_mask.tolist(), inputs.sequence_ids.tolist()
    losses = []
    for place in range(len(mask)):
        if not mask[place]:
            losses.append(0.0)
            continue
        mates = [i for i in range(len(mask)) if mask[i] and sequences[i] == sequences[place]]
        token = Token(
            **{name: values[place] for name, values in fields.items()},
            ref=None if ref is None else ref[place],
            mean_pi_old=mean([fields["pi"][i] - fields["old"][i] for i in mates]),
            mean_old_mu=mean([fields["old"][i] - fields["mu"][i] for i in mates]),
        )
        losses.append(SLOW[name](token, **settings))
    return losses
