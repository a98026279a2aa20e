"""One door to all objectives: found by name or given as a function, their settings checked, what is masked hidden."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from asyncrl.errors import ConfigError
from asyncrl.functions import is_reference, load_function
from asyncrl.losses import policy
from asyncrl.losses.inputs import LossInputs

PolicyLoss = Callable[..., Tensor]

POLICY_LOSSES: dict[str, PolicyLoss] = {
    "grpo": policy.grpo,
    "importance_sampling": policy.importance_sampling,
    "reinforce": policy.reinforce,
    "dapo": policy.dapo,
    "gspo": policy.gspo,
    "gspo_token": policy.gspo_token,
    "cispo": policy.cispo,
    "dro": policy.dro,
}


@dataclass(frozen=True, slots=True)
class Clip:
    """How an objective clips its ratio: what the metrics count."""

    low: float = -torch.inf
    high: float = torch.inf
    ratio: Literal["token", "sequence"] = "token"
    pessimistic: bool = True
    """Only where it makes the loss larger: below with A < 0, above with A > 0. Else on both sides for any A."""


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
            f"Its settings: {', '.join(_parameters(function)) or 'none'}."
        )
    inputs = inputs.cleaned()
    per_token = function(inputs, **settings)  # [N]
    if not isinstance(per_token, Tensor) or per_token.shape != inputs.logprobs.shape:
        found = tuple(per_token.shape) if isinstance(per_token, Tensor) else type(per_token).__name__
        raise ConfigError(
            f"the objective {_name(loss)} gave a loss of shape {found}. Expected one number per token, "
            f"{tuple(inputs.logprobs.shape)}: the engine reduces it, see loss.normalization."
        )
    return torch.where(inputs.loss_mask, per_token, 0.0)


def find_policy_loss(loss: str | PolicyLoss) -> PolicyLoss:
    """The function behind a name, or behind `file.py:function`. Raises `ConfigError` with the list of names."""
    if callable(loss):
        return loss
    if is_reference(loss):
        return load_function(loss, "policy_loss")
    if loss not in POLICY_LOSSES:
        raise ConfigError(
            f"policy_loss is {loss!r}. Expected one of {', '.join(sorted(POLICY_LOSSES))}, or a function "
            "from LossInputs to a loss per token."
        )
    return POLICY_LOSSES[loss]


def accepted_settings(loss: str | PolicyLoss, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `settings` that the objective has. Raises `ConfigError` where it needs another one."""
    function = find_policy_loss(loss)
    parameters = inspect.signature(function).parameters.values()
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        return dict(settings)
    names = _parameters(function)
    needed = {name for name, parameter in names.items() if parameter.default is inspect.Parameter.empty}
    if missing := needed - settings.keys():
        raise ConfigError(
            f"the objective {_name(loss)} needs {', '.join(sorted(missing))}, which is not set. Give its parameter a "
            "default, or set it in the config's [loss]: eps_low, eps_high, dual_clip, kl_beta, dro_beta, tis_..."
        )
    return {name: value for name, value in settings.items() if name in names}


def clip_of(loss: str | PolicyLoss, settings: Mapping[str, Any]) -> Clip:
    """The clip of an objective under these settings, its own defaults where they say nothing."""
    function = find_policy_loss(loss)
    defaults = {name: parameter.default for name, parameter in _parameters(function).items()}
    low, high = ({**defaults, **settings}.get(name) if name in defaults else None for name in ("eps_low", "eps_high"))
    if high is None and function is policy.grpo:
        high = low
    return Clip(
        low=-torch.inf if low is None else 1 - low,
        high=torch.inf if high is None else 1 + high,
        ratio="sequence" if function in (policy.gspo, policy.gspo_token) else "token",
        pessimistic=function not in (policy.importance_sampling, policy.cispo),
    )


def _parameters(function: PolicyLoss) -> dict[str, inspect.Parameter]:
    """What can be set, under its name: all but the first, which takes the inputs."""
    kinds = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = list(inspect.signature(function).parameters.values())[1:]
    return {parameter.name: parameter for parameter in parameters if parameter.kind in kinds}


def _name(loss: str | PolicyLoss) -> str:
    return repr(loss) if isinstance(loss, str) else f"{loss.__module__}:{getattr(loss, '__qualname__', loss)}"
