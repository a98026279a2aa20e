"""`prompt.policy`: the model that is being trained, as one rollout sees it."""

from __future__ import annotations

import asyncio
import hashlib
from array import array
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from operator import index
from typing import TYPE_CHECKING, Any

import structlog

from asyncrl.config import ChatConfig
from asyncrl.errors import ContextFull, RolloutContractError, SamplerRequestError
from asyncrl.rollout.failures import brief
from asyncrl.types import Completion, Rollout, Sampler, SampleRequest, SamplingParams

if TYPE_CHECKING:
    from asyncrl.agents.chat import Chat
    from asyncrl.agents.conversation import Conversation, History
    from asyncrl.agents.endpoint.server import Endpoint
    from asyncrl.agents.template import TurnTemplate
    from asyncrl.sections import Limit, LimitChoice

log = structlog.get_logger(__name__)

NO_SUCH_TOKEN = " A tokenizer says None of a token that it does not have."


@dataclass(frozen=True, slots=True)
class Scored:
    """What `policy.score` says."""

    logprobs: list[float]
    """[N - start] of each token from `start` on, given all before it; natural log, at temperature 1."""
    version: int
    """The weights that said so: those that the rollout is pinned to, or the newest."""


class PolicyContext:
    """What the rollouts of a run share. Built once; evaluation builds its own with other `params`."""

    def __init__(
        self,
        sampler: Sampler,
        *,
        params: SamplingParams,
        max_seq_len: int,
        load_tokenizer: Callable[[], Any],
        chat: ChatConfig | None = None,
        endpoint: Endpoint | None = None,
        seed: int | None = None,
    ) -> None:
        self.sampler = sampler
        self.params = params
        """Used by every request that asks for nothing else. `stop_token_ids` are those of the model."""
        self.max_seq_len = max_seq_len
        """Longest sequence in tokens, prompt included."""
        self.chat = chat or ChatConfig()
        self.endpoint = endpoint
        """Where agent programs reach the policy; None: nowhere."""
        self.seed = seed
        """Each request gets a seed made of this, its rollout and its tokens; None: the sampler draws freely."""
        self._load_tokenizer = load_tokenizer
        self.totals: Counter[str] = Counter()
        """What happened to transcripts, in all rollouts since the last step record."""
        self._warned: set[str] = set()

    @cached_property
    def tokenizer(self) -> Any:
        """The `transformers` tokenizer, loaded when it is first used: a token-in, token-out rollout needs none."""
        return self._load_tokenizer()

    @cached_property
    def template(self) -> TurnTemplate:
        from asyncrl.agents.template import TurnTemplate

        return TurnTemplate(self.tokenizer, self.chat.template)

    def warn_once(self, event: str, reason: str) -> None:
        """Once for a run: thousands of rollouts would say the same."""
        if event not in self._warned:
            self._warned.add(event)
            log.warning(event, reason=reason)


