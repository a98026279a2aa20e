"""What a failed rollout means: draw it again, go on without it, or end the run. Pure.

recoverable   timeouts, lost connections, HTTP 408/429/5xx, RecoverableRolloutError
fatal         a malformed sample, any other exception (`on_error="drop"` makes them recoverable, on a budget)
"""

from __future__ import annotations

import traceback
from collections import deque
from enum import Enum
from pathlib import Path
from reprlib import Repr
from types import TracebackType
from typing import Any

from asyncrl.config import RolloutConfig
from asyncrl.errors import (
    EngineError,
    ModelError,
    RecoverableRolloutError,
    RolloutContractError,
    RolloutFailed,
    RolloutTimeout,
    SamplerRequestError,
    traceback_from,
)
from asyncrl.terminal import visible

BREAKER_IN_A_ROW = 5
BREAKER_WINDOW = 20

_RETRYABLE_STATUS = frozenset({408, 429})
# Client libraries of agents are not imported here, so their connection errors are known by name.
_CONNECTION_ERRORS = frozenset({"APIConnectionError", "ClientConnectionError", "TransportError", "RequestException"})

LONGEST_VALUE = 160
LONGEST_MESSAGE = 2_000
LONGEST_TRACEBACK = 20_000
"""Characters. An error that carries a page of HTML, or what a model said, shall not bury the log or the terminal."""

_BRIEF = Repr()  # it does not walk through what it will not show
_BRIEF.maxlist = _BRIEF.maxtuple = _BRIEF.maxdict = _BRIEF.maxset = _BRIEF.maxfrozenset = 8
_BRIEF.maxstring = _BRIEF.maxother = 120

_CONTEXT_IS_FULL = "context_length_exceeded"
"""The code in the endpoint's answer. Client libraries quote the answer, whatever exception they make of it."""


class Verdict(Enum):
    RETRY = "retry"
    FATAL = "fatal"


def http_status(error: BaseException) -> int | None:
    """The HTTP status that an aiohttp, httpx, openai or requests error carries."""
    for carrier in (error, _attribute(error, "response")):
        for name in ("status", "status_code"):
            status = _attribute(carrier, name)
            if isinstance(status, int):
                return status
    return None


def _attribute(carrier: object, name: str) -> Any:
    try:
        return getattr(carrier, name, None)
    except Exception:  # a property of somebody else's class: what cannot be read says nothing
        return None


def message(error: BaseException) -> str:
    """What an exception says, whoever wrote its class."""
    try:
        text = str(error)
    except Exception as fault:  # of somebody else's __str__
        text = f"<no message: its __str__ raised {type(fault).__name__}>"
    return _shown(text, LONGEST_MESSAGE)


def describe(error: BaseException) -> str:
    """One line: its kind, and what it says."""
    return f"{type(error).__name__}: {message(error)}"


def brief(value: object) -> str:
    """What a value looks like, short, whoever wrote its class."""
    try:
        shown = _BRIEF.repr(value)
    except Exception:  # of somebody else's __repr__, or a number with more digits than Python prints
        shown = "<no repr>"
    return _shown(shown, LONGEST_VALUE)


def _shown(text: str, most: int) -> str:
    """For a log and a terminal: the middle of what is longer is left out."""
    if len(text) > most:
        text = f"{text[: most // 2]} ... [{len(text) - most} characters left out] ... {text[len(text) - most // 2 :]}"
    return visible(text)


def leaves(error: BaseException) -> list[BaseException]:
    """The failures that an exception group holds, or the one failure. Task groups wrap what their tasks raise."""
    found, unseen = [], [error]
    while unseen:
        inner = unseen.pop()
        if isinstance(inner, BaseExceptionGroup):
            unseen += reversed(inner.exceptions)
        else:
            found.append(inner)
    return found


def is_recoverable(error: BaseException) -> bool:
    """Whether asking again can help."""
    if isinstance(error, BaseExceptionGroup):
        return all(map(is_recoverable, leaves(error)))
    if isinstance(error, SamplerRequestError):
        return error.recoverable
    if isinstance(error, (RecoverableRolloutError, RolloutTimeout, TimeoutError, ConnectionError)):
        return True
    if _CONTEXT_IS_FULL in message(error):
        return True
    status = http_status(error)
    if status is not None:
        return status in _RETRYABLE_STATUS or 500 <= status < 600
    return any(kind.__name__ in _CONNECTION_ERRORS for kind in type(error).__mro__)


