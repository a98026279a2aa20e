"""Tools: typed Python functions that a model may call.

A tool is shown to the model as a JSON schema made from its signature and docstring. Whatever goes wrong in a call
that the model asked for is an answer to the model, not an exception in the rollout.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, ParamSpec, TypeVar, get_type_hints, overload

import anyio
import anyio.to_thread
from anyio.lowlevel import RunVar
from pydantic import BaseModel, ConfigDict, Field, PydanticUserError, ValidationError, create_model
from pydantic_core import to_json

from asyncrl.errors import AsyncRLError, UserError

P = ParamSpec("P")
R = TypeVar("R")

TOOL_THREADS = 64
"""Synchronous tools that run at once. More than anyio's 40, since they mostly wait for something."""

_threads: RunVar[anyio.CapacityLimiter] = RunVar("asyncrl_tool_threads")


class ToolError(UserError):
    """A function that cannot be shown to a model as a tool."""


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
            type that JSON cannot express.
    """

    def __init__(self, function: Callable[P, R], *, timeout_s: float = 60.0, max_output_chars: int = 8000) -> None:
        self.function = function
        self.name: str = _name_of(function)
        self.timeout_s = timeout_s
        """Longest call. The thread of a synchronous function cannot be stopped; its result is then thrown away."""
        self.max_output_chars = max_output_chars
        """Longer results are cut, and say so."""
        self._arguments = _arguments_model(function, self.name)
        self._is_async = _is_async(function)
        self.schema: dict[str, Any] = {
            "type": "function",
            "function": {
                "name": self.name,
                "description": _description(function),
                "parameters": _parameters(self._arguments, self.name),
            },
        }
        """As chat templates and the OpenAI API take it."""
        functools.update_wrapper(self, function)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return self.function(*args, **kwargs)

    def __repr__(self) -> str:
        return f"Tool({self.name})"

    async def call(self, arguments: Mapping[str, Any] | str) -> str:
        """Run one call of the model and return what the model shall read."""
        return (await self.invoke(arguments)).text

    async def invoke(self, arguments: Mapping[str, Any] | str) -> ToolResult:
        """As `call`, and says whether the call failed.

        Errors of asyncrl itself (such as `RecoverableRolloutError`) and cancellation are raised: a tool that
        finds its own machinery broken can have the whole rollout drawn again.
        """
        try:
            checked = (
                self._arguments.model_validate_json(arguments)
                if isinstance(arguments, str)
                else self._arguments.model_validate(dict(arguments))
            )
        except ValidationError as error:
            return ToolResult(f"Error: bad arguments for {self.name}: {_explain(error)}", error=True)
        named = {field: getattr(checked, field) for field in type(checked).model_fields}
        text: str | None = None
        with anyio.move_on_after(self.timeout_s):
            try:
                text = _as_text(await self._run(named))
            except AsyncRLError:
                raise
            except Exception as error:  # what a tool raises is for the model to read, whatever it is
                return ToolResult(self._cut(f"Error: {type(error).__name__}: {error}"), error=True)
        if text is None:
            return ToolResult(f"Error: {self.name} took longer than {self.timeout_s:g} s.", error=True)
        return ToolResult(self._cut(text))

    async def _run(self, named: dict[str, Any]) -> Any:
        call: Callable[[], Any] = functools.partial(self.function, **named)
        if self._is_async:
            return await call()
        return await anyio.to_thread.run_sync(call, abandon_on_cancel=True, limiter=_limiter())

    def _cut(self, text: str) -> str:
        if len(text) <= self.max_output_chars:
            return text
        return f"{text[: self.max_output_chars]}\n[cut: {self.max_output_chars} of {len(text)} characters]"


@overload
def tool(function: Callable[P, R], /) -> Tool[P, R]: ...


@overload
def tool(*, timeout_s: float = ..., max_output_chars: int = ...) -> Callable[[Callable[P, R]], Tool[P, R]]: ...


def tool(
    function: Callable[P, R] | None = None, /, *, timeout_s: float = 60.0, max_output_chars: int = 8000
) -> Tool[P, R] | Callable[[Callable[P, R]], Tool[P, R]]:
    """Make a typed function, synchronous or async, a tool that a model may call.

    The docstring is what the model reads; an `Args:` section in it describes the parameters. Synchronous functions
    run in a worker thread. As `@tool` or as `@tool(timeout_s=5)`.
    """
    if function is not None:
        return Tool(function)
    return functools.partial(Tool, timeout_s=timeout_s, max_output_chars=max_output_chars)


def _limiter() -> anyio.CapacityLimiter:
    """One for each event loop: a limiter belongs to the loop it was first used in."""
    try:
        return _threads.get()
    except LookupError:
        limiter = anyio.CapacityLimiter(TOOL_THREADS)
        _threads.set(limiter)
        return limiter


def _name_of(function: Callable[..., Any]) -> str:
    name = getattr(function, "__name__", type(function).__name__)
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,63}", name):
        raise ToolError(f"a tool needs a name that a model can write; found {name!r}. Use a function made with `def`.")
    return name


def _is_async(function: Callable[..., Any]) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def _arguments_model(function: Callable[..., Any], name: str) -> type[BaseModel]:
    """A pydantic model with one field per parameter."""
    try:
        hints = get_type_hints(function, include_extras=True)
    except NameError as error:
        raise ToolError(f"tool {name}: a type in its signature is not known where it is defined: {error}.") from None
    described = _argument_descriptions(_doc(function))
    fields: dict[str, Any] = {}
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise ToolError(f"tool {name}: found the parameter {parameter}. Expected parameters with a name each.")
        if parameter.name not in hints:
            raise ToolError(f"tool {name}: parameter {parameter.name!r} has no type. Annotate it, such as `: str`.")
        default = ... if parameter.default is parameter.empty else parameter.default
        text = described.get(parameter.name)
        about = Field(default, description=text) if text else default
        fields[parameter.name] = (hints[parameter.name], about)
    try:
        return create_model(name, __config__=ConfigDict(extra="forbid", protected_namespaces=()), **fields)
    except (PydanticUserError, NameError) as error:
        raise ToolError(f"tool {name}: its parameters cannot be checked: {error}.") from None


def _parameters(arguments: type[BaseModel], name: str) -> dict[str, Any]:
    try:
        schema = arguments.model_json_schema()
    except PydanticUserError as error:
        raise ToolError(f"tool {name}: JSON cannot express its parameters: {error}.") from None
    return {"type": "object", "properties": {}, **_without_titles(schema)}


def _without_titles(schema: dict[str, Any]) -> dict[str, Any]:
    """Titles only repeat names, and cost tokens in every prompt."""
    slim = {key: value for key, value in schema.items() if key not in ("title", "additionalProperties")}
    for key in ("properties", "$defs"):
        if key in slim:
            slim[key] = {name: _without_titles(inner) for name, inner in slim[key].items()}
    return slim


def _doc(function: Callable[..., Any]) -> str:
    return inspect.getdoc(function) or ""


def _description(function: Callable[..., Any]) -> str:
    """The docstring up to its first section."""
    head, *_sections = re.split(r"(?:^|\n)(?:Args|Arguments|Parameters|Returns|Raises|Yields):\s*\n", _doc(function))
    return head.strip()


def _argument_descriptions(doc: str) -> dict[str, str]:
    """The `Args:` section: `name: text` or `name (type): text`, further lines indented deeper."""
    section = re.search(r"(?:^|\n)(?:Args|Arguments|Parameters):\s*\n((?:[ \t]+.*(?:\n|$)|\n)+)", doc)
    if section is None:
        return {}
    entries = re.findall(r"^[ \t]+(\w+)(?: \([^)]*\))?:[ \t]*((?:.*)(?:\n[ \t]{6,}.*)*)", section[1], re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in entries}


def _as_text(result: Any) -> str:
    return result if isinstance(result, str) else to_json(result, fallback=str).decode()


def _explain(error: ValidationError) -> str:
    return "; ".join(
        f"{'.'.join(map(str, fault['loc'])) or 'arguments'}: {fault['msg']}"
        for fault in error.errors(include_url=False, include_input=False, include_context=False)
    )