class Policy:
    """A handle on the policy for one rollout. Made for every rollout, so it holds a few words and nothing else.

    Temperature, top-p and top-k are those of `Config.sampling`: the trainer has to know them.
    """

    __slots__ = ("_asked", "_captured", "_context", "_ended", "_key", "_pinned", "_session", "calls", "oldest_version")

    def __init__(self, context: PolicyContext, session: str | int, version: int | None = None) -> None:
        self._context = context
        self._session = session
        self._pinned = version
        self._captured: Conversation | None = None
        self._key: str | None = None
        self._asked: Counter[bytes] | None = None
        self._ended = False
        self.oldest_version: int | None = None
        """The oldest weights that drew a token for this handle; None before the first."""
        self.calls: list[float] = []
        """What `storage.timeline.CALL` says of each call of the model, one after the other."""

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
            ContextFull: there is no room for one more token.
            RolloutContractError: there are no tokens, or something else than token ids; a limit or a stop token is no
                whole number; or the rollout has ended.
            SamplerRequestError: the sampler refused or lost this request.
        """
        self._refuse_if_ended()
        context = self._context
        token_ids = _flat("generate", token_ids)
        room = context.max_seq_len - len(token_ids)
        if not token_ids:
            raise RolloutContractError(
                "policy.generate was called with no tokens. Expected the whole context, at least one token."
            )
        if room < 1:
            raise ContextFull(
                f"the context has {len(token_ids)} tokens, and max_seq_len is {context.max_seq_len}, so there is no "
                "room for a completion. Raise Config.max_seq_len, or leave such rows out of the dataset."
            )
        params = context.params
        limit = min(params.max_tokens if max_tokens is None else _whole("max_tokens=", max_tokens, 1), room)
        if limit != params.max_tokens or stop_token_ids is not None:
            stops = params.stop_token_ids
            if stop_token_ids is not None:
                stops = tuple(_whole("the stop token ", token, 0, NO_SUCH_TOKEN) for token in stop_token_ids)
            params = replace(params, max_tokens=limit, stop_token_ids=stops)
        if context.seed is not None:
            params = replace(params, seed=self._seed_of(context.seed, token_ids))
        clock = asyncio.get_running_loop().time
        began, drawn, version = clock(), 0, -1
        try:
            completion = await context.sampler.generate(
                SampleRequest(token_ids, params, str(self._session), self._pinned)
            )
            drawn, version = len(completion.tokens), completion.versions[-1] if completion.versions else -1
        finally:
            self.calls += (began, clock(), len(token_ids), drawn, version)
        if completion.finish_reason == "abort":
            raise SamplerRequestError(
                f"the sampler broke a completion off after {len(completion.tokens)} tokens. The rollout is drawn again."
            )
        oldest = min(completion.versions, default=None)
        if oldest is not None and (self.oldest_version is None or oldest < self.oldest_version):
            self.oldest_version = oldest
        return completion

    def _seed_of(self, seed: int, token_ids: Sequence[int]) -> int:
        """Below 2**63. Requests of one rollout that are under way at once come in any order, so a request is known by
        what it asks, and by how often that was asked before.
        """
        name = hashlib.sha256(f"{seed}/{self._session}/".encode())
        name.update(array("q", token_ids))
        if self._asked is None:
            self._asked = Counter()
        asked = name.digest()
        name.update(str(self._asked[asked]).encode())
        self._asked[asked] += 1
        return int.from_bytes(name.digest()[:8], "little") >> 1

    async def score(self, token_ids: Sequence[int], start: int) -> Scored:
        """How likely the policy finds tokens that it need not have drawn: an answer, behind what it has read so far.

        Args:
            token_ids: Context and answer. Together at most `max_seq_len` less one.
            start: The first token to score, at least 1. A sampler may spend a request on each token from there on.

        Raises:
            RolloutContractError: no token to score, or none before it, or too many; or something else than token ids.
            SamplerRequestError: the sampler refused or lost this request.
        """
        self._refuse_if_ended()
        context = self._context
        token_ids = _flat("score", token_ids)
        if not 1 <= start < len(token_ids) < context.max_seq_len:
            raise RolloutContractError(
                f"policy.score was called with {len(token_ids)} tokens and start={start}. Expected a context of at "
                f"least one token, then at least one to score, and fewer than max_seq_len={context.max_seq_len} in all."
            )
        clock = asyncio.get_running_loop().time
        while True:
            version = self.version
            began = clock()
            try:
                found = await context.sampler.score(token_ids, version, start=start, session=str(self._session))
            except SamplerRequestError:
                if self.version == version:
                    raise  # else it may have been refused because newer weights came live meanwhile
            else:
                return Scored(found, version)
            finally:
                self.calls += (began, clock(), len(token_ids), 0, version)

    def chat(
        self,
        messages: str | Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[object] = (),
        max_turns: int = 8,
        max_tokens: int | None = None,
        max_total_tokens: int | None = None,
        on_limit: LimitChoice | Mapping[Limit, LimitChoice] | None = None,
        history: History | None = None,
    ) -> Chat:
        """Start a conversation: messages and tools in, messages out, tokens kept exactly.

        Args:
            messages: As chat templates take them, `[{"role": "user", "content": ...}]`; a string is one user message.
            tools: What the model may call: `@asyncrl.tool` functions, typed functions and methods, and objects, which
                give their `@asyncrl.tool` methods.
            max_turns: Most turns of the model.
            max_tokens: Most tokens of one turn; `sampling.max_tokens` if left out.
            max_total_tokens: Most tokens that the model may draw in all turns together; no limit if left out.
            on_limit: What happens at a limit; `Config.chat.on_limit` if left out.
            history: What the model reads of its earlier turns; `Config.chat.history` if left out.
        """
        from asyncrl.agents.chat import Chat, Limits

        choices = self._context.chat.on_limit if on_limit is None else on_limit
        return Chat(
            self._conversation(history),
            self,
            messages,
            tools=tools,
            limits=Limits(max_turns, max_tokens, max_total_tokens, choices),
        )

    @property
    def openai_base_url(self) -> str:
        """The `base_url` of an OpenAI client whose calls become this rollout: see `captured_run`.

        Raises:
            RolloutContractError: this policy has no endpoint (it was made by hand).
        """
        return f"{self._endpoint.url}/v1"

    @property
    def anthropic_base_url(self) -> str:
        """The `base_url` of an Anthropic client whose calls become this rollout."""
        return self._endpoint.url

    @property
    def openai_api_key(self) -> str:
        """The key of this rollout, for either kind of client. It ends with the rollout."""
        if self._key is None:
            self._refuse_if_ended()
            self._key = self._endpoint.register(self)
        return self._key

    @property
    def captured(self) -> Conversation:
        """What was said through the endpoint under this rollout's key."""
        if self._captured is None:
            self._captured = self._conversation()
        return self._captured

    def _conversation(self, history: History | None = None) -> Conversation:
        from asyncrl.agents.conversation import Conversation

        settings = self._context.chat
        return Conversation(self, history=history or settings.history, realign_tokens=settings.realign_tokens)

    def captured_run(
        self, reward: float, *, turn_rewards: Sequence[float | None] | None = None, **info: Any
    ) -> Rollout:
        """What the rollout function returns after an agent program has used the endpoint.

        Exact to the token; conversations beside each other (sub-agents, branches, a rewritten history) become segments
        of one run. `turn_rewards`: one for each answer that was drawn, in order. `info` goes to the rollout log.

        Raises:
            RolloutContractError: no call under this rollout's key was answered.
        """
        transcript = self.captured.transcript
        if not transcript.turns:
            raise RolloutContractError(
                "no call under this rollout's key was answered, so there is nothing to train on. Give the agent's "
                "client base_url=policy.openai_base_url and api_key=policy.openai_api_key (an Anthropic client "
                "base_url=policy.anthropic_base_url), or return None to drop the draw."
            )
        turns = len(transcript.turns)
        return transcript.rollout(
            reward,
            lambda leaf: {"messages": list(leaf.messages), "turns": turns, **transcript.account(leaf), **info},
            turn_rewards,
        )

    def close(self) -> None:
        """The rollout has ended: nothing more is drawn, its key is void, and calls of it under way are broken off."""
        self._ended = True
        if self._key is not None:
            self._endpoint.revoke(self._key)

    def _refuse_if_ended(self) -> None:
        if self._ended:
            raise RolloutContractError(
                "this rollout has ended, and nobody would train on what its policy draws now. Await every task that "
                "the rollout function starts before it returns."
            )

    @property
    def _endpoint(self) -> Endpoint:
        if self._context.endpoint is None:
            raise RolloutContractError(
                "this policy has no endpoint for agent programs. Inside of asyncrl.train and asyncrl.evaluate "
                "`prompt.policy` has one; a PolicyContext that you make yourself needs endpoint=..."
            )
        return self._context.endpoint

    @property
    def template(self) -> TurnTemplate:
        """The chat template, as turns are joined with it. Shared by all rollouts."""
        return self._context.template

    @property
    def totals(self) -> Counter[str]:
        """Where the transcripts of all rollouts count (`PolicyContext.totals`)."""
        return self._context.totals

    def warn_once(self, event: str, reason: str) -> None:
        self._context.warn_once(event, reason)

    @property
    def params(self) -> SamplingParams:
        """How a request is drawn that asks for nothing else."""
        return self._context.params

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a completion if `generate` is not told others."""
        return self._context.params.stop_token_ids


def _flat(asked: str, token_ids: Sequence[int]) -> Sequence[int]:
    """The ids as a list. A batch of them, a text, or what a tokenizer returns would do a sampler harm."""
    if type(token_ids) is list and token_ids and type(token_ids[0]) is int:
        return token_ids  # nearly always; samplers look at each id
    try:
        if isinstance(token_ids, (str, bytes, bytearray, Mapping)):
            raise TypeError
        return array("q", token_ids).tolist()
    except (TypeError, ValueError, OverflowError):
        raise RolloutContractError(
            f"policy.{asked} was called with {brief(token_ids)}. Expected one flat sequence of token ids, such as "
            "`tokenizer.encode(text)`. `tokenizer(...)` and `apply_chat_template(...)` give a dict: take its "
            "`input_ids`, and leave return_tensors out, which makes a batch of them."
        ) from None


def _whole(said: str, value: int, least: int, more: str = "") -> int:
    """Refused here, a number that is none is an error of one rollout; in a sampler's batch it would be everybody's."""
    try:
        number = index(value)
    except TypeError:
        number = least - 1
    if number < least:
        raise RolloutContractError(
            f"policy.generate was called with {said}{value!r:.80}. Expected a whole number of at least {least}.{more}"
        )
    return number
