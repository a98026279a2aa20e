"""One rollout as the endpoint sees it: what was asked under its key, and the limits on that."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import anyio

from asyncrl.agents.conversation import canonical
from asyncrl.agents.endpoint.refusal import Refusal
from asyncrl.agents.endpoint.request import Ask, Call, Reply, Request, smaller
from asyncrl.agents.messages import Message
from asyncrl.agents.stops import before_stop, first_stop
from asyncrl.errors import ContextFull, first_failure

if TYPE_CHECKING:
    from asyncrl.agents.conversation import Drawn
    from asyncrl.agents.policy import Policy

CONCURRENT_DRAWS = 64
"""Draws of one rollout that are under way at once; others wait in line. An agent that branches without end then
takes a share of the sampler and not all of it."""

MOST_CHARS_PER_TOKEN = 32
"""No text that agents read comes near it on average. What is longer is refused unread: to make tokens of 32 MB would
hold all rollouts up for half a minute."""

GONE = "the client closed the connection"


class Session:
    """The calls under one key. Owns the responses that later calls may refer to, and the draws under way."""

    def __init__(self, policy: Policy, max_calls: int) -> None:
        self.policy = policy
        self.past: dict[str, Sequence[Message]] = {}
        """Id of a response -> its conversation, the response included."""
        self._said: dict[bytes, Message] = {}
        self._max_calls = max_calls
        self._calls = 0
        self._room = anyio.CapacityLimiter(CONCURRENT_DRAWS)
        self._draws: set[asyncio.Task[list[Drawn]]] = set()
        self._closed = False

    def begin(self, request: Request, ask: Ask) -> asyncio.Task[list[Drawn]]:
        """Start to draw what is asked for. The task is cancelled when the rollout ends.

        Raises:
            Refusal: there is nothing to answer, the rollout has used up its calls, or it has ended.
            ContextFull: as `check_length`.
        """
        if self._closed:  # while the body was read
            raise ended()
        for name, value in request.unheard(self.policy.params):
            self.policy.warn_once(
                f"agents ask the endpoint for {name}, which is not honoured",
                f"asked: {json.dumps(value)[:200]}. Tokens are drawn as the run's config says, and nothing restricts "
                "what the policy may say; docs/endpoint.md has the list.",
            )
        if ask.messages and ask.messages[-1]["role"] == "assistant":
            raise Refusal(400, "the messages end with the assistant's own: expected something to answer.")
        self.check_length(ask)
        draws = ask.n * (len(ask.prompts) or 1)
        if self._calls + draws > self._max_calls:
            raise Refusal(
                429,
                f"this rollout has had its endpoint.max_calls={self._max_calls} calls. Is its agent in a loop? If not, "
                "raise the setting.",
                code="rate_limit_exceeded",
            )
        self._calls += draws
        task = asyncio.get_running_loop().create_task(self._draw_all(ask))
        self._draws.add(task)
        task.add_done_callback(self._ended)
        return task

    def check_length(self, ask: Ask) -> None:
        """Raises ContextFull: what is asked is so long that nobody need count its tokens."""
        most = self.policy.max_seq_len
        longest = max([sum(len(message["content"]) for message in ask.messages), *map(len, ask.prompts)])
        if longest > MOST_CHARS_PER_TOKEN * most:
            raise ContextFull(f"the context has {longest} characters, and max_seq_len is {most} tokens.")

    def replies(self, ask: Ask, drawn: Sequence[Drawn]) -> list[Reply]:
        return [self._reply(ask, one) for one in drawn]

    def remember(self, response_id: str, ask: Ask, reply: Reply) -> None:
        """Each message is kept once: many clients send the whole history with every call and refer to none of it."""
        self.past[response_id] = [self._said.setdefault(canonical(one), one) for one in (*ask.messages, reply.message)]

    def unread(self, drawn: Sequence[Drawn], cause: str) -> None:
        """Nobody has read these turns: they are not trained, unless another call has gone on from them."""
        for one in drawn:
            if not one.node.children and not one.node.drawing:
                self.policy.captured.transcript.drop(one.node, cause)

    def lost(self, cause: str) -> None:
        """A call was broken off before its turn was drawn."""
        self.policy.captured.transcript.broke_off(cause)

    def _ended(self, task: asyncio.Task[list[Drawn]]) -> None:
        self._draws.discard(task)
        if not task.cancelled():
            task.exception()  # seen, also where the client has gone and nobody asks for it

    def close(self) -> None:
        """The rollout has ended. Its draws are cancelled, and whoever waits for them says so."""
        self._closed = True
        for task in tuple(self._draws):
            task.cancel()

    async def _draw_all(self, ask: Ask) -> list[Drawn]:
        """All replies, or none: those that are there when another fails are taken back."""
        drawn: list[Drawn | None] = [None] * (ask.n * (len(ask.prompts) or 1))
        if len(drawn) == 1:
            return [await self._draw(ask, 0)]

        async def fill(place: int) -> None:
            drawn[place] = await self._draw(ask, place)

        try:
            async with anyio.create_task_group() as group:
                for place in range(len(drawn)):
                    group.start_soon(fill, place)
        except BaseException as error:
            self.unread([one for one in drawn if one is not None], "another choice of its call failed")
            if isinstance(error, BaseExceptionGroup):
                raise first_failure(error) from None
            raise
        return [one for one in drawn if one is not None]

    async def _draw(self, ask: Ask, place: int) -> Drawn:
        async with self._room:
            conversation = self.policy.captured
            max_tokens = smaller(ask.max_tokens, self.policy.params.max_tokens)
            if not ask.prompts:
                return await conversation.draw(ask.messages, ask.tools, max_tokens=max_tokens, stop=ask.stop)
            prompt = ask.prompts[place // ask.n]
            tokens = self.policy.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
            return await conversation.draw_tokens(tokens, max_tokens=max_tokens, stop=ask.stop)

    def _reply(self, ask: Ask, drawn: Drawn) -> Reply:
        tokenizer, completion, message = self.policy.tokenizer, drawn.completion, drawn.message
        ended = completion.finish_reason == "stop"
        said = tokenizer.decode(completion.tokens[:-1] if ended else completion.tokens)
        stop = first_stop(said, ask.stop)
        texts = [tokenizer.decode([token]) for token in completion.tokens] if ask.logprobs else []
        return Reply(
            text=before_stop(said, ask.stop) if ask.prompts else message["content"],
            thoughts=message.get("reasoning_content", ""),
            calls=tuple(_call(call) for call in message.get("tool_calls", ())),
            finish="stop" if ended or stop is not None else "length",
            stop=stop,
            prompt_tokens=drawn.prompt_tokens,
            completion_tokens=len(completion.tokens),
            version=completion.versions[-1] if completion.versions else self.policy.version,
            message=message,
            logprobs=list(zip(texts, completion.logprobs, strict=False)),
        )


def ended() -> Refusal:
    return Refusal(401, "the rollout of this key has ended.", code="invalid_api_key")


def _call(call: Mapping[str, object]) -> Call:
    function = call["function"]
    assert isinstance(function, dict)
    arguments = function["arguments"]
    return Call(str(call["id"]), function["name"], arguments if isinstance(arguments, str) else json.dumps(arguments))
