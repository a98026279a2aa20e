"""A conversation with the policy: turns of the model, tool calls and their results, until there is an answer.

Context comes from the chat template, completions from the sampler, and both stay as they are (`template.py`,
`transcript.py`), so what `sample` returns holds exactly the tokens that were sampled.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

import anyio

from asyncrl.agents.calls import MalformedCall, ToolCall
from asyncrl.agents.conversation import MALFORMED, Conversation, Drawn
from asyncrl.agents.tools import ToolResult, collect_tools
from asyncrl.agents.transcript import Node
from asyncrl.errors import LimitReached, RolloutContractError, first_failure
from asyncrl.rollout.failures import brief
from asyncrl.sections import Limit, LimitChoice
from asyncrl.types import Rollout

if TYPE_CHECKING:
    from asyncrl.agents.policy import Policy

_LIMITS, _CHOICES = get_args(Limit), get_args(LimitChoice)


@dataclass(frozen=True, slots=True)
class Limits:
    """How far a conversation may go, and what happens there."""

    max_turns: int
    max_tokens: int | None
    """Of one turn; None: `sampling.max_tokens`."""
    max_total_tokens: int | None
    """Of all turns together; None: no limit."""
    choices: LimitChoice | Mapping[Limit, LimitChoice]

    def __post_init__(self) -> None:
        """Raises RolloutContractError: `choices` names something that is no limit, or no choice."""
        asked = self.choices if isinstance(self.choices, Mapping) else dict.fromkeys(_LIMITS, self.choices)
        if not (asked.keys() <= set(_LIMITS) and all(choice in _CHOICES for choice in asked.values())):
            raise RolloutContractError(
                f"on_limit is {self.choices!r}. Expected one of {', '.join(_CHOICES)}, or a dict with one of them for "
                f"some of {', '.join(_LIMITS)}."
            )

    def choice(self, limit: Limit) -> LimitChoice:
        return self.choices if isinstance(self.choices, str) else self.choices.get(limit, "stop")


class Chat:
    """One conversation. Owns its messages and its place in the transcript. Made by `policy.chat(...)`."""

    def __init__(
        self,
        conversation: Conversation,
        policy: Policy,
        messages: str | Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[object],
        limits: Limits,
    ) -> None:
        self.messages: list[dict[str, Any]] = _opening(messages)
        """The conversation so far, as chat templates take it."""
        self.finish_reason: Limit | str | None = None
        """Why it ended: `stop` (an answer), `length` (a turn was cut at its token limit), `total_tokens` (all turns
        together were), `max_turns` (the last turn still called tools), `context` (`max_seq_len` is full); None while
        it goes on."""
        self.turns = 0
        """Turns of the model."""
        self.tool_calls = 0
        """Calls that the model made, malformed ones included."""
        self.tool_errors = 0
        """Calls that failed: malformed, unknown tool, bad arguments, an exception, a time limit."""
        self.drawn_tokens = 0
        """Tokens that the model drew, in all turns."""
        self._conversation = conversation
        self._policy = policy
        self._tools = collect_tools(tools)
        self._schemas = [tool.schema for tool in self._tools.values()]
        self._limits = limits
        self._node = conversation.transcript.root
        self._unread = list(self.messages)  # messages that are not in the transcript yet
        self._tool_seconds: list[float] = []
        self._speaking = False

    async def run(self) -> str:
        """Let the model speak and call tools until it answers or must stop. Returns the text of its last turn.

        The text is without thoughts and tool calls; see `finish_reason` for whether it is an answer.
        """
        text = await self.step()
        while self.finish_reason is None:
            text = await self.step()
        return text

    async def step(self, user_message: str | None = None) -> str:
        """Say something to the model (if given), draw one turn, run the tools it calls. Returns the turn's text.

        While `finish_reason` is None the model waits for its tool results: call `step()` again. After `stop` the
        conversation goes on with another `user_message`.

        Raises:
            RolloutContractError: the conversation cannot go on, or there is nothing to answer; also when the
                opening messages alone are longer than `max_seq_len`.
            LimitReached: a limit with `on_limit` `error`, or one that leaves nothing to train.
        """
        if self._speaking:
            raise RolloutContractError(
                "this chat is in the middle of a turn, and a conversation has one at a time. Await it first; for "
                "several ways on at once give each its own `chat.fork()`."
            )
        self._speaking = True
        try:
            return await self._step(user_message)
        finally:
            self._speaking = False

    async def _step(self, user_message: str | None) -> str:
        self._admit(user_message)
        place = self._conversation.after(self._node, self._unread, self.messages, self._schemas)
        room = self._policy.max_seq_len - self._conversation.transcript.length_to(place.node) - len(place.context)
        if room < 1 and self.turns:
            return self._reach("context")
        limits = self._limits
        left = limits.max_total_tokens - self.drawn_tokens if limits.max_total_tokens is not None else None
        if left is not None and left < 1:
            return self._reach("total_tokens")
        most = min((limit for limit in (limits.max_tokens, left) if limit is not None), default=None)
        drawn = await self._conversation.draw_at(place, self._schemas, max_tokens=most)
        self._node = drawn.node
        self._unread.clear()
        self.turns += 1
        self.drawn_tokens += len(drawn.completion.tokens)
        return await self._take_turn(drawn, room, left)

    def fork(self) -> Chat:
        """Another conversation that begins as this one did up to here: for trying several ways on.

        Both belong to one rollout, and `sample` of either returns both: what they share is trained once.
        """
        twin = Chat(self._conversation, self._policy, self.messages, tools=(), limits=self._limits)
        twin._tools, twin._schemas = self._tools, self._schemas
        twin._node, twin._unread = self._node, list(self._unread)
        twin.finish_reason, twin.turns, twin.drawn_tokens = self.finish_reason, self.turns, self.drawn_tokens
        twin.tool_calls, twin.tool_errors = self.tool_calls, self.tool_errors
        twin._tool_seconds = list(self._tool_seconds)
        return twin

    def sample(self, reward: float, *, turn_rewards: Sequence[float | None] | None = None, **info: Any) -> Rollout:
        """What the rollout function returns: the tokens as they were, only the model's own trained.

        One sequence; a `RolloutRun` of several where the conversation forked. `turn_rewards`: one for each turn of the
        model, in the order in which they were drawn. `info` goes to the rollout log, beside the messages and how the
        conversation ended.
        """
        transcript = self._conversation.transcript
        record: dict[str, Any] = {
            "finish_reason": self.finish_reason,
            "turns": self.turns,
            "tool_calls": self.tool_calls,
            "tool_errors": self.tool_errors,
        }
        if self._tool_seconds:
            record["tool_seconds"] = list(self._tool_seconds)

        def about(leaf: Node) -> Mapping[str, Any]:
            messages = self.messages if leaf is self._node else leaf.messages
            return {"messages": [dict(message) for message in messages], **record, **transcript.account(leaf), **info}

        return transcript.rollout(reward, about, turn_rewards)

    def _admit(self, user_message: str | None) -> None:
        if self.finish_reason not in (None, "stop"):
            raise RolloutContractError(
                f"this chat has ended with finish_reason={self.finish_reason!r} and cannot go on. "
                "Check chat.finish_reason before another step; it goes on after None and 'stop' only."
            )
        if self.turns >= self._limits.max_turns:
            raise RolloutContractError(
                f"this chat has had its max_turns={self._limits.max_turns} turns. Give policy.chat(...) more."
            )
        if user_message is not None:
            self._say({"role": "user", "content": user_message})
        if not self._unread:
            state = "the model has answered and there is nothing new" if self.turns else "there are no messages yet"
            raise RolloutContractError(f"{state} to answer. Give chat.step(...) a user message.")
        if self._unread[-1].get("role") == "assistant":
            raise RolloutContractError(
                "the messages end with the assistant's own, and the model would answer itself. Expected a user's or a "
                "tool's message at the end: leave the answer out, if these are rows with answers to learn from."
            )
        self.finish_reason = None

    async def _take_turn(self, drawn: Drawn, room: int, left: int | None) -> str:
        """Read the turn that was drawn, run its tools, and decide whether the conversation goes on."""
        count, calls = len(drawn.completion.tokens), drawn.turn.calls
        self.messages.append(drawn.message)
        drawn.node.messages = list(self.messages)
        self.tool_calls += len(calls)
        if drawn.completion.finish_reason != "stop":
            self._reach("context" if count >= room else "total_tokens" if count == left else "length", cut=True)
        elif not calls:
            self.finish_reason = "stop"
        elif self.turns == self._limits.max_turns:
            self._reach("max_turns")  # nobody would read the results, so the tools do not run
        else:
            await self._answer_calls(calls, drawn.message["tool_calls"])
        return drawn.turn.text

    def _reach(self, limit: Limit, *, cut: bool = False) -> str:
        """A limit ends the conversation. `cut`: in the middle of a turn."""
        self.finish_reason = limit
        choice = self._limits.choice(limit)
        if choice == "truncate" and cut and self.turns > 1:
            assert self._node.parent is not None
            self._conversation.transcript.drop(self._node, limit)
            self._node = self._node.parent
            self.messages.pop()
            self.turns -= 1
        elif choice == "error" or (choice == "truncate" and cut):
            nothing = ", and without the turn that it cut there is nothing to train" if choice == "truncate" else ""
            raise LimitReached(
                f"the conversation came to its limit {limit!r} in turn {self.turns}, with {self.drawn_tokens} tokens "
                f"drawn{nothing} (on_limit={choice!r})."
            )
        return ""

    async def _answer_calls(
        self, calls: Sequence[ToolCall | MalformedCall], written: Sequence[Mapping[str, Any]]
    ) -> None:
        """Run all calls of one turn at once; their results come in the order of the calls."""
        results, seconds = [ToolResult("")] * len(calls), [0.0] * len(calls)

        async def answer(index: int) -> None:
            began = time.monotonic()
            results[index] = await self._invoke(calls[index])
            seconds[index] = round(time.monotonic() - began, 3)

        if len(calls) == 1:
            await answer(0)
        else:
            try:
                async with anyio.create_task_group() as group:
                    for index in range(len(calls)):
                        group.start_soon(answer, index)
            except BaseExceptionGroup as failures:  # as that of a single call
                raise first_failure(failures) from None
        self._tool_seconds += seconds
        for call, asked, result in zip(calls, written, results, strict=True):
            self.tool_errors += result.error
            name = call.name if isinstance(call, ToolCall) else MALFORMED
            self._say({"role": "tool", "name": name, "tool_call_id": asked["id"], "content": result.text})

    async def _invoke(self, call: ToolCall | MalformedCall) -> ToolResult:
        if isinstance(call, MalformedCall):
            return ToolResult(f"Error: this tool call cannot be read: {call.reason}.", error=True)
        tool = self._tools.get(call.name)
        if tool is None:
            known = ", ".join(self._tools) or "none"
            return ToolResult(f"Error: there is no tool {call.name!r}. There is: {known}.", error=True)
        return await tool.invoke(call.arguments)

    def _say(self, message: dict[str, Any]) -> None:
        self.messages.append(message)
        self._unread.append(message)


def _opening(messages: str | Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Copies of the messages that a conversation begins with."""
    if isinstance(messages, str):
        return [{"role": "user", "content": messages}]
    given = list(messages) if isinstance(messages, Iterable) and not isinstance(messages, Mapping) else None
    if given is None or not all(isinstance(message, Mapping) for message in given):
        raise RolloutContractError(
            f"policy.chat was given {brief(messages)} for its messages. Expected a text, or a list such as "
            '[{"role": "user", "content": "..."}].'
        )
    return [dict(message) for message in given]
