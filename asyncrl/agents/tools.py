"""Tools: typed Python functions that a model may call.

A tool is shown to the model as a JSON schema made from its signature and docstring. Whatever goes wrong in a call
that the model asked for is an answer to the model, not an exception in the rollout: a call runs in a thread or a task
of its own, and what it raises, even a SystemExit or a cancellation of its own making, ends there.
"""

from __future__ import annotations

import dataclasses
import functools
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, ParamSpec, TypeVar, overload
from weakref import WeakKeyDictionary

import structlog
from anyio.lowlevel import RunVar

from asyncrl.agents.tool_output import as_text, error_text
from asyncrl.agents.tool_schema import Arguments, BadArguments, Signature, ToolError, signature_of
from asyncrl.errors import AsyncRLError
from asyncrl.rollout.failures import brief
from asyncrl.workers import Outcome, Threads, in_own_task

__all__ = ["Tool", "ToolError", "ToolResult", "collect_tools", "tool"]

P = ParamSpec("P")
R = TypeVar("R")

TOOL_THREADS = 64
"""Calls of one synchronous tool that run at once: more than there are cores, since tools mostly wait. Each tool has its
own, so one that hangs starves no other."""
CANCEL_GRACE_S = 5.0
"""An async tool that overran and was cancelled may tidy up for so long; one that ignores it is left behind."""

log = structlog.get_logger(__name__)

_told: RunVar[set[tuple[str, str]]] = RunVar("asyncrl_tools_that_raised")
"""Names of tools, and what they raised. Not of a signature: that of an MCP server's tool is made for each rollout."""
_threads: RunVar[WeakKeyDictionary[Signature, Threads]] = RunVar("asyncrl_tool_threads")


@dataclass(frozen=True, slots=True)
class ToolResult:
    """What the model reads after a call."""

    text: str
    error: bool = False
    """The call failed; `text` says why."""


class Tool(Generic[P, R]):
    """A function with a name, a JSON schema, a time limit and an output limit. Calling it calls the function.

    Raises:
        ToolError: the signature has `*args`, `**kwargs`, positional-only or unannotated parameters, or a
            type that JSON cannot express; or the function yields; or a limit is none.
    """

    def __init__(
        self,
        function: Callable[P, R],
        *,
        timeout_s: float = 60.0,
        max_output_chars: int = 8000,
        signature: Signature | None = None,
    ) -> None:
        for name, limit in (("timeout_s", timeout_s), ("max_output_chars", max_output_chars)):
            if not isinstance(limit, int | float) or not limit > 0:
                raise ToolError(f"{name} of a tool is {brief(limit)}. Expected a number above 0.")
        self.function = function.__func__ if isinstance(function, staticmethod) else function
        self.timeout_s = timeout_s
        """Longest call. The thread of a synchronous function cannot be stopped; its result is then thrown away."""
        self.max_output_chars = max_output_chars
        """Longer results are cut, and say so."""
        self.signature = signature_of(self.function) if signature is None else signature
        """How the model sees it; made from `function` if left out."""
        functools.update_wrapper(self, self.function)

    @property
    def name(self) -> str:
        return self.signature.name

    @property
    def schema(self) -> dict[str, Any]:
        """As chat templates and the OpenAI API take it."""
        return self.signature.schema

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return self.function(*args, **kwargs)

    def __get__(self, instance: Any, owner: type | None = None) -> Tool[..., R]:
        """A tool that is a method, bound to its object; cheap, since one is made for each rollout."""
        if instance is None or not self.signature.needs_self:
            return self
        bound = object.__new__(Tool)
        bound.__dict__ |= self.__dict__
        bound.function = self.function.__get__(instance, owner)
        bound.signature = self._bound_signature
        return bound

    @functools.cached_property
    def _bound_signature(self) -> Signature:
        return dataclasses.replace(self.signature, needs_self=False)

    def __repr__(self) -> str:
        return f"Tool({self.name})"

    async def call(self, arguments: Arguments) -> str:
        """Run one call of the model and return what the model shall read."""
        return (await self.invoke(arguments)).text

    async def invoke(self, arguments: Arguments) -> ToolResult:
        """As `call`, and says whether the call failed.

        Errors of asyncrl itself (such as `RecoverableRolloutError`) and cancellation are raised: a tool that
        finds its own machinery broken can have the whole rollout drawn again.
        """
        if self.signature.needs_self:
            raise ToolError(
                f"tool {self.name} is a method without its object. Give that of an object: `shop.{self.name}`."
            )
        try:
            named = self.signature.check(arguments)
        except BadArguments as error:
            return ToolResult(f"Error: bad arguments for {self.name}: {error}", error=True)
        call = functools.partial(self.function, **named)
        try:
            outcome = await (self._in_task(call) if self.signature.is_async else self._in_thread(call))
        except TimeoutError as error:  # the tool's own would be in the outcome
            return ToolResult(f"Error: {error}.", error=True)
        if outcome.error is None:
            return ToolResult(outcome.unwrap())
        if isinstance(outcome.error, AsyncRLError):
            raise outcome.error
        self._tell_once(outcome.error)
        return ToolResult(error_text(outcome.error, self.max_output_chars), error=True)

    async def _in_thread(self, call: Callable[[], Any]) -> Outcome[str]:
        try:
            threads = _threads.get()
        except LookupError:
            threads = WeakKeyDictionary()
            _threads.set(threads)
        mine = threads.setdefault(self.signature, Threads(TOOL_THREADS))
        return await mine.run(lambda: as_text(call(), self.max_output_chars), self.name, self.timeout_s)

    async def _in_task(self, call: Callable[[], Any]) -> Outcome[str]:
        async def work() -> str:
            return as_text(await call(), self.max_output_chars)

        return await in_own_task(work, self.name, self.timeout_s, CANCEL_GRACE_S)

    def _tell_once(self, error: BaseException) -> None:
        """The model alone reads what a tool raises, so a tool that is broken would go unseen."""
        kind = type(error).__name__
        try:
            told = _told.get()
        except LookupError:
            told = set()
            _told.set(told)
        if (self.name, kind) not in told:
            told.add((self.name, kind))
            *_, last = traceback.extract_tb(error.__traceback__) or [None]
            where = f"{last.filename}:{last.lineno}" if last else "nowhere"
            log.warning(
                "a tool raised; the model reads it, and the log tells of it once",
                tool=self.name,
                error=error_text(error, 500),
                where=where,
            )


