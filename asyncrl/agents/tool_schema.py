"""What a model is shown of a function, and how its arguments are checked: from signature and docstring."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import CodeType
from typing import Any, get_type_hints
from weakref import WeakKeyDictionary

from pydantic import BaseModel, ConfigDict, Field, PydanticUserError, ValidationError, create_model

from asyncrl.errors import UserError
from asyncrl.rollout.failures import brief

Arguments = Mapping[str, Any] | str
"""A mapping, or the JSON text of one."""

_SCALARS = (type(None), bool, int, float, str, bytes)


class ToolError(UserError):
    """A function that cannot be shown to a model as a tool."""


class BadArguments(ValueError):
    """Arguments that a tool does not take; the message is for the model to read."""


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Signature:
    """How a tool looks from outside."""

    name: str
    description: str
    parameters: Mapping[str, Any]
    """A JSON schema of type `object`."""
    check: Callable[[Arguments], dict[str, Any]]
    """Arguments by name, each of its type. Raises `BadArguments`."""
    is_async: bool = True
    needs_self: bool = False
    """It is a method that is not bound to an object yet."""

    @property
    def schema(self) -> dict[str, Any]:
        """As chat templates and the OpenAI API take it."""
        about = {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}
        return {"type": "function", "function": about}


def signature_of(function: Callable[..., Any]) -> Signature:
    """Made once for all functions of the same code: building one takes half a millisecond, and functions inside of
    rollout functions, as bound methods, are made for every rollout.

    Raises:
        ToolError: `function` has `*args`, `**kwargs`, positional-only or unannotated parameters, or a type that
            JSON cannot express; or it yields.
    """
    plain = getattr(function, "__func__", function)
    code = getattr(plain, "__code__", None)
    if code is None:
        return _build(function)
    facts = _Facts.of(function, plain)
    known = _known.get(code)
    if known is None or not known[0].same(facts):
        known = _known[code] = facts, _build(function)
    return known[1]


@dataclass(frozen=True, slots=True)
class _Facts:
    """Everything beside the code that a signature is made from."""

    bound: bool
    text: tuple[str, str | None]
    annotations: dict[str, Any]
    defaults: tuple[Any, ...]
    names: dict[str, Any]

    @classmethod
    def of(cls, function: Callable[..., Any], plain: Any) -> _Facts:
        defaults = (*(plain.__defaults__ or ()), *(plain.__kwdefaults__ or {}).values())
        bound = plain is not function
        return cls(bound, (plain.__name__, plain.__doc__), plain.__annotations__, defaults, plain.__globals__)

    def same(self, other: _Facts) -> bool:
        return (
            self.bound == other.bound
            and self.text == other.text
            and self.names is other.names
            and self.annotations == other.annotations
            and len(self.defaults) == len(other.defaults)
            and all(map(_same_default, self.defaults, other.defaults))
        )


_known: WeakKeyDictionary[CodeType, tuple[_Facts, Signature]] = WeakKeyDictionary()


def _same_default(one: Any, other: Any) -> bool:
    """Whether both look alike in a schema. What `==` means for unknown types is not asked; True is not 1 here."""
    return one is other or (type(one) is type(other) and isinstance(one, _SCALARS) and bool(one == other))


def _build(function: Callable[..., Any]) -> Signature:
    if not callable(function):
        raise ToolError(
            f"a tool is a function, found {brief(function)}. Expected a function whose parameters have types, or an "
            "object with methods marked @asyncrl.tool (below @classmethod, if there is one)."
        )
    name = _name_of(function)
    if inspect.isasyncgenfunction(function):
        raise ToolError(f"tool {name}: it yields, and the model reads one result. Collect the parts and return them.")
    arguments, needs_self = _arguments_model(function, name)

    def check(given: Arguments) -> dict[str, Any]:
        try:
            if isinstance(given, str):
                checked = arguments.model_validate_json(given)
            else:
                checked = arguments.model_validate(dict(given))
        except ValidationError as error:
            raise BadArguments(_explain(error)) from None
        return {parameter: getattr(checked, parameter) for parameter in arguments.model_fields}

    return Signature(
        name,
        _description(function),
        _parameters(arguments, name),
        check,
        is_async=_is_async(function),
        needs_self=needs_self,
    )


def _name_of(function: Callable[..., Any]) -> str:
    name = getattr(function, "__name__", type(function).__name__)
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,63}", name):
        raise ToolError(f"a tool needs a name that a model can write; found {name!r}. Use a function made with `def`.")
    return name


def _is_async(function: Callable[..., Any]) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def _arguments_model(function: Callable[..., Any], name: str) -> tuple[type[BaseModel], bool]:
    """A pydantic model with one field per parameter; and whether there is a `self` before them."""
    try:
        hints = get_type_hints(function, include_extras=True)
    except NameError as error:
        raise ToolError(f"tool {name}: a type in its signature is not known where it is defined: {error}.") from None
    parameters = list(inspect.signature(function).parameters.values())
    needs_self = bool(parameters) and parameters[0].name == "self" and "self" not in hints
    described = _argument_descriptions(_doc(function))
    fields: dict[str, Any] = {}
    for parameter in parameters[needs_self:]:
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise ToolError(f"tool {name}: found the parameter {parameter}. Expected parameters with a name each.")
        if parameter.name not in hints:
            raise ToolError(f"tool {name}: parameter {parameter.name!r} has no type. Annotate it, such as `: str`.")
        default = ... if parameter.default is parameter.empty else parameter.default
        text = described.get(parameter.name)
        about = Field(default, description=text) if text else default
        fields[parameter.name] = (hints[parameter.name], about)
    try:
        model = create_model(name, __config__=ConfigDict(extra="forbid", protected_namespaces=()), **fields)
    except (PydanticUserError, NameError) as error:
        raise ToolError(f"tool {name}: its parameters cannot be checked: {error}.") from None
    return model, needs_self


def _parameters(arguments: type[BaseModel], name: str) -> dict[str, Any]:
    try:
        schema = arguments.model_json_schema()
    except PydanticUserError as error:
        raise ToolError(f"tool {name}: JSON cannot express its parameters: {error}.") from None
    return {"type": "object", "properties": {}, **without_titles(schema)}


def without_titles(schema: Any) -> Any:
    """Titles only repeat names, and cost tokens in every prompt. A schema may also be just `true`."""
    if not isinstance(schema, Mapping):
        return schema
    slim = {key: value for key, value in schema.items() if key not in ("title", "additionalProperties")}
    for key in ("properties", "$defs"):
        if isinstance(slim.get(key), Mapping):
            slim[key] = {name: without_titles(inner) for name, inner in slim[key].items()}
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


def _explain(error: ValidationError) -> str:
    return "; ".join(
        f"{'.'.join(map(str, fault['loc'])) or 'arguments'}: {fault['msg']}"
        for fault in error.errors(include_url=False, include_input=False, include_context=False)
    )
