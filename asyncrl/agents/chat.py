"""A conversation with the policy: turns of the model, tool calls and their results, until there is an answer.

Context comes from the chat template, completions from the sampler, and both stay as they are (`template.py`,
`transcript.py`), so what `sample` returns holds exactly the tokens that were sampled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import anyio

from asyncrl.agents.calls import MalformedCall, ToolCall, Turn, read_turn
from asyncrl.agents.tools import Tool, ToolResult
from asyncrl.agents.transcript import Transcript
from asyncrl.errors import RolloutContractError
from asyncrl.types import Completion, RolloutSample

if TYPE_CHECKING:
    from asyncrl.agents.policy import Policy
    from asyncrl.agents.template import TurnTemplate

ChatFinish = Literal["stop", "length", "max_turns", "context"]


class Chat:
    """One conversation. Owns its messages and its transcript. Made by `policy.chat(...)`."""

    def __init__(
        self,
        policy: Policy,
        template: TurnTemplate,
        messages: str | Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Tool[..., Any] | Callable[..., Any]] = (),
        max_turns: int = 8,
        max_tokens: int | None = None,
    ) -> None:
        opening = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
        self.messages: list[dict[str, Any]] = [dict(message) for message in opening]
        """The conversation so far, as chat templates take it."""
        self.finish_reason: ChatFinish | None = None
        """Why it ended: `stop` (an answer), `length` (a turn was cut at its token limit), `max_turns` (the last turn
        still called tools), `context` (`max_seq_len` is full); None while it goes on."""
        self.turns = 0
        """Turns of the model."""
        self.tool_calls = 0
        """Calls that the model made, malformed ones included."""
        self.tool_errors = 0
        """Calls that failed: malformed, unknown tool, bad arguments, an exception, a time limit."""
        self._policy = policy
        self._template = template
        self._tools = {tool.name: tool for tool in map(_as_tool, tools)}
        self._schemas = [tool.schema for tool in self._tools.values()]
        self._max_turns = max_turns
        self._max_tokens = max_tokens
        self._stops = tuple(dict.fromkeys((template.end_of_turn, *policy.stop_token_ids)))
        self._transcript = Transcript()
        self._unread = list(self.messages)  # messages that are not in the transcript yet

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
        """
        self._admit(user_message)
        context = self._render_unread()
        room = self._policy.max_seq_len - len(self._transcript) - len(context)
        if room < 1 and self.turns:
            self.finish_reason = "context"
            return ""
        completion = await self._policy.generate(
            [*self._transcript.tokens, *context], max_tokens=self._max_tokens, stop_token_ids=self._stops
        )
        self._transcript.add_context(context)
        self._transcript.add_completion(completion)
        self._unread.clear()
        self.turns += 1
        return await self._take_turn(completion, room)

    def sample(self, reward: float, **info: Any) -> RolloutSample:
        """What the rollout function returns: the tokens as they were, only the model's own trained.

        `info` goes to the rollout log, beside the messages and how the conversation ended.
        """
        record = {
            "messages": [dict(message) for message in self.messages],
            "finish_reason": self.finish_reason,
            "turns": self.turns,
            "tool_calls": self.tool_calls,
            "tool_errors": self.tool_errors,
            **info,
        }
        return self._transcript.sample(reward, record)

    def _admit(self, user_message: str | None) -> None:
        if self.finish_reason not in (None, "stop"):
            raise RolloutContractError(
                f"this chat has ended with finish_reason={self.finish_reason!r} and cannot go on. "
                "Check chat.finish_reason before another step; it goes on after None and 'stop' only."
            )
        if self.turns >= self._max_turns:
            raise RolloutContractError(
                f"this chat has had its max_turns={self._max_turns} turns. Give policy.chat(...) more."
            )
        if user_message is not None:
            self._say({"role": "user", "content": user_message})
        if not self._unread:
            raise RolloutContractError(
                "the model has answered and there is nothing new to answer. Give chat.step(...) a user message."
            )
        self.finish_reason = None

    def _render_unread(self) -> list[int]:
        if self._transcript.tokens:
            return self._template.continuation(self._unread, self._schemas)
        return self._template.opening(self._unread, self._schemas)

    async def _take_turn(self, completion: Completion, room: int) -> str:
        """Read the turn that was drawn, run its tools, and decide whether the conversation goes on."""
        stopped = completion.finish_reason == "stop"
        spoken = completion.tokens[:-1] if stopped else completion.tokens
        turn = read_turn(self._policy.tokenizer.decode(spoken, skip_special_tokens=False))
        self.messages.append(_as_message(turn, self.tool_calls))
        first, self.tool_calls = self.tool_calls, self.tool_calls + len(turn.calls)
        if not stopped:
            self.finish_reason = "context" if len(completion.tokens) >= room else "length"
        elif not turn.calls:
            self.finish_reason = "stop"
        elif self.turns == self._max_turns:
            self.finish_reason = "max_turns"  # nobody would read the results, so the tools do not run
        else:
            await self._answer_calls(turn.calls, first)
        return turn.text

    async def _answer_calls(self, calls: Sequence[ToolCall | MalformedCall], first: int) -> None:
        """Run all calls of one turn at once; their results come in the order of the calls."""
        results = [ToolResult("")] * len(calls)

        async def answer(index: int) -> None:
            results[index] = await self._invoke(calls[index])

        if len(calls) == 1:
            await answer(0)
        else:
            async with anyio.create_task_group() as group:
                for index in range(len(calls)):
                    group.start_soon(answer, index)
        for index, (call, result) in enumerate(zip(calls, results, strict=True)):
            self.tool_errors += result.error
            name = call.name if isinstance(call, ToolCall) else "malformed"
            self._say({"role": "tool", "name": name, "tool_call_id": _call_id(first + index), "content": result.text})

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


def _as_tool(tool: Tool[..., Any] | Callable[..., Any]) -> Tool[..., Any]:
    return tool if isinstance(tool, Tool) else Tool(tool)


def _call_id(number: int) -> str:
    """Nine letters and digits: the strictest of the known templates (Mistral) asks for that."""
    return f"call{number:05d}"


def _as_message(turn: Turn, first: int) -> dict[str, Any]:
    """The turn as a message, for people and logs: it is never rendered to tokens again."""
    message: dict[str, Any] = {"role": "assistant", "content": turn.text}
    if turn.thoughts:
        message["reasoning_content"] = turn.thoughts
    if turn.calls:
        message["tool_calls"] = [
            {"type": "function", "id": _call_id(first + index), "function": _as_function(call)}
            for index, call in enumerate(turn.calls)
        ]
    return message


def _as_function(call: ToolCall | MalformedCall) -> dict[str, Any]:
    if isinstance(call, MalformedCall):
        return {"name": "malformed", "arguments": call.text}
    return {"name": call.name, "arguments": call.arguments}
