"""Agents and tools that misbehave in every way we could think of: real time, a whole small run, fake ends.

In each group one member is hostile and the others are not. Whatever it does, every group is trained with those that
survive, and the ledger accounts for each prompt.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any

import aiohttp
import pytest

import asyncrl
from asyncrl.agents import tools
from asyncrl.agents.endpoint import Endpoint
from asyncrl.agents.policy import Policy, PolicyContext
from asyncrl.assemble import assemble
from asyncrl.config import Config, EndpointConfig
from asyncrl.data import Prompt
from asyncrl.engine import Engine
from asyncrl.errors import RolloutFailed
from asyncrl.metrics.lag import LONG_S
from asyncrl.rollout import scheduler
from asyncrl.rollout.scheduler import RolloutFn
from asyncrl.testing.fakes import CountingTrainer, ScriptedSampler
from asyncrl.testing.models import tiny_tokenizer
from asyncrl.types import Rollout, RolloutSample, SampleRequest, SamplingParams

ROWS = 6
RUN_LIMIT_S = 60.0
HUGE = 100_000_000
tokenizer = tiny_tokenizer()
forever = threading.Event()
"""Never set."""

CALL = '<tool_call>\n{"name": "act", "arguments": {}}\n</tool_call>'
CALLS = CALL + CALL


def speak(request: SampleRequest) -> list[int]:
    """Call the tool once, then answer; call it again and again when the prompt says so."""
    text = tokenizer.decode(request.token_ids)
    again = "<tool_response>" not in text or "never stop" in text
    calls = CALLS if "Go twice." in text else CALL
    return list(tokenizer.encode(f"{calls if again else 'Done.'}<|im_end|>"))


def engine_of(work: RolloutFn, endpoint: Endpoint | None = None, **rollout: Any) -> Engine:
    """A run over a few rows, of which each step trains two groups of three."""
    config = Config(
        model="none",
        completions_per_prompt=3,
        prompt_groups_per_step=2,
        staleness={"max_staleness": 2},
        concurrency={"min_window": 6, "max_window": 6},
        rollout={"timeout_s": 20.0, "retries": 0, **rollout},
    )
    sampler = ScriptedSampler(speak)
    params = SamplingParams(max_tokens=128, stop_token_ids=(tokenizer.eos_token_id,))
    context = PolicyContext(
        sampler, params=params, max_seq_len=4096, load_tokenizer=lambda: tokenizer, endpoint=endpoint
    )
    return assemble(
        config,
        work,
        [{"row": row} for row in range(ROWS)],
        sampler=sampler,
        trainer=CountingTrainer(),
        make_policy=lambda session, version: Policy(context, session, version),
        on_step=lambda record, batch: None,
    )


async def train(engine: Engine) -> dict[str, int]:
    """Run it to its end. Returns the ledger, which accounts for every prompt."""
    try:
        async with asyncio.timeout(RUN_LIMIT_S):
            await engine.run()
    finally:
        engine.ledger.close()
    return engine.ledger.summary()


def all_trained(ledger: dict[str, int]) -> bool:
    return ledger == {"admitted": ROWS, "trained": ROWS, "filtered": 0, "rejected": 0, "pending": 0, "requeued": 0}


def is_hostile(prompt: Prompt) -> bool:
    return prompt.rollout_index == 0


# Tools


def act() -> str:
    return "acted"


def tool_of(body: Callable[[], Any]) -> asyncrl.Tool[..., Any]:
    """`body` under the name that the model calls, with short limits."""

    async def async_act() -> Any:
        return await body()

    def sync_act() -> Any:
        return body()

    function = async_act if asyncio.iscoroutinefunction(body) else sync_act
    function.__name__ = "act"
    return asyncrl.tool(timeout_s=0.5, max_output_chars=100)(function)


async def blocks_the_loop() -> str:
    time.sleep(2 * LONG_S)  # noqa: ASYNC251 - the fault
    return "rested"


def never_returns() -> None:
    forever.wait()


async def awaits_for_ever() -> None:
    await asyncio.Event().wait()


async def ignores_its_cancellation() -> None:
    end = time.monotonic() + 1.5
    while time.monotonic() < end:
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(1.5)


def shouts() -> str:
    print("x" * 1000)
    return "x" * HUGE


def shouts_in_json() -> Any:
    return {"lines": ["x" * HUGE, "y"]}


def exits() -> None:
    raise SystemExit(1)


async def exits_the_loop() -> None:
    raise SystemExit(1)


async def interrupts_the_loop() -> None:
    raise KeyboardInterrupt


async def cancels_itself() -> None:
    task = asyncio.current_task()
    assert task is not None
    task.cancel()
    await asyncio.sleep(0)


async def fails_in_a_group() -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(exits_the_loop_later())


async def exits_the_loop_later() -> None:
    raise BaseExceptionGroup("several", [SystemExit(1), ValueError("no")])


@pytest.mark.parametrize(
    ("body", "error"),
    [
        (blocks_the_loop, None),
        (never_returns, "took longer"),
        (awaits_for_ever, "took longer"),
        (ignores_its_cancellation, "took longer"),
        (shouts, None),
        (shouts_in_json, None),
        (exits, "SystemExit"),
        (exits_the_loop, "SystemExit"),
        (interrupts_the_loop, "KeyboardInterrupt"),
        (cancels_itself, "CancelledError"),
        (fails_in_a_group, "SystemExit"),
    ],
    ids=lambda given: getattr(given, "__name__", ""),
)
async def test_a_hostile_tool_harms_its_own_call_alone(
    body: Callable[[], Any], error: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tools, "CANCEL_GRACE_S", 0.05)
    hostile, tame = tool_of(body), asyncrl.tool(act)
    heard: list[str] = []

    async def rollout(prompt: Prompt) -> Rollout:
        misbehaves = is_hostile(prompt) and prompt.index == 0
        chat = prompt.policy.chat("Go.", tools=[hostile if misbehaves else tame])
        assert await chat.run() == "Done."
        result = chat.messages[2]["content"]
        if misbehaves:
            heard.append(result)
            assert chat.tool_errors == (error is not None)
        else:
            assert result == "acted"
        return chat.sample(reward=float(prompt.rollout_index))

    engine = engine_of(rollout)
    lags: list[float] = []
    engine.on_step = lambda record, batch: lags.append(record["loop_lag_s"])
    assert all_trained(await train(engine))
    assert engine.scheduler.counts.lost == 0, "even the hostile member has its sample"
    if error is not None:
        assert error in heard[0]
    else:
        assert len(heard[0]) < 200
    assert (max(lags) > LONG_S) or body is not blocks_the_loop


# Agents


async def never_ends(prompt: Prompt) -> None:
    await asyncio.Event().wait()


async def ends_for_nobody(prompt: Prompt) -> None:
    await ignores_its_cancellation()


async def forks_without_end(prompt: Prompt) -> None:
    chat = prompt.policy.chat("Go.", tools=[act], max_turns=1000)
    await chat.run()
    while True:
        await chat.fork().step("And now?")


async def raises_exit(prompt: Prompt) -> None:
    raise SystemExit(1)


async def raises_a_group(prompt: Prompt) -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(exits_the_loop_later())


async def raises_generator_exit_like(prompt: Prompt) -> None:
    raise type("Odd", (BaseException,), {})


async def cancels_its_own_task(prompt: Prompt) -> None:
    await cancels_itself()


async def leaves_a_cancellation_behind(prompt: Prompt) -> None:
    """It has ended when its cancellation comes: the engine meets it, in the pause before the next attempt."""
    task = asyncio.current_task()
    assert task is not None
    task.cancel()
    raise ValueError


AGENTS = [
    never_ends,
    ends_for_nobody,
    forks_without_end,
    raises_exit,
    raises_a_group,
    raises_generator_exit_like,
    cancels_its_own_task,
    leaves_a_cancellation_behind,
]


@pytest.mark.parametrize("agent", AGENTS, ids=lambda agent: agent.__name__)
async def test_a_hostile_agent_is_lost_and_the_others_are_trained(
    agent: Callable[[Prompt], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "CANCEL_GRACE_S", 0.2)

    async def rollout(prompt: Prompt) -> Rollout:
        chat = prompt.policy.chat("Go.", tools=[act])
        await chat.run()
        if is_hostile(prompt) and prompt.index < 2:
            return await agent(prompt)  # type: ignore[no-any-return]
        return chat.sample(reward=float(prompt.rollout_index))

    lost = 0.0

    def count(record: dict[str, float], batch: object) -> None:
        nonlocal lost
        lost += record["members_failed"]

    engine = engine_of(rollout, timeout_s=0.5, on_error="drop", retries=1)
    engine.on_step = count
    assert all_trained(await train(engine))
    assert lost == 2


async def test_an_agent_that_never_stops_is_stopped_by_its_turns() -> None:
    async def rollout(prompt: Prompt) -> Rollout:
        chat = prompt.policy.chat("never stop" if is_hostile(prompt) else "Go.", tools=[act], max_turns=5)
        await chat.run()
        assert (chat.turns, chat.finish_reason) == ((5, "max_turns") if is_hostile(prompt) else (2, "stop"))
        return chat.sample(reward=float(prompt.rollout_index))

    assert all_trained(await train(engine_of(rollout)))


@pytest.mark.parametrize(
    "fault", [KeyboardInterrupt(), SystemExit(1), GeneratorExit(), BaseExceptionGroup("several", [SystemExit(1)])]
)
@pytest.mark.parametrize("on_error", ["fail", "drop"])
async def test_what_no_rollout_should_raise_is_one_clear_error(fault: BaseException, on_error: str) -> None:
    """Never the end of the process, a hang, or a run that stops without a word. Ctrl-C is not forgiven."""

    async def rollout(prompt: Prompt) -> RolloutSample:
        await asyncio.sleep(0)
        if prompt.index == 1:
            raise fault
        completion = await prompt.policy.generate([1], max_tokens=2)
        return RolloutSample.from_completion([1], completion, reward=float(prompt.rollout_index))

    engine = engine_of(rollout, on_error=on_error)
    if on_error == "drop" and not isinstance(fault, (KeyboardInterrupt, GeneratorExit)):
        ledger = await train(engine)
        assert (ledger["trained"], ledger["rejected"], ledger["pending"]) == (ROWS - 1, 1, 0)
    else:
        with pytest.raises(RolloutFailed, match=rf"(?s)row 1 .*failed:.*{type(fault).__name__}"):
            await train(engine)


async def test_what_a_second_try_can_mend_is_drawn_again_even_in_a_group_of_errors() -> None:
    """Calls of one turn run in a task group, which wraps what they raise."""
    tries = itertools.count(1)

    def flaky() -> str:
        if next(tries) <= 2:
            raise asyncrl.RecoverableRolloutError("the sandbox is gone")
        return "acted"

    async def rollout(prompt: Prompt) -> Rollout:
        unlucky = is_hostile(prompt) and prompt.index == 0
        chat = prompt.policy.chat("Go twice." if unlucky else "Go.", tools=[tool_of(flaky) if unlucky else act])
        await chat.run()
        return chat.sample(reward=float(prompt.rollout_index))

    engine = engine_of(rollout, retries=2)
    retried: list[float] = []
    engine.on_step = lambda record, batch: retried.append(record["members_retried"])
    assert all_trained(await train(engine))
    assert sum(retried) == 1


# Agents behind the endpoint


@pytest.fixture
async def endpoint() -> AsyncIterator[Endpoint]:
    async with Endpoint(EndpointConfig(max_calls=20)) as endpoint:
        yield endpoint


async def drops_the_connection(session: aiohttp.ClientSession, url: str) -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": "Go."}], "stream": True}
    with suppress(TimeoutError):
        async with asyncio.timeout(0.001), session.post(f"{url}/chat/completions", json=body):
            pass


async def branches_without_end(session: aiohttp.ClientSession, url: str) -> None:
    async def ask(number: int) -> int:
        body = {"model": "m", "messages": [{"role": "user", "content": f"Branch {number}."}]}
        async with session.post(f"{url}/chat/completions", json=body) as response:
            return response.status

    statuses = await asyncio.gather(*map(ask, range(40)))
    assert statuses.count(429) >= 20


async def sends_garbage(session: aiohttp.ClientSession, url: str) -> None:
    for body in (b"{", b"\xff" * 1000, json.dumps({"messages": {}}).encode()):
        async with session.post(f"{url}/chat/completions", data=body) as response:
            assert response.status == 400


@pytest.mark.parametrize("misbehave", [drops_the_connection, branches_without_end, sends_garbage])
async def test_a_hostile_program_behind_the_endpoint(
    misbehave: Callable[[aiohttp.ClientSession, str], Any], endpoint: Endpoint
) -> None:
    async def rollout(prompt: Prompt) -> Rollout:
        policy = prompt.policy
        headers = {"Authorization": f"Bearer {policy.openai_api_key}"}
        body = {"model": "m", "messages": [{"role": "user", "content": "Go."}]}
        async with aiohttp.ClientSession(headers=headers) as session:
            async with session.post(f"{policy.openai_base_url}/chat/completions", json=body) as response:
                assert response.status == 200
            if is_hostile(prompt):
                await misbehave(session, policy.openai_base_url)
        run: Rollout = policy.captured_run(reward=float(prompt.rollout_index))
        return run

    assert all_trained(await train(engine_of(rollout, endpoint)))
