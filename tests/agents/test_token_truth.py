"""What is trained is what was sampled: any script of turns, tools, forks and limits, in any style of chat template."""

from __future__ import annotations

import asyncio
import functools
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from asyncrl.agents.chat import Chat, LimitReached
from asyncrl.agents.conversation import Conversation
from asyncrl.agents.policy import Policy, PolicyContext
from asyncrl.agents.template import TurnTemplate
from asyncrl.agents.tools import collect_tools
from asyncrl.agents.transcript import REALIGNED, Transcript
from asyncrl.config import ChatConfig, Config
from asyncrl.errors import ModelError, RolloutContractError
from asyncrl.rollout.contract import Contract
from asyncrl.sampling.transformers import TransformersSampler
from asyncrl.testing.models import tiny_model
from asyncrl.testing.templates import Style, styled_tokenizer
from asyncrl.training.trainer import TorchTrainer
from asyncrl.types import (
    Completion,
    Load,
    Rollout,
    RolloutRun,
    RolloutSample,
    SampleRequest,
    SamplingParams,
    TrainSequence,
    Weights,
)

VARIANTS: dict[str, tuple[Style, dict[str, Any]]] = {
    "chatml": ("chatml", {}),
    "qwen3": ("qwen3", {}),
    "qwen3-quiet": ("qwen3", {"enable_thinking": False}),
    "llama3": ("llama3", {}),
    "mistral": ("mistral", {}),
    "xml": ("xml", {}),
}
variants = pytest.mark.parametrize("variant", VARIANTS)
EXAMPLES = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
TOLERANCE = 1e-3


def look(x: int) -> str:
    """Look at something.

    Args:
        x: Which.
    """
    if x == 7:
        raise LookupError("there is no 7")
    return "<b>\n" * x


def ask(question: str = "") -> str:
    """Ask somebody."""
    return question + "?"


SCHEMAS = [tool.schema for tool in collect_tools([look, ask]).values()]


@functools.cache
def template_of(variant: str) -> TurnTemplate:
    style, kwargs = VARIANTS[variant]
    return TurnTemplate(styled_tokenizer(style), kwargs)


# A sampler that says what the script says


@dataclass(frozen=True)
class Line:
    """What the policy says in one turn."""

    calls: Sequence[tuple[str, Any]] = ()
    malformed: bool = False
    thoughts: str = ""
    text: str = ""
    trailing: str = ""
    """White space that a template takes away."""
    noise: Sequence[int] = ()
    """Tokens that no tokenizer would make of a text: single bytes of a letter, marks in the wrong place."""
    ends: bool = True


