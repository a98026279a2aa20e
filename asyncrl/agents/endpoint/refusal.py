"""What the endpoint says when it does not answer: one error, in the words of each API."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from asyncrl.errors import (
    AsyncRLError,
    ContextFull,
    EngineError,
    RecoverableRolloutError,
    RolloutContractError,
    SamplerRequestError,
)

_OPENAI_TYPES = {429: "rate_limit_error", 500: "server_error", 503: "server_error"}
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
}


class Refusal(Exception):
    """An HTTP answer that is an error.

    `code` and `param` are words for programs: the kind of error, and the field that is to blame. `retry`: asking again
    can help; clients are told, since they would else retry some of these by themselves.
    """

    def __init__(
        self, status: int, message: str, *, code: str | None = None, param: str | None = None, retry: bool = False
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.retry = retry

    @property
    def headers(self) -> dict[str, str]:
        return {"x-should-retry": str(self.retry).lower()}

    def openai(self) -> dict[str, Any]:
        kind = _OPENAI_TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def anthropic(self) -> dict[str, Any]:
        kind = _ANTHROPIC_TYPES.get(self.status, "invalid_request_error")
        return {"type": "error", "error": {"type": kind, "message": str(self), "code": self.code}}


def refusal_of(error: Exception) -> Refusal:
    """The answer for what went wrong while a request was read or drawn. Unknown errors are a 500."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, ValidationError):
        fault = error.errors(include_url=False, include_context=False, include_input=False)[0]
        field = ".".join(map(str, fault["loc"]))
        return Refusal(400, f"{field or 'the request body'}: {fault['msg']}", param=field or None)
    if isinstance(error, SamplerRequestError):
        return Refusal(503 if error.recoverable else 400, str(error), code="sampler", retry=error.recoverable)
    if isinstance(error, RecoverableRolloutError):
        return Refusal(429, str(error), code="rate_limit_exceeded")
    if isinstance(error, ContextFull):  # the code in the message too: that is all that newer clients show of an error
        return Refusal(400, f"context_length_exceeded: {error}", code="context_length_exceeded")
    if isinstance(error, RolloutContractError):
        return Refusal(400, str(error))
    if isinstance(error, EngineError):
        return Refusal(503, f"{type(error).__name__}: {error}")
    if isinstance(error, AsyncRLError):
        return Refusal(400, f"{type(error).__name__}: {error}")
    return Refusal(500, f"{type(error).__name__}: {error}")
