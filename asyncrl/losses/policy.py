"""The objectives themselves, each with its formula: `(inputs, *, ...settings) -> loss per token [N]`, to be minimised.

    pi, mu, old, ref   log-probs of the policy, the sampler, the anchor, the reference
    A, w               advantage; weight of the train/sampler correction, a constant
    r, s               pi / old of a token; its geometric mean over a sequence
    sg(x)              x without gradient

The inputs are clean: zeros behind the mask (registry.py sees to it). The caller reduces (reduce.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from asyncrl.errors import ConfigError
from asyncrl.losses.inputs import LossInputs
from asyncrl.losses.ratios import TIS, importance_ratio, k3, log_ratio, sequence_ratio, tis_weights

DEFAULT_TIS = TIS()


def grpo(
    inputs: LossInputs,
    *,
    eps_low: float = 0.2,
    eps_high: float | None = None,
    kl_beta: float = 0.001,
    tis: TIS | None = DEFAULT_TIS,
) -> Tensor:
    """max(-r A, -clip(r, 1 - eps_low, 1 + eps_high) A) w + kl_beta k3(pi, ref), arXiv:2402.03300. [N]

    `eps_high` None is `eps_low`. The advantages' scale is the caller's affair, the mean over tokens that of
    `loss.normalization`.
    """
    high = eps_low if eps_high is None else eps_high
    loss = _clipped(importance_ratio(inputs), inputs.advantages, eps_low, high) * tis_weights(inputs, tis)
    if kl_beta > 0:
        if inputs.ref_logprobs is None:
            raise ConfigError(f"kl_beta is {kl_beta:g}, but there are no reference log-probs. Give them, or set 0.")
        loss = loss + kl_beta * k3(inputs.logprobs, inputs.ref_logprobs, inputs.loss_mask)
    return loss


def importance_sampling(
    inputs: LossInputs,
    *,
    eps_low: float | None = None,
    eps_high: float | None = None,
    kl_beta: float = 0.0,
    tis: TIS | None = DEFAULT_TIS,
) -> Tensor:
    """-r A w. [N]

    With `eps_low` or `eps_high`, r is clipped below 1 - eps_low or above 1 + eps_high; a clipped token has no gradient.
    """
    _refuse_kl("IMPORTANCE_SAMPLING", kl_beta)
    ratio = importance_ratio(inputs)  # [N]
    if eps_low is not None or eps_high is not None:
        ratio = ratio.clamp(
            None if eps_low is None else 1 - eps_low,
            None if eps_high is None else 1 + eps_high,
        )
    return -ratio * inputs.advantages * tis_weights(inputs, tis)


def reinforce(inputs: LossInputs, *, kl_beta: float = 0.0, tis: TIS | None = DEFAULT_TIS) -> Tensor:
    """-exp(pi - mu) A with the off-policy correction on, -pi A with it off (`tis` None). [N]

    The whole correction is this one ratio: nothing caps it, and the filters of `tis` have no place in it.
    """
    _refuse_kl("REINFORCE", kl_beta)
    if tis is None or tis.cap is None:
        return -inputs.logprobs * inputs.advantages
    if tis.level != "token" or tis.icepop is not None or tis.mis is not None:
        raise ConfigError(
            f"policy_loss 'reinforce' takes the correction on or off, but found {tis}. "
            "Leave level, icepop and mis out, or use 'importance_sampling'."
        )
    return -log_ratio(inputs.logprobs, inputs.behavior_logprobs, inputs.loss_mask).exp() * inputs.advantages


def dapo(
    inputs: LossInputs,
    *,
    eps_low: float = 0.2,
    eps_high: float = 0.28,
    dual_clip: float | None = None,
    kl_beta: float = 0.0,
    tis: TIS | None = DEFAULT_TIS,
) -> Tensor:
    """max(-r A, -clip(r, 1 - eps_low, 1 + eps_high) A) w: `grpo` with more room above and no KL, arXiv:2503.14476. [N]

    With `dual_clip` c > 1 the term is at most -c A where A < 0, however large r is (arXiv:1912.09729).
    """
    _refuse_kl("DAPO", kl_beta)
    loss = _clipped(importance_ratio(inputs), inputs.advantages, eps_low, eps_high)  # [N]
    if dual_clip is not None:
        if not dual_clip > 1:
            raise ConfigError(f"dual_clip is {dual_clip:g}. Expected a number above 1, such as 3, or None.")
        bounded = torch.minimum(loss, -dual_clip * inputs.advantages)
        loss = torch.where(inputs.advantages < 0, bounded, loss)
    return loss * tis_weights(inputs, tis)


def gspo(
    inputs: LossInputs,
    *,
    eps_low: float = 3e-4,
    eps_high: float = 4e-4,
    kl_beta: float = 0.0,
    tis: TIS | None = DEFAULT_TIS,
) -> Tensor:
    """max(-s A, -clip(s, 1 - eps_low, 1 + eps_high) A) w, the gradient through s, arXiv:2507.18071. [N]

    Meant for `loss.normalization="sequence_mean"`, its default.
    """
    _refuse_kl("GSPO", kl_beta)
    return _clipped(sequence_ratio(inputs), inputs.advantages, eps_low, eps_high) * tis_weights(inputs, tis)


def gspo_token(
    inputs: LossInputs,
    *,
    eps_low: float = 3e-4,
    eps_high: float = 4e-4,
    kl_beta: float = 0.0,
    tis: TIS | None = DEFAULT_TIS,
) -> Tensor:
    """As `gspo` with s_t = sg(s) exp(pi - sg(pi)): the value of s, the gradient of one token. [N]

    So advantages may differ from token to token (arXiv:2507.18071, section 4.3).
    """
    _refuse_kl("GSPO_TOKEN", kl_beta)
    ratio = sequence_ratio(inputs).detach() * (inputs.logprobs - inputs.logprobs.detach()).exp()  # [N]
    return _clipped(ratio, inputs.advantages, eps_low, eps_high) * tis_weights(inputs, tis)


def cispo(
    inputs: LossInputs,
    *,
    eps_low: float = 0.2,
    eps_high: float = 0.28,
    kl_beta: float = 0.0,
    tis: TIS | None = DEFAULT_TIS,
) -> Tensor:
    """-sg(clip(r, 1 - eps_low, 1 + eps_high)) A pi w: no token loses its gradient, arXiv:2506.13585. [N]"""
    _refuse_kl("CISPO", kl_beta)
    weight = importance_ratio(inputs).detach().clamp(1 - eps_low, 1 + eps_high)  # [N]
    return -weight * inputs.advantages * inputs.logprobs * tis_weights(inputs, tis)


def dro(inputs: LossInputs, *, dro_beta: float = 0.05, kl_beta: float = 0.0, tis: TIS | None = DEFAULT_TIS) -> Tensor:
    """-(pi A w - dro_beta / 2 (pi - old)^2): a quadratic pull to the anchor instead of a clip, arXiv:2405.19107. [N]"""
    _refuse_kl("DRO", kl_beta)
    if dro_beta < 0:
        raise ConfigError(f"dro_beta is {dro_beta:g}. Expected a number of at least 0: it pulls towards the anchor.")
    pull = 0.5 * dro_beta * (inputs.logprobs - inputs.old_logprobs).square()  # [N]
    return pull - inputs.logprobs * inputs.advantages * tis_weights(inputs, tis)


def cross_entropy(inputs: LossInputs) -> Tensor:
    """-log pi: supervised training on the loss tokens. [N]"""
    return -inputs.logprobs


def _clipped(ratio: Tensor, advantages: Tensor, eps_low: float, eps_high: float) -> Tensor:
    """PPO's pessimistic clip (arXiv:1707.06347): the larger of the clipped and the plain loss. [N]"""
    return torch.maximum(-ratio * advantages, -ratio.clamp(1 - eps_low, 1 + eps_high) * advantages)


def _refuse_kl(method: str, kl_beta: float) -> None:
    if kl_beta:
        raise ConfigError(
            f"loss_config.kl_beta must be 0/unset when method is {method}: it has no KL term. Found {kl_beta:g}. "
            "Use 'grpo', or a loss of your own with a `kl_beta`."
        )