def written(style: Style, line: Line) -> str:
    said = f"<think>\n{line.thoughts}\n</think>\n\n" if line.thoughts else ""
    bodies = []
    for name, x in line.calls:
        arguments = {"x": x} if name == "look" else {"question": str(x)}
        if style == "xml":
            inner = "".join(f"<{key}>{value}</{key}>" for key, value in arguments.items())
            bodies.append(f'<tool name="{name}">{inner}</tool>')
        else:
            key = "parameters" if style == "llama3" else "arguments"
            bodies.append(json.dumps({"name": name, key: arguments}))
    if not bodies:
        return said + line.text
    if line.malformed:
        bodies[-1] = bodies[-1][: len(bodies[-1]) // 2]
    match style:
        case "llama3":
            return said + "; ".join(bodies)
        case "mistral":
            return f"{said}{line.text}[TOOL_CALLS][{', '.join(bodies)}]"
        case "xml":
            return said + line.text + "\n".join(bodies)
    return said + line.text + "\n".join(f"<tool_call>\n{body}\n</tool_call>" for body in bodies)


class Script:
    """Says one line after the other. The log-prob of a token is its number, so that it says where it is from."""

    wants: Literal["tensors", "files"] = "tensors"

    def __init__(self, variant: str, lines: Sequence[Line]) -> None:
        self.style = VARIANTS[variant][0]
        self.tokenizer = template_of(variant)._tokenizer
        self.lines = list(lines)
        self.drawn: list[tuple[Sequence[int], Completion]] = []
        self.numbers: list[tuple[int, int]] = []
        """For each token that was drawn: its completion, and its place there."""

    @property
    def version(self) -> int:
        return len(self.drawn)

    async def __aenter__(self) -> Script:
        return self

    async def __aexit__(self, *exc: object) -> None: ...

    async def generate(self, request: SampleRequest) -> Completion:
        line = self.lines.pop(0) if self.lines else Line(text="Done.")
        for _ in range(len(self.lines) % 3):
            await asyncio.sleep(0)  # others go first
        tokens = [*self.tokenizer.encode(written(self.style, line) + line.trailing), *line.noise]
        tokens += [self.tokenizer.eos_token_id] if line.ends else self.tokenizer.encode(" and")
        tokens = tokens[: request.params.max_tokens]
        first, index = len(self.numbers), len(self.drawn)
        self.numbers += [(index, place) for place in range(len(tokens))]
        completion = Completion(
            tokens,
            [-float(first + place) for place in range(len(tokens))],
            [index + place % 2 for place in range(len(tokens))],  # weights may change in the middle of a turn
            "stop" if tokens[-1] == self.tokenizer.eos_token_id else "length",
        )
        self.drawn.append((tuple(request.token_ids), completion))
        return completion

    async def score(self, token_ids: Sequence[int], version: int, *, start: int = 1, session: str = "") -> list[float]:
        raise NotImplementedError

    async def publish(self, weights: Weights) -> None: ...

    async def load(self) -> Load:
        return Load(0, 0)


def policy_of(variant: str, script: Script, max_seq_len: int = 100_000, **chat: Any) -> Policy:
    context = PolicyContext(
        script,
        params=SamplingParams(max_tokens=100_000, stop_token_ids=(script.tokenizer.eos_token_id,)),
        max_seq_len=max_seq_len,
        load_tokenizer=lambda: script.tokenizer,
        chat=ChatConfig(**chat),
    )
    context.__dict__["template"] = template_of(variant)  # else it is checked anew for every example
    return Policy(context, 0)


# The truth


def segments_of(rollout: Rollout) -> list[RolloutSample]:
    return list(rollout.segments) if isinstance(rollout, RolloutRun) else [rollout]


def holds_the_truth(rollout: Rollout, transcript: Transcript, script: Script) -> None:
    Contract().check(rollout, oldest=0, newest=script.version + 1)
    segments = segments_of(rollout)
    trained: Counter[tuple[int, int]] = Counter()
    for segment in segments:
        assert segment.versions is not None
        for position, masked in enumerate(segment.loss_mask):
            if not masked:
                continue
            index, place = script.numbers[round(-segment.logprobs[position])]
            request, completion = script.drawn[index]
            assert list(segment.tokens[: position + 1]) == [*request, *completion.tokens[: place + 1]]
            assert segment.versions[position] == completion.versions[place]
            trained[index, place] += 1
    assert set(trained.values()) == {1}, "every token is trained once"
    assert all(1 in segment.loss_mask for segment in segments)
    explained(transcript.counts, len(segments), set(script.numbers) - set(trained), script)


def explained(counts: Counter[str], segments: int, missing: set[tuple[int, int]], script: Script) -> None:
    """What is not trained was dropped or re-aligned, and says so; each fork is counted, with its cause."""
    dropped = realigned = 0
    for index, (_, completion) in enumerate(script.drawn):
        places = {place for turn, place in missing if turn == index}
        assert places == set(range(len(completion.tokens) - len(places), len(completion.tokens)))
        if len(places) == len(completion.tokens):
            dropped += 1
        else:
            realigned += len(places)
    assert realigned == counts[REALIGNED]
    assert dropped == sum(number for cause, number in counts.items() if cause.startswith("drop: "))
    forks = sum(number for cause, number in counts.items() if cause.startswith("fork: "))
    assert segments - 1 <= forks <= segments - 1 + dropped


# Scripts

texts = st.sampled_from(["", "So.", " with space \n", "\n\n", "über 漢字", "<b>", '{"a": 1}', "asyncrl0marker"])
calls = st.lists(
    st.tuples(st.sampled_from(["look", "ask", "nothing"]), st.sampled_from([0, 3, 7, "three"])), max_size=2
)
lines = st.builds(
    Line,
    calls=calls,
    malformed=st.booleans(),
    thoughts=st.sampled_from(["", "", "", "hm", "so\n\nthen"]),
    text=texts,
    trailing=st.sampled_from(["", "\n", " \n"]),
    noise=st.just([]) | st.lists(st.integers(0, 255), max_size=3),
    ends=st.sampled_from([True, True, True, False]),
)
choices = st.sampled_from(["stop", "truncate", "error"])
histories = st.sampled_from([None, "keep", "render"])


@dataclass(frozen=True)
class ChatPlan:
    lines: list[Line]
    steps: list[tuple[bool, int]]
    """Fork before it, and which chat takes a step."""
    system: bool
    history: Literal["keep", "render"] | None
    realign_tokens: int
    on_limit: Literal["stop", "truncate", "error"]
    limits: dict[str, int] = field(default_factory=dict)
    room: int | None = None
    """Tokens behind the opening; None: any number."""


chat_plans = st.builds(
    ChatPlan,
    lines=st.lists(lines, min_size=1, max_size=8),
    steps=st.lists(st.tuples(st.sampled_from([False, False, True]), st.integers(0, 3)), min_size=2, max_size=10),
    system=st.booleans(),
    history=histories,
    realign_tokens=st.sampled_from([0, 2, 8]),
    on_limit=choices,
    limits=st.fixed_dictionaries(
        {}, optional={"max_tokens": st.integers(1, 120), "max_total_tokens": st.integers(1, 300)}
    ),
    room=st.none() | st.integers(1, 900),
)


async def play(variant: str, plan: ChatPlan) -> tuple[Chat, Script]:
    script = Script(variant, plan.lines)
    messages = [{"role": "system", "content": "Be brief."}] * plan.system + [{"role": "user", "content": "Go on."}]
    opening = len(template_of(variant).opening(messages, SCHEMAS))
    longest = 100_000 if plan.room is None else opening + plan.room
    policy = policy_of(variant, script, longest, history=plan.history, realign_tokens=plan.realign_tokens)
    chats = [policy.chat(messages, tools=[look, ask], max_turns=6, on_limit=plan.on_limit, **cast(Any, plan.limits))]
    for fork, which in plan.steps:
        chat = chats[which % len(chats)]
        if fork:
            chats.append(chat := chat.fork())
        if chat.finish_reason not in (None, "stop") or chat.turns >= 6:
            continue
        try:
            await chat.step("And?" if chat.finish_reason == "stop" else None)
        except LimitReached:
            assert plan.on_limit != "stop"
            break
        except ModelError:
            if (variant, plan.history) != ("mistral", "keep"):  # its tools and system message move
                raise
            break
    return chats[0], script


@variants
@EXAMPLES
@given(plan=chat_plans)
def test_chats_train_exactly_what_was_drawn(variant: str, plan: ChatPlan) -> None:
    chat, script = asyncio.run(play(variant, plan))
    transcript = chat._conversation.transcript
    if transcript.turns:
        holds_the_truth(chat.sample(1.0), transcript, script)
    else:
        with pytest.raises(RolloutContractError, match="no token that the policy drew"):
            chat.sample(1.0)


@dataclass(frozen=True)
class Call:
    """One call of an agent program: what it makes of a history it has, and what it adds."""

    history: int
    change: Literal["none", "content", "thoughts", "ids", "shorter", "parts", "merged"]
    answer: Literal["user", "tool", "both", "injected"]
    together: bool
    """With the call before, at the same time."""
    max_tokens: int | None


@dataclass(frozen=True)
class ProgramPlan:
    lines: list[Line]
    calls: list[Call]
    system: bool
    history: Literal["keep", "render"] | None
    realign_tokens: int


program_plans = st.builds(
    ProgramPlan,
    lines=st.lists(lines, max_size=8),
    calls=st.lists(
        st.builds(
            Call,
            history=st.integers(0, 5),
            change=st.sampled_from(
                ["none", "none", "none", "content", "thoughts", "ids", "shorter", "parts", "merged"]
            ),
            answer=st.sampled_from(["user", "tool", "both", "injected"]),
            together=st.booleans(),
            max_tokens=st.none() | st.integers(1, 40),
        ),
        min_size=1,
        max_size=8,
    ),
    system=st.booleans(),
    history=histories,
    realign_tokens=st.sampled_from([0, 2, 8]),
)


def changed(history: list[dict[str, Any]], change: str) -> list[dict[str, Any]]:
    """What frameworks do to a history on its way."""
    found = [json.loads(json.dumps(message)) for message in history]
    for message in found:
        if change == "content" and message["role"] == "assistant":
            message["content"] = "Summary."
        if change == "thoughts":
            message.pop("reasoning_content", None)
        if change == "ids":
            for called in message.get("tool_calls", ()):
                called["id"] = f"call_{called['id']}_abc"
                called["function"]["arguments"] = json.dumps(called["function"]["arguments"])
            if message["role"] == "tool":
                message["tool_call_id"] = f"call_{message['tool_call_id']}_abc"
        if change == "parts" and isinstance(message["content"], str):
            message["content"] = [{"type": "text", "text": message["content"]}]
    if change == "shorter":
        del found[1:3]
    if change == "merged" and len(found) > 2:
        del found[2:-1]
    return found


def answered(history: list[dict[str, Any]], answer: str) -> list[dict[str, Any]]:
    calls = history[-1].get("tool_calls", ()) if history[-1]["role"] == "assistant" else ()
    results = [
        {"role": "tool", "tool_call_id": called["id"], "name": called["function"]["name"], "content": "Found."}
        for called in calls
    ]
    question = [{"role": "user", "content": "And then?"}]
    if answer == "injected":
        return [*history, *results, {"role": "assistant", "content": "I see."}, *question]
    return [*history, *results, *question] if answer == "both" or not results else [*history, *results]


async def be_called(variant: str, plan: ProgramPlan) -> tuple[Conversation, Script]:
    script = Script(variant, plan.lines)
    policy = policy_of(variant, script)
    conversation = Conversation(policy, history=plan.history, realign_tokens=plan.realign_tokens)
    opening = [{"role": "system", "content": "Be brief."}] * plan.system + [{"role": "user", "content": "Go on."}]
    histories: list[list[dict[str, Any]]] = []

    async def one(messages: list[dict[str, Any]], max_tokens: int | None) -> None:
        try:
            drawn = await conversation.draw(messages, SCHEMAS, max_tokens=max_tokens)
        except ModelError:
            return  # a history that the template refuses: the endpoint says so, and the agent goes on
        histories.append([*messages, drawn.message])

    waiting: list[asyncio.Task[None]] = []
    for call in plan.calls:
        if not call.together:
            await asyncio.gather(*waiting)
            waiting = []
        messages = opening
        if histories:
            history = histories[call.history % len(histories)]
            messages = answered(changed(history, call.change), call.answer)
        waiting.append(asyncio.create_task(one(messages, call.max_tokens)))
    await asyncio.gather(*waiting)
    return conversation, script


@variants
@EXAMPLES
@given(plan=program_plans)
def test_programs_train_exactly_what_was_drawn(variant: str, plan: ProgramPlan) -> None:
    conversation, script = asyncio.run(be_called(variant, plan))
    if script.drawn:
        holds_the_truth(conversation.transcript.rollout(1.0, {}), conversation.transcript, script)


@dataclass(frozen=True)
class TokenCall:
    """One call of a program that keeps tokens: which of its contexts, and what it makes of the end."""

    context: int
    dropped: int
    added: list[int]
    together: bool


token_calls = st.builds(
    TokenCall,
    context=st.integers(0, 3),
    dropped=st.sampled_from([0, 0, 1, 2, 5]),
    added=st.lists(st.integers(0, 3), max_size=2),
    together=st.booleans(),
)


@EXAMPLES
@given(
    lines=st.lists(lines, max_size=6),
    calls=st.lists(token_calls, min_size=1, max_size=8),
    realign_tokens=st.sampled_from([0, 2, 8]),
)
def test_raw_tokens_train_exactly_what_was_drawn(
    lines: list[Line], calls: list[TokenCall], realign_tokens: int
) -> None:
    async def run() -> tuple[Conversation, Script]:
        script = Script("chatml", lines)
        conversation = Conversation(policy_of("chatml", script), realign_tokens=realign_tokens)
        contexts = [[65, 66]]

        async def one(tokens: list[int]) -> None:
            drawn = await conversation.draw_tokens(tokens)
            contexts.append([*tokens, *drawn.completion.tokens])

        waiting: list[asyncio.Task[None]] = []
        for call in calls:
            if not call.together:
                await asyncio.gather(*waiting)
                waiting = []
            before = contexts[-1 - call.context % len(contexts)]
            waiting.append(asyncio.create_task(one([*before[: max(len(before) - call.dropped, 1)], *call.added])))
        await asyncio.gather(*waiting)
        return conversation, script

    conversation, script = asyncio.run(run())
    holds_the_truth(conversation.transcript.rollout(1.0, {}), conversation.transcript, script)


# A real model


def chatty_tokenizer(style: Style) -> Any:
    """Whole calls are single tokens of it, so that a random model makes some."""
    said = [written(style, Line(calls=[("look", x)])) for x in range(60)]
    thoughts = [f"<think>\n{x}\n</think>\n\n" for x in range(20)]
    return styled_tokenizer(style, words=[*said, *thoughts])


def stops_of(tokenizer: Any) -> tuple[int, ...]:
    """Two letters of three end a turn, too: a random model would hardly ever find the end otherwise."""
    return (tokenizer.eos_token_id, *(index for index in range(256) if index % 3))


class CountingSampler(TransformersSampler):
    drawn_tokens = 0

    async def generate(self, request: SampleRequest) -> Completion:
        completion = await super().generate(request)
        self.drawn_tokens += len(completion.tokens)
        return completion


async def play_for_real(chat: Chat, turns: int) -> None:
    last = chat.turns + turns
    while chat.turns < last and chat.finish_reason in (None, "stop"):
        await chat.step("And?" if chat.finish_reason == "stop" else None)


@variants
async def test_the_trainer_gives_the_log_probs_that_were_sampled(variant: str, tmp_path: Path) -> None:
    """Chats over two versions of the weights, with tools, forks and rendered histories; each token at its version."""
    style, kwargs = VARIANTS[variant]
    tokenizer = chatty_tokenizer(style)
    folder = str(tiny_model(tmp_path, tokenizer=tokenizer, kind="qwen3", hidden=32, layers=1, max_seq_len=8192))
    config = Config(model=folder, lora={"rank": 0}, trainer={"device": "cpu"}, optimizer={"learning_rate": 0.03})
    trainers = [TorchTrainer(config, total_steps=None, weights_format="tensors") for _ in range(2)]
    async with CountingSampler(folder, device="cpu", torch_threads=1, context_tokens=8192) as sampler:
        context = PolicyContext(
            sampler,
            params=SamplingParams(max_tokens=40, stop_token_ids=stops_of(tokenizer)),
            max_seq_len=8192,
            load_tokenizer=lambda: tokenizer,
            chat=ChatConfig(template=kwargs),
        )
        chats = [
            Policy(context, number).chat("Go on.", tools=[look], max_turns=20, history=history)
            for number, history in enumerate(cast(Any, (None, None, "render")))
        ]
        for chat in chats:
            await play_for_real(chat, turns=3)
        twin = chats[1].fork()
        samples = [sample for chat in chats for sample in segments_of(chat.sample(1.0))]
        trainers[1].forward_backward(
            [TrainSequence(s.tokens, s.logprobs, s.loss_mask, (-1.0) ** i, 0) for i, s in enumerate(samples)]
        )
        trainers[1].optim_step()
        await sampler.publish(trainers[1].save_weights_for_sampler())
        for chat in (*chats, twin):
            await play_for_real(chat, turns=3)
    samples = [sample for chat in chats for sample in segments_of(chat.sample(1.0))]
    assert sum(sum(sample.loss_mask) for sample in samples) == sampler.drawn_tokens
    assert sum(chat.tool_calls for chat in chats) > 0
    assert len(samples) > len(chats)
    scores = [trainer.forward([sample.tokens for sample in samples]) for trainer in trainers]
    found = {0: 0.0, 1: 0.0}
    moved = 0.0
    for index, sample in enumerate(samples):
        assert sample.versions is not None
        for at in (at for at, masked in enumerate(sample.loss_mask) if masked):
            old_and_new = [score[index][at - 1] for score in scores]
            version = sample.versions[at]
            found[version] = max(found[version], abs(sample.logprobs[at] - old_and_new[version]))
            moved = max(moved, abs(old_and_new[0] - old_and_new[1]))
    assert moved > 100 * TOLERANCE, "the step was too small to tell the versions apart"
    assert max(found.values()) < TOLERANCE
