"""Every error that asyncrl raises, in one tree.

    AsyncRLError
    ├── UserError (ValueError)          something the user wrote
    │   ├── ConfigError                 a setting, or a combination of settings
    │   ├── DataError                   a dataset, with file and line
    │   ├── ModelError                  a model or tokenizer that cannot be used
    │   ├── CheckpointError             a checkpoint that cannot be gone on from
    │   └── RolloutContractError        what a rollout function returned, or asked for
    │       └── ContextFull             a context that leaves no room for a completion
    ├── RolloutError                    one rollout failed; the run need not
    │   ├── RecoverableRolloutError     raise it yourself to have the member drawn again
    │   │   └── LimitReached            a conversation came to a limit with on_limit="error"
    │   ├── RolloutTimeout              the rollout took longer than `rollout.timeout_s`
    │   └── SamplerRequestError         the sampler refused or lost one request
    └── EngineError                     the run cannot go on
        ├── RolloutFailed               a rollout failed in a way that is fatal
        ├── BreakerOpen                 too many rollouts failed in a row: an outage
        ├── SamplerError                the sampler cannot start, or died
        ├── CanaryError                 sampler and trainer disagree after a hot-load
        ├── TrainerError                the trainer cannot go on
        │   └── StepFailed              one optimizer step was not taken: out of memory, not finite
        ├── StallError                  nothing moved for `stall_timeout_s`
        └── EvaluationFailed            an evaluation came to no result

A message says what was found, what was expected, and what to do next.
"""

from __future__ import annotations

from types import TracebackType


class AsyncRLError(Exception):
    """The root of the tree."""


class UserError(AsyncRLError, ValueError):
    """Something that the user wrote cannot be used."""


class ConfigError(UserError):
    """A setting, or a combination of settings, that cannot be used."""


class DataError(UserError):
    """A dataset, or a row of one, that cannot be used."""


class ModelError(UserError):
    """A model or a tokenizer that cannot be found or used."""


class CheckpointError(UserError):
    """A checkpoint that is not there, is not whole, or belongs to another model or other data."""


class RolloutContractError(UserError):
    """A rollout function returned something that cannot be trained on."""


class ContextFull(RolloutContractError):
    """The context leaves no room for a completion."""


class RolloutError(AsyncRLError):
    """One rollout failed. The run goes on."""


class RecoverableRolloutError(RolloutError):
    """Raise it in a rollout function to have this group member drawn again."""


class LimitReached(RecoverableRolloutError):
    """A conversation came to a limit for which `on_limit` is `error`, or has more turns than any rollout needs."""


class RolloutTimeout(RolloutError):
    """A rollout took longer than `rollout.timeout_s`."""


class SamplerRequestError(RolloutError):
    """The sampler refused or lost one request.

    `status` is the HTTP status where there was one, else None (a lost connection, a time-out).
    `recoverable` says whether asking again can help.
    """

    def __init__(self, message: str, *, status: int | None = None, recoverable: bool = True) -> None:
        super().__init__(message)
        self.status = status
        self.recoverable = recoverable


class EngineError(AsyncRLError):
    """The run cannot go on."""


class RolloutFailed(EngineError):
    """A rollout failed in a way that asking again would not mend."""


class BreakerOpen(EngineError):
    """Too many rollouts failed one after the other: an outage, not bad luck."""


class SamplerError(EngineError):
    """The sampler cannot start, or died."""


class CanaryError(EngineError):
    """After a hot-load, sampler and trainer disagree on the log-probs of the probe."""


class TrainerError(EngineError):
    """The trainer cannot go on."""


class StepFailed(TrainerError):
    """One optimizer step could not be taken. The weights are unchanged, and its gradients are dropped."""


class StallError(EngineError):
    """Nothing moved for `stall_timeout_s`."""


class EvaluationFailed(EngineError):
    """An evaluation came to no result. Beside training it is reported, and the run goes on."""


def traceback_from(error: BaseException, callers: tuple[str, ...]) -> TracebackType | None:
    """Without its outer frames that are in files whose path begins like one of `callers`: they say nothing to whoever
    wrote what was called. None: there is no other."""
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename.startswith(callers):
        trace = trace.tb_next
    return trace


def first_failure(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The failure that came first, out of the groups that task groups wrap it in."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
