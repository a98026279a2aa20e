"""From messages to a place in the transcript: which turns these messages go on from, and what is new in them.

`policy.chat` knows where it stands; an agent program behind the endpoint sends the whole history with every call.
Either way only what is new is tokenised:

    keep      a history is known by its messages. Found: the drawn tokens stay, thoughts included, and the template is
              asked for what comes between two turns.
    render    a history is rendered as text. The turns whose text begins it stay; the rest is context. What a template
              rewrites (thoughts that are taken out) makes another branch.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Literal, get_args

from asyncrl.agents.calls import MalformedCall, ToolCall, Turn
from asyncrl.agents.messages import Message, normalise
from asyncrl.agents.stops import before_stop, cut_at_stop
from asyncrl.agents.transcript import Node, Transcript
from asyncrl.errors import LimitReached, ModelError, RolloutContractError
from asyncrl.types import Completion

if TYPE_CHECKING:
    from asyncrl.agents.policy import Policy

History = Literal["keep", "render"]
MOST_TURNS = 4096
"""Of one rollout, all branches together. An agent that forks without end is stopped here; others come nowhere near."""
MALFORMED = "malformed"
"""Stands for the name of a tool where a call cannot be read."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a turn will be drawn."""

    node: Node
    """The turn that it goes on from, or the root."""
    context: list[int]
    """What the policy reads since then."""
    cause: str = "branch"
    """Why this is a fork, if it is one."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """One turn of the policy, as tokens and as words."""

    turn: Turn
    message: dict[str, Any]
    """The assistant message, as the OpenAI API has it."""
    completion: Completion
    prompt_tokens: int
    node: Node


class Conversation:
    """The conversations of one rollout. Owns their transcript. Draws may run at the same time.

    Args:
        policy: Who speaks.
        history: What the policy reads of its earlier turns (`Config.chat.history`).
        realign_tokens: Most tokens of a turn that may be given up instead of forking (`Config.chat.realign_tokens`).
    """

    def __init__(self, policy: Policy, *, history: History | None = None, realign_tokens: int = 0) -> None:
        self.transcript = Transcript(policy.totals)
        self._policy = policy
        self._template = policy.template
        if history not in (None, *get_args(History)):
            raise RolloutContractError(
                f"history is {history!r}. Expected one of {', '.join(get_args(History))}, or None."
            )
        self._history = history
        self._realign_tokens = realign_tokens
        self._stops = tuple(dict.fromkeys((self._template.end_of_turn, *policy.stop_token_ids)))
        self._known: dict[bytes, Node] = {}
        self._calls = 0

    async def draw(
        self,
        messages: Sequence[Message],
        tools: Sequence[Message] = (),
        *,
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
    ) -> Drawn:
        """Let the policy answer these messages, the whole history of a conversation.

        Raises:
            RolloutContractError: there is nothing to answer, or no room for an answer.
            ModelError: the chat template cannot render the messages.
            SamplerRequestError: the sampler refused or lost this request.
        """
        trail = _Trail(messages, tools) if self._history != "render" else None
        place = self._locate(messages, tools, trail)
        drawn = await self.draw_at(place, tools, max_tokens=max_tokens, stop=stop)
        drawn = replace(drawn, message=_for_programs(drawn))
        drawn.node.messages = [*messages, drawn.message]
        if trail is not None:
            self._known[trail.extend(drawn.message)] = drawn.node
        return drawn

    async def draw_tokens(
        self,
        token_ids: Sequence[int],
        *,
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
    ) -> Drawn:
        """Let the policy go on from these tokens. Turns that they begin with are extended.

        Raises: as `draw`.
        """
        return await self.draw_at(self._by_tokens(list(token_ids)), max_tokens=max_tokens, stop=stop)

    async def draw_at(
        self,
        place: Place,
        tools: Sequence[Message] = (),
        *,
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
    ) -> Drawn:
        """Draw one turn at a place in the transcript.

        Besides the model's stop tokens and the template's end of a turn, the strings of `stop` end it; they are no
        part of its text.
        """
        if len(self.transcript.turns) >= MOST_TURNS:
            raise LimitReached(
                f"this rollout has drawn {MOST_TURNS} turns, more than any agent needs: does it fork without end?"
            )
        tokens = [*self.transcript.tokens_to(place.node), *place.context]
        began = time.monotonic()
        place.node.drawing += 1
        try:
            completion = await self._policy.generate(tokens, max_tokens=max_tokens, stop_token_ids=self._stops)
        finally:
            place.node.drawing -= 1
        seconds = time.monotonic() - began
        completion = cut_at_stop(completion, stop, self._decode)
        spoken = completion.tokens[:-1] if completion.finish_reason == "stop" else completion.tokens
        turn = self._template.read(before_stop(self._decode(spoken), stop), tools)
        message = as_message(turn, self._calls)
        self._calls += len(turn.calls)
        node = self.transcript.add(place.node, place.context, completion, place.cause)
        node.seconds = seconds
        return Drawn(turn, message, completion, len(tokens), node)

    # Places

    def _locate(self, messages: Sequence[Message], tools: Sequence[Message], trail: _Trail | None) -> Place:
        """The place where these messages, a whole history, are answered."""
        if not messages or messages[-1]["role"] == "assistant":
            raise RolloutContractError(
                "there is nothing to answer: the messages are empty or end with the assistant's own. "
                "Expected a user's or a tool's message at the end."
            )
        place = self._by_messages(messages, tools, trail.keys) if trail is not None else None
        return place if place is not None else self._by_text(messages, tools)

    def after(
        self, node: Node, unread: Sequence[Message], messages: Sequence[Message], tools: Sequence[Message]
    ) -> Place:
        """The place of `messages`, of which all but `unread` are known to end at `node`."""
        if self._history != "render":
            if node is self.transcript.root:
                return Place(node, self._template.opening(messages, tools))
            context = self._continuation(node, unread, messages, tools)
            if context is not None:
                return Place(node, context)
        return self._by_text(messages, tools)

    def _by_messages(
        self, messages: Sequence[Message], tools: Sequence[Message], keys: Sequence[bytes]
    ) -> Place | None:
        """The longest history that is known by its messages. None: the template cannot go on from it."""
        for count in range(len(messages) - 1, 0, -1):
            node = self._known.get(keys[count - 1])
            if node is not None:
                context = self._continuation(node, messages[count:], messages, tools)
                return None if context is None else Place(node, context)
        rewritten = any(message["role"] == "assistant" for message in messages)
        cause = "history rewritten" if rewritten else "new conversation"
        return Place(self.transcript.root, self._template.opening(messages, tools), cause)

    def _continuation(
        self, node: Node, unread: Sequence[Message], messages: Sequence[Message], tools: Sequence[Message]
    ) -> list[int] | None:
        system = messages[0]["role"] in ("system", "developer")
        try:
            context = self._template.continuation(unread, tools, system=system)
        except ModelError as refusal:
            if self._history == "keep":
                raise
            self._policy.warn_once("a chat forks where the chat template cannot join turns", str(refusal))
            return None
        if node.completion.finish_reason != "stop":
            return [self._template.end_of_turn, *context]  # the turn was cut before it
        return context

    def _by_text(self, messages: Sequence[Message], tools: Sequence[Message]) -> Place:
        """The turns whose text begins the rendered history."""
        text = self._template.text(messages, tools)
        node, at = self.transcript.root, 0
        while True:
            following = next(
                (turn for turn in reversed(node.children) if text.startswith(self._text_of(turn), at)), None
            )
            if following is None:
                break
            node, at = following, at + len(self._text_of(following))
        for turn in reversed(node.children):
            if self._realigned(turn, lambda begun: text.startswith(self._decode(begun), at)):
                return Place(turn, self._template.encode(text[at + len(self._text_of(turn)) :]))
        return Place(node, self._template.encode(text[at:]), "history rendered differently")

    def _by_tokens(self, tokens: list[int]) -> Place:
        """The turns whose tokens begin `tokens`."""
        node, at = self.transcript.root, 0
        while (following := _next_turn(node, tokens, at)) is not None:
            at += len(following.context) + len(following.completion.tokens)
            node = following
        for turn in reversed(node.children):
            if self._realigned(turn, lambda begun: tokens[at : at + len(begun)] == begun):
                return Place(turn, tokens[at + len(turn.context) + len(turn.completion.tokens) :])
        return Place(node, tokens[at:], "other tokens")

    def _realigned(self, turn: Node, begins: Callable[[list[int]], bool]) -> bool:
        """Give up the last tokens of a turn, so few that the history begins with the others; False if it cannot be.

        A turn that others go on from is theirs, too, and stays whole.
        """
        drawn = turn.completion.tokens
        if turn.children or turn.drawing:
            return False
        for kept in range(len(drawn) - 1, max(len(drawn) - self._realign_tokens, 1) - 1, -1):
            if begins([*turn.context, *drawn[:kept]]):
                self.transcript.shorten(turn, kept)
                return True
        return False

    def _text_of(self, node: Node) -> str:
        if node.text is None:
            node.text = self._decode([*node.context, *node.completion.tokens])
        return node.text

    def _decode(self, tokens: Sequence[int]) -> str:
        text: str = self._policy.tokenizer.decode(tokens, skip_special_tokens=False)
        return text


def _next_turn(node: Node, tokens: list[int], at: int) -> Node | None:
    """The turn after `node` that `tokens` go through."""
    for turn in reversed(node.children):
        drawn = at + len(turn.context)
        end = drawn + len(turn.completion.tokens)
        if tokens[at:drawn] == list(turn.context) and tokens[drawn:end] == list(turn.completion.tokens):
            return turn
    return None


def as_message(turn: Turn, first_call: int) -> dict[str, Any]:
    """The turn as a message of the OpenAI API. Its calls are numbered from `first_call` on.

    One that cannot be read is among them, so that it is answered like every other.
    """
    message: dict[str, Any] = {"role": "assistant", "content": turn.text}
    if turn.thoughts:
        message["reasoning_content"] = turn.thoughts
    if turn.calls:
        message["tool_calls"] = [
            {"type": "function", "id": call_id(first_call + index), "function": _as_function(call)}
            for index, call in enumerate(turn.calls)
        ]
    return message


def _for_programs(drawn: Drawn) -> dict[str, Any]:
    """The message for an agent program: what is no readable call is text, as it would be with any other model."""
    malformed = [call.text for call in drawn.turn.calls if isinstance(call, MalformedCall)]
    if not malformed:
        return drawn.message
    calls = [call for call in drawn.message["tool_calls"] if call["function"]["name"] != MALFORMED]
    message = {**drawn.message, "content": "\n".join(filter(None, [drawn.turn.text, *malformed])), "tool_calls": calls}
    if not calls:
        del message["tool_calls"]
    return message


def call_id(number: int) -> str:
    """Nine letters and digits: the strictest of the known templates (Mistral) asks for that."""
    return f"call{number:05d}"


def _as_function(call: ToolCall | MalformedCall) -> dict[str, Any]:
    if isinstance(call, MalformedCall):
        return {"name": MALFORMED, "arguments": call.text}
    return {"name": call.name, "arguments": call.arguments}


class _Trail:
    """A key for the history up to each message. What clients lose or invent is left out: ids, thoughts, and that a
    number is written as 1.0."""

    def __init__(self, messages: Sequence[Message], tools: Sequence[Message]) -> None:
        self._digest = blake2b(canonical(tools), digest_size=16)
        self.keys = [self.extend(message) for message in messages]

    def extend(self, message: Message) -> bytes:
        """The key of the history that goes on with this message."""
        said = normalise(message)
        functions = [call["function"] for call in said.get("tool_calls") or ()]
        calls = [(function["name"], _whole(function["arguments"])) for function in functions]
        self._digest.update(canonical([said["role"], (said.get("content") or "").strip(), calls]))
        return self._digest.digest()


def _whole(value: Any) -> Any:
    """With 1 for 1.0, as every client in JavaScript writes it."""
    if isinstance(value, dict):
        return {key: _whole(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_whole(inner) for inner in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def canonical(value: Any) -> bytes:
    return _canonical_json(value).encode()


_canonical_json = json.JSONEncoder(sort_keys=True, separators=(",", ":"), default=str).encode
