"""The objectives by name, behind one door.

An objective is a function `(inputs, *, ...settings) -> loss per token [N]`; `policy_loss` finds it, hides
what is behind the mask from it, and the caller reduces (asyncrl/losses/reduce.py).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from asyncrl.errors import ConfigError
from asyncrl.losses.inputs import LossInputs
from asyncrl.losses.ratios import TIS, importance_ratio, k3, tis_weights

PolicyLoss = Callable[..., Tensor]

DEFAULT_TIS = TIS()


def policy_loss(loss: str | PolicyLoss, inputs: LossInputs, **settings: Any) -> Tensor:
    """The loss of every token, [N]; 0 behind the mask.

    `loss` is a name of `POLICY_LOSSES`, or your own `(inputs, *, ...settings) -> [N]`.
    Raises `ConfigError` for an unknown name, a setting that the objective does not have, or a wrong shape.
    """
    function = find_policy_loss(loss)
    unknown = settings.keys() - accepted_settings(function, settings).keys()
    if unknown:
        raise ConfigError(
            f"the objective {_name(loss)} has no setting {', '.join(sorted(unknown))}. "
            f"Its settings: {', '.join(_settings_of(function)) or 'none'}."
        )
    inputs = inputs.cleaned()
    per_token = function(inputs, **settings)  # [N]
    if per_token.shape != inputs.logprobs.shape:
        raise ConfigError(
            f"the objective {_name(loss)} gave a loss of shape {tuple(per_token.shape)}. Expected one number per "
            f"token, {tuple(inputs.logprobs.shape)}: the engine reduces it, see loss.normalization."
        )
    return torch.where(inputs.loss_mask, per_token, 0.0)


def find_policy_loss(loss: str | PolicyLoss) -> PolicyLoss:
    """The function behind a name. Raises `ConfigError` with the list of names."""
    if callable(loss):
        return loss
    if loss not in POLICY_LOSSES:
        raise ConfigError(
            f"policy_loss is {loss!r}. Expected one of {', '.join(sorted(POLICY_LOSSES))}, or a function "
            "from LossInputs to a loss per token."
        )
    return POLICY_LOSSES[loss]


def accepted_settings(loss: str | PolicyLoss, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `settings` that the objective has."""
    function = find_policy_loss(loss)
    parameters = inspect.signature(function).parameters.values()
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        return dict(settings)
    names = _settings_of(function)
    return {name: value for name, value in settings.items() if name in names}


def grpo(
    inputs: LossInputs,
    *,
    eps_low: float = 0.2,
    eps_high: float | None = None,
    kl_beta: float = 0.001,
    tis: TIS | None = DEFAULT_TIS,
) -> Tensor:
    """max(-r A, -clip(r, 1 - eps_low, 1 + eps_high) A) w + kl_beta k3(pi, ref), arXiv:2402.03300. [N]

    The advantages' scale is the caller's affair, the mean over tokens that of `loss.normalization`.
    """
    ratio = importance_ratio(inputs)  # [N]
    clipped = ratio.clamp(1 - eps_low, 1 + (eps_low if eps_high is None else eps_high))
    loss = torch.maximum(-ratio * inputs.advantages, -clipped * inputs.advantages) * tis_weights(inputs, tis)
    if kl_beta > 0:
        if inputs.ref_logprobs is None:
            raise ConfigError(f"kl_beta is {kl_beta:g}, but there are no reference log-probs. Give them, or set 0.")
        loss = loss + kl_beta * k3(inputs.logprobs, inputs.ref_logprobs, inputs.loss_mask)
    return loss


def cross_entropy(inputs: LossInputs) -> Tensor:
    """-log pi: supervised training on the loss tokens. [N]"""
    return -inputs.logprobs


POLICY_LOSSES: dict[str, PolicyLoss] = {"grpo": grpo}


def _settings_of(function: PolicyLoss) -> list[str]:
    parameters = list(inspect.signature(function).parameters.values())[1:]
    kinds = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [parameter.name for parameter in parameters if parameter.kind in kinds]


def _name(loss: str | PolicyLoss) -> str:
    return repr(loss) if isinstance(loss, str) else f"{loss.__module__}:{getattr(loss, '__qualname__', loss)}"