def is_ours(error: BaseException) -> bool:
    """A failure of the engine or of the model that reached the user through the rollout function: it ends the run
    under its own name, since the function is not to blame."""
    return any(isinstance(leaf, (EngineError, ModelError)) for leaf in leaves(error))


def _in_users_function(error: BaseException) -> TracebackType | None:
    """The traceback from the user's function on; the frames that called it say nothing. None: it did not come there."""
    here = Path(__file__).parent
    callers = str(here), str(here.with_name("workers.py"))
    return traceback_from(error, callers)


def users_traceback(error: BaseException) -> str:
    """What the user's function raised, from its own frame on."""
    try:
        text = "".join(traceback.format_exception(type(error), error, _in_users_function(error))).strip()
    except Exception:  # groups within groups without end, or a class that defends itself
        text = f"{describe(error)} (its traceback cannot be shown)"
    return _shown(text, LONGEST_TRACEBACK)


def fatal(where: str, error: BaseException, *, budget_spent: bool) -> RolloutFailed:
    """One message with the place in the data, the user's traceback, and what to do."""
    if isinstance(error, RolloutContractError) and _in_users_function(error) is None:
        return RolloutFailed(
            f"{where} returned a sample that cannot be trained:\n{error}\n"
            "Mend the rollout function, or set rollout.on_error='drop' to go on without such samples."
        )
    hint = (
        "rollout.error_budget is used up."
        if budget_spent
        else "Raise asyncrl.RecoverableRolloutError for what a second try can mend, or set rollout.on_error='drop'."
    )
    return RolloutFailed(f"{where} failed:\n{users_traceback(error)}\n{hint}")


class FailurePolicy:
    """Decides about each failure. Owns the budget of `on_error="drop"`."""

    def __init__(self, config: RolloutConfig) -> None:
        self.retries = config.retries
        self._drop_unknown = config.on_error == "drop"
        self._budget = config.error_budget
        self.forgiven = 0
        """Unknown exceptions so far."""

    def judge(self, error: BaseException) -> Verdict:
        if is_ours(error) or any(isinstance(leaf, KeyboardInterrupt) for leaf in leaves(error)):
            return Verdict.FATAL  # Ctrl-C reaches whatever runs, where no handler of ours is installed: in a notebook
        if is_recoverable(error):
            return Verdict.RETRY
        if self._drop_unknown and self.forgiven < self._budget:
            self.forgiven += 1
            return Verdict.RETRY
        return Verdict.FATAL

    @property
    def budget_spent(self) -> bool:
        return self._drop_unknown and self.forgiven >= self._budget

    @staticmethod
    def backoff_s(attempt: int) -> float:
        """How long to wait before attempt number `attempt` (from 1), in seconds: 0.1, 0.2, 0.4 ... 5."""
        return min(5.0, 0.1 * 2.0 ** (attempt - 1))


class Breaker:
    """Opens when an outage shows: 5 members lost in a row, or half of the last 20.

    A member is lost when its retries are used up; draws that a rollout function dropped itself do not count.
    """

    def __init__(self) -> None:
        self._in_a_row = 0
        self._recent: deque[bool] = deque(maxlen=BREAKER_WINDOW)

    def succeeded(self) -> None:
        self._in_a_row = 0
        self._recent.append(False)

    def lost(self) -> str | None:
        """Count a lost member. Returns what shows the outage once there is one."""
        self._in_a_row += 1
        self._recent.append(True)
        if self._in_a_row >= BREAKER_IN_A_ROW:
            return f"{self._in_a_row} rollouts in a row failed"
        if len(self._recent) == BREAKER_WINDOW and 2 * sum(self._recent) >= BREAKER_WINDOW:
            return f"{sum(self._recent)} of the last {BREAKER_WINDOW} rollouts failed"
        return None
