"""What the four APIs have in common: a request becomes an `Ask`, a completion becomes a `Reply`.

JSON ── read by a Request ──> Ask ── drawn (session.py) ──> [Reply] ── written by the same Request ──> JSON, events
"""

from __future__ import annotations

import json
import secrets
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, PositiveInt

from asyncrl.agents.endpoint.refusal import Refusal
from asyncrl.agents.messages import Message, normalise
from asyncrl.errors import RolloutContractError
from asyncrl.types import SamplingParams

Json = dict[str, Any]

MAX_CHOICES = 128
"""Of one request: as many as OpenAI allows."""


@dataclass(frozen=True, slots=True)
class Ask:
    """What a request wants, whatever its dialect."""

    messages: Sequence[Message] = ()
    """In OpenAI's chat form. Empty: `prompts` are to be continued instead."""
    prompts: Sequence[str | Sequence[int]] = ()
    """Raw text or token ids."""
    tools: Sequence[Json] = ()
    """As chat templates take them."""
    n: int = 1
    """Replies to each prompt, or to the messages."""
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    """Strings that end the turn; they are not shown."""
    logprobs: bool = False


@dataclass(frozen=True, slots=True)
class Call:
    """A tool call. `arguments` is JSON in a string."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Reply:
    """One turn of the policy, as clients read it."""

    text: str
    thoughts: str
    calls: tuple[Call, ...]
    finish: Literal["stop", "length"]
    stop: str | None
    """The stop string that ended it."""
    prompt_tokens: int
    completion_tokens: int
    version: int
    """Of the weights that drew its last token."""
    message: Message
    """The turn in OpenAI's chat form, as a later request repeats it."""
    logprobs: Sequence[tuple[str, float]] = ()
    """Text and behaviour log-prob of each drawn token, where they were asked for."""


class Event(NamedTuple):
    """A server-sent event. Without a name where the API gives it none."""

    name: str | None
    data: Json | str

    def encode(self) -> bytes:
        head = f"event: {self.name}\n" if self.name else ""
        data = self.data if isinstance(self.data, str) else json.dumps(self.data)
        return f"{head}data: {data}\n\n".encode()


class Request(BaseModel, ABC):
    """A request of one API: reads itself into an `Ask`, and writes replies as its API would.

    Fields that no subclass names are looked up in `refused` (the answer would be wrong without them) and `ignored`
    (the client gets on without them; the run is told once). All others change nothing and are accepted.
    """

    model_config = ConfigDict(extra="allow")

    refused: ClassVar[Mapping[str, str]] = {}
    """Field -> what to do instead."""
    ignored: ClassVar[Mapping[str, Any]] = {}
    """Field -> the value that asks for nothing."""
    ping: ClassVar[bytes] = b": waiting\n\n"
    """Sent while a stream has nothing to say: a comment, which every reader of event streams skips."""

    model: str = "policy"
    """Any name will do; the answer repeats it."""
    stream: bool | None = False

    @abstractmethod
    def ask(self, past: Mapping[str, Sequence[Message]]) -> Ask:
        """What is wanted. `past`: the conversations of earlier answers by their id, for APIs that refer to them.

        Raises:
            Refusal: something that cannot be honoured.
        """

    @abstractmethod
    def answer(self, ask: Ask, replies: Sequence[Reply]) -> Json:
        """The body of the answer."""

    @abstractmethod
    def events(self, answer: Json) -> Iterator[Event]:
        """The same answer as a stream."""

    def failure(self, refusal: Refusal) -> Event:
        """An error in a stream that has begun."""
        return Event(None, refusal.openai())

    def refuse_unknown(self) -> None:
        """Raise for the first field that cannot be honoured."""
        given = self.model_extra or {}
        for name, instead in self.refused.items():
            if given.get(name):
                raise Refusal(400, f"{name} is not supported: {instead}", param=name, code="unsupported_parameter")

    def unheard(self, params: SamplingParams) -> Iterator[tuple[str, Any]]:
        """Fields, with their values, that ask for something that does not happen."""
        given = self.model_extra or {}
        neutral = {"temperature": params.temperature, "top_p": params.top_p, "top_k": params.top_k, **self.ignored}
        for name, nothing in neutral.items():
            value = given.get(name)
            if value is not None and value != nothing:
                yield name, value


def readable(messages: Sequence[Any]) -> list[Json]:
    """Messages as chat templates take them: text alone, results with the name of their tool.

    Raises:
        Refusal: one is no message, or holds something other than text.
    """
    names: dict[str, str] = {}
    read = []
    for place, message in enumerate(messages):
        try:
            plain = normalise(message if isinstance(message, Mapping) else {})
        except RolloutContractError as error:
            raise Refusal(400, f"message {place}: {error}", param="messages") from None
        for call in plain.get("tool_calls", ()):
            names[str(call.get("id"))] = call["function"]["name"]
        if plain["role"] == "tool" and (answered := str(plain.get("tool_call_id"))) in names:
            plain.setdefault("name", names[answered])
        read.append(plain)
    return read


def function_schema(name: Any, description: Any, parameters: Any, where: str) -> Json:
    """A tool as chat templates take it."""
    if not isinstance(name, str) or not name:
        raise Refusal(400, f"{where}: expected a function with a name, found {name!r}.", param=where)
    return {
        "type": "function",
        "function": {
            "name": name,
            "description": description or "",
            "parameters": parameters or {"type": "object", "properties": {}},
        },
    }


def as_tuple(stop: str | list[str] | None) -> tuple[str, ...]:
    strings = [stop] if isinstance(stop, str) else stop or []
    return tuple(string for string in strings if string)


def new_id(prefix: str) -> str:
    return f"{prefix}{secrets.token_hex(12)}"


def smaller(*limits: PositiveInt | None) -> int | None:
    return min((limit for limit in limits if limit is not None), default=None)
