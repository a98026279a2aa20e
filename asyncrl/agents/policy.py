"""`prompt.policy`: the model that is being trained, as one rollout sees it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from asyncrl.errors import RolloutContractError, SamplerRequestError
from asyncrl.types import Completion, Sampler, SampleRequest, SamplingParams

if TYPE_CHECKING:
    from asyncrl.agents.chat import Chat
    from asyncrl.agents.template import TurnTemplate
    from asyncrl.agents.tools import Tool


class PolicyContext:
    """What the rollouts of a run share. Built once; evaluation builds its own with other `params`."""

    def __init__(
        self,
        sampler: Sampler,
        *,
        params: SamplingParams,
        max_seq_len: int,
        load_tokenizer: Callable[[], Any],
    ) -> None:
        self.sampler = sampler
        self.params = params
        """Used by every request that asks for nothing else. `stop_token_ids` are those of the model."""
        self.max_seq_len = max_seq_len
        """Longest sequence in tokens, prompt included."""
        self._load_tokenizer = load_tokenizer

    @cached_property
    def tokenizer(self) -> Any:
        """The `transformers` tokenizer, loaded when it is first used: a token-in, token-out rollout needs none."""
        return self._load_tokenizer()

    @cached_property
    def template(self) -> TurnTemplate:
        from asyncrl.agents.template import TurnTemplate

        return TurnTemplate(self.tokenizer)


class Policy:
    """A handle on the policy for one rollout. Made for every rollout, so it holds four words and nothing else.

    Temperature, top-p and top-k are those of `Config.sampling`: the trainer has to know them.
    """

    __slots__ = ("_context", "_pinned", "_session", "oldest_version")

    def __init__(self, context: PolicyContext, session: str | int, version: int | None = None) -> None:
        self._context = context
        self._session = session
        self._pinned = version
        self.oldest_version: int | None = None
        """The oldest weights that drew a token for this handle; None before the first."""

    @property
    def version(self) -> int:
        """The weights that the next request is drawn from, in optimizer steps."""
        return self._context.sampler.version if self._pinned is None else self._pinned

    @property
    def tokenizer(self) -> Any:
        """The model's `transformers` tokenizer, shared by all rollouts: do not change it."""
        return self._context.tokenizer

    @property
    def max_seq_len(self) -> int:
        """Longest sequence in tokens, prompt included."""
        return self._context.max_seq_len

    async def generate(
        self,
        token_ids: Sequence[int],
        *,
        max_tokens: int | None = None,
        stop_token_ids: Sequence[int] | None = None,
    ) -> Completion:
        """Draw one completion: token ids in, token ids out.

        Args:
            token_ids: The whole context, at least one token.
            max_tokens: Most tokens to draw; `sampling.max_tokens` if left out. Lowered to what `max_seq_len` leaves.
            stop_token_ids: Tokens that end the completion; those of the model if left out.

        Raises:
            RolloutContractError: no tokens, or no room for one more.
            SamplerRequestError: the sampler refused or lost this request.
        """
        context = self._context
        room = context.max_seq_len - len(token_ids)
        if room < 1 or not token_ids:
            raise RolloutContractError(_no_room(len(token_ids), context.max_seq_len))
        params = context.params
        limit = min(params.max_tokens if max_tokens is None else max_tokens, room)
        if limit < 1:
            raise RolloutContractError(f"policy.generate was called with max_tokens={max_tokens}. Expected at least 1.")
        if limit != params.max_tokens or stop_token_ids is not None:
            stops = params.stop_token_ids if stop_token_ids is None else tuple(stop_token_ids)
            params = replace(params, max_tokens=limit, stop_token_ids=stops)
        completion = await context.sampler.generate(SampleRequest(token_ids, params, str(self._session), self._pinned))
        if completion.finish_reason == "abort":
            raise SamplerRequestError(
                f"the sampler broke a completion off after {len(completion.tokens)} tokens. The rollout is drawn again."
            )
        oldest = min(completion.versions, default=None)
        if oldest is not None and (self.oldest_version is None or oldest < self.oldest_version):
            self.oldest_version = oldest
        return completion

    def chat(
        self,
        messages: str | Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Tool[..., Any] | Callable[..., Any]] = (),
        max_turns: int = 8,
        max_tokens: int | None = None,
    ) -> Chat:
        """Start a conversation: messages and tools in, messages out, tokens kept exactly.

        Args:
            messages: As chat templates take them, `[{"role": "user", "content": ...}]`; a string is one user message.
            tools: What the model may call: `@asyncrl.tool` functions, or typed functions and methods.
            max_turns: Most turns of the model.
            max_tokens: Most tokens of one turn; `sampling.max_tokens` if left out.
        """
        from asyncrl.agents.chat import Chat

        return Chat(self, self._context.template, messages, tools=tools, max_turns=max_turns, max_tokens=max_tokens)

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a completion if `generate` is not told others."""
        return self._context.params.stop_token_ids


def _no_room(prompt_tokens: int, max_seq_len: int) -> str:
    if not prompt_tokens:
        return "policy.generate was called with no tokens. Expected the whole context, at least one token."
    return (
        f"the context has {prompt_tokens} tokens, and max_seq_len is {max_seq_len}, so there is no room for a "
        "completion. Raise Config.max_seq_len, or leave such rows out of the dataset."
    )
