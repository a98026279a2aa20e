"""`POST /v1/completions`: raw text or token ids, without a chat template."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Annotated, Any, ClassVar

from pydantic import Field, NonNegativeInt, PositiveInt, StrictInt, StrictStr

from asyncrl.agents.endpoint.chat_completions import DONE
from asyncrl.agents.endpoint.refusal import Refusal
from asyncrl.agents.endpoint.request import MAX_CHOICES, Ask, Event, Json, Reply, Request, as_tuple, new_id
from asyncrl.agents.messages import Message

Tokens = Annotated[list[Annotated[StrictInt, Field(ge=0, lt=1 << 31)]], Field(min_length=1)]
MAX_SAMPLED_LOGPROBS = 1
"""`logprobs` counts alternatives; the sampler keeps the drawn token's alone."""


class Completions(Request):
    """What comes after each prompt, `n` times."""

    refused: ClassVar[Mapping[str, str]] = {
        "suffix": "the policy writes from left to right.",
        "echo": "the client has the prompt.",
        "best_of": "the rollout can choose among n completions itself.",
    }
    ignored: ClassVar[Mapping[str, Any]] = {"frequency_penalty": 0, "presence_penalty": 0, "logit_bias": {}}

    prompt: StrictStr | Tokens | Annotated[list[StrictStr | Tokens], Field(min_length=1)]
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = 1
    max_tokens: PositiveInt | None = None
    stop: str | list[str] | None = None
    logprobs: NonNegativeInt | None = None
    stream_options: Json | None = None

    def ask(self, past: Mapping[str, Sequence[Message]]) -> Ask:
        if (self.logprobs or 0) > MAX_SAMPLED_LOGPROBS:
            raise Refusal(
                400, f"logprobs is {self.logprobs}: at most 1, the drawn token's, is there.", param="logprobs"
            )
        return Ask(
            prompts=self._prompts(),
            n=self.n or 1,
            max_tokens=self.max_tokens,
            stop=as_tuple(self.stop),
            logprobs=self.logprobs is not None,
        )

    def _prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt

    def answer(self, ask: Ask, replies: Sequence[Reply]) -> Json:
        prompt = sum(reply.prompt_tokens for reply in replies[:: ask.n])
        drawn = sum(reply.completion_tokens for reply in replies)
        return {
            "id": new_id("cmpl-"),
            "object": "text_completion",
            "created": int(time.time()),
            "model": self.model,
            "system_fingerprint": f"policy-v{replies[0].version}",
            "choices": [
                {
                    "index": place,
                    "text": reply.text,
                    "logprobs": _logprobs(reply) if ask.logprobs else None,
                    "finish_reason": reply.finish,
                }
                for place, reply in enumerate(replies)
            ],
            "usage": {"prompt_tokens": prompt, "completion_tokens": drawn, "total_tokens": prompt + drawn},
        }

    def events(self, answer: Json) -> Iterator[Event]:
        for choice in answer["choices"]:
            yield Event(None, {**answer, "choices": [choice], "usage": None})
        if (self.stream_options or {}).get("include_usage"):
            yield Event(None, {**answer, "choices": []})
        yield DONE


def _logprobs(reply: Reply) -> Json:
    texts = [text for text, _ in reply.logprobs]
    return {
        "tokens": texts,
        "token_logprobs": [logprob for _, logprob in reply.logprobs],
        "top_logprobs": None,
        "text_offset": list(accumulate(map(len, texts), initial=0))[:-1],
    }