@overload
def tool(function: Callable[P, R], /) -> Tool[P, R]: ...


@overload
def tool(*, timeout_s: float = ..., max_output_chars: int = ...) -> Callable[[Callable[P, R]], Tool[P, R]]: ...


def tool(
    function: Callable[P, R] | None = None, /, *, timeout_s: float = 60.0, max_output_chars: int = 8000
) -> Tool[P, R] | Callable[[Callable[P, R]], Tool[P, R]]:
    """Make a typed function, synchronous or async, a tool that a model may call.

    The docstring is what the model reads; an `Args:` section in it describes the parameters. Synchronous functions
    run in a worker thread. As `@tool` or as `@tool(timeout_s=5)`, on functions and on methods.
    """
    if function is not None:
        return Tool(function)
    return functools.partial(Tool, timeout_s=timeout_s, max_output_chars=max_output_chars)


def collect_tools(tools: Iterable[Any]) -> dict[str, Tool[..., Any]]:
    """Tools by name: of functions, of bound methods, and of objects, which give their methods marked `@tool`.

    Raises:
        ToolError: two have the same name, or something is none of these.
    """
    if not isinstance(tools, Iterable) or isinstance(tools, Mapping | str):
        raise ToolError(f"tools is {brief(tools)}. Expected a list of tools, such as tools=[calculator].")
    found: dict[str, Tool[..., Any]] = {}
    for given in tools:
        for each in _tools_of(given):
            if each.signature.needs_self:
                raise ToolError(f"tool {each.name} is a method. Give it with its object, as `shop.{each.name}`.")
            if each.name in found and found[each.name] is not each:
                raise ToolError(f"two tools are called {each.name!r}. The model tells tools apart by name: rename one.")
            found[each.name] = each
    return found


def _tools_of(given: Any) -> list[Tool[..., Any]]:
    if isinstance(given, Tool):
        return [given]
    if marked := _marked(type(given)):
        return [getattr(given, name) for name in marked]
    if isinstance(given, type) and _marked(given):
        raise ToolError(f"{given.__name__} is a class with tools. Give an object of it: `{given.__name__}(...)`.")
    return [Tool(given)]


def _marked(kind: type) -> list[str]:
    """Names of the methods that are tools, in the order in which they are written."""
    members = {name: value for base in reversed(kind.__mro__) for name, value in vars(base).items()}
    return [name for name, value in members.items() if isinstance(value, Tool)]
