"""The modelled sampler against times worked out by hand."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncrl.planning.sampler_model import ModelledSampler, Played, SamplerModel
from asyncrl.planning.workload import Attempt, Call, Turn
from asyncrl.planning.world import World, run_in
from asyncrl.types import SampleRequest, SamplingParams, Weights

Work = Callable[[ModelledSampler, World], Awaitable[object]]


def live(model: SamplerModel, work: Work) -> object:
    world = World()
    sampler = ModelledSampler(model, world, random.Random(0))

    async def main() -> object:
        return await work(sampler, world)

    return run_in(world, main())


def rollout(*drawn: int, gap_s: float = 0.0, fresh: int = 0, after_s: float = 0.0) -> Attempt:
    return Attempt.of_turns([(gap_s, fresh, tokens) for tokens in drawn], after_s=after_s)


def times(model: SamplerModel, attempts: Sequence[tuple[float, Attempt]]) -> list[float]:
    """When rollouts that begin at these times end."""

    async def one(sampler: ModelledSampler, world: World, begin: float, attempt: Attempt) -> float:
        await world.sleep(begin)
        await sampler.play(attempt)
        return world.now

    async def work(sampler: ModelledSampler, world: World) -> object:
        return await asyncio.gather(*(one(sampler, world, begin, attempt) for begin, attempt in attempts))

    found = live(model, work)
    assert isinstance(found, list)
    return found


def test_requests_of_a_replica_share_it() -> None:
    """t(1) = 0.1, t(2) = 0.15. Alone until 1 s: 10 tokens; then both draw, until the first has its 30: 20 x 0.15."""
    model = SamplerModel(token_s=0.1, running_s=0.05)
    assert times(model, [(0.0, rollout(30)), (1.0, rollout(40))]) == pytest.approx([4.0, 6.0])


def test_a_prompt_holds_up_everybody() -> None:
    """The second one's 100 prompt tokens take 0.5 s in which the first gets none."""
    model = SamplerModel(token_s=0.1, prompt_s=0.005)
    assert times(model, [(0.0, rollout(20)), (1.0, rollout(5, fresh=100))]) == pytest.approx([2.5, 2.0])


def test_who_finds_no_room_waits() -> None:
    model = SamplerModel(token_s=0.1, max_running=1)
    assert times(model, [(0.0, rollout(10)), (0.5, rollout(10)), (0.6, rollout(10))]) == pytest.approx([1, 2, 3])


def test_turns_and_tools_and_latency_add_up() -> None:
    model = SamplerModel(token_s=0.1, call_s=0.25)
    attempt = rollout(10, 20, gap_s=1.0, after_s=2.0)  # 1 + 1 + 0.25, 1 + 2 + 0.25, 2
    assert times(model, [(0.0, attempt)]) == pytest.approx([7.5])


def test_calls_of_one_turn_run_beside_each_other() -> None:
    attempt = Attempt((Turn(0.0, (Call(0, 0, 10), Call(0, 0, 20))),), after_s=1.0)
    assert times(SamplerModel(token_s=0.1), [(0.0, attempt)]) == pytest.approx([3.0])


def test_sessions_spread_over_replicas_and_stay() -> None:
    model = SamplerModel(replicas=2, token_s=0.1, running_s=0.1)
    assert times(model, [(0.0, rollout(10, 10)), (0.0, rollout(10, 10))]) == pytest.approx([2.0, 2.0])


def played(model: SamplerModel, publish_at: Sequence[float], attempt: Attempt) -> Played:
    async def publish(sampler: ModelledSampler, world: World) -> None:
        for version, time in enumerate(publish_at, start=1):
            await world.sleep(time - world.now)
            await sampler.publish(Weights(version, adapter=False))

    async def work(sampler: ModelledSampler, world: World) -> object:
        publishing = asyncio.create_task(publish(sampler, world))
        found = await sampler.play(attempt)
        await publishing
        return found

    found = live(model, work)
    assert isinstance(found, Played)
    return found


def test_a_call_goes_on_with_new_weights() -> None:
    """Live at 0.35 and 0.75: 3 tokens before the first (and half a one), 4 between."""
    model = SamplerModel(token_s=0.1, hot_load_s=(0.0,))
    found = played(model, [0.301, 0.701], rollout(10))
    assert found.drawn == [(0, 3), (1, 4), (2, 3)]
    assert found.model_s == pytest.approx(1.0)


def test_adapters_stay_what_they_were_sent_with() -> None:
    model = SamplerModel(token_s=0.1, side_by_side=True)
    assert played(model, [0.3, 1.2], rollout(10, 10)).drawn == [(0, 10), (1, 10)]


def test_a_hot_load_pauses_a_part_of_its_time() -> None:
    model = SamplerModel(token_s=0.1, hot_load_s=(0.4,), pause_share=0.5)
    found = played(model, [0.5], rollout(10))
    assert found.model_s == pytest.approx(1.2)
    assert found.drawn == [(0, 7), (1, 3)]


def test_a_drained_hot_load_waits_for_what_runs_and_holds_back_what_comes() -> None:
    model = SamplerModel(token_s=0.1, drain=True, hot_load_s=(0.5,))

    async def work(sampler: ModelledSampler, world: World) -> object:
        first = asyncio.create_task(sampler.play(rollout(10)))
        await world.sleep(0.5)
        publishing = asyncio.create_task(sampler.publish(Weights(1, adapter=False)))
        await world.sleep(0.1)
        second = await sampler.play(rollout(10))
        await publishing
        return (await first).drawn, second.drawn, world.now

    first, second, now = live(model, work)  # type: ignore[misc]
    assert (first, second) == ([(0, 10)], [(1, 10)])
    assert now == pytest.approx(2.5, abs=0.11)


def test_a_cancelled_rollout_frees_its_place() -> None:
    model = SamplerModel(token_s=0.1, running_s=0.1, max_running=2)

    async def work(sampler: ModelledSampler, world: World) -> object:
        tasks = [asyncio.create_task(sampler.play(rollout(tokens))) for tokens in (10, 100, 10)]
        await world.sleep(1.0)
        tasks[1].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        load = await sampler.load()
        return world.now, load.running, load.waiting, sampler.totals.busy

    # Two run at 0.2 s a token: 5 tokens by 1 s. Then the third joins: at 2 s the first is done; 5 more alone.
    assert live(model, work) == (pytest.approx(2.5), 0, 0, 0)


def test_it_answers_requests_as_any_sampler() -> None:
    async def work(sampler: ModelledSampler, world: World) -> object:
        return await sampler.generate(SampleRequest([1, 2, 3], SamplingParams(max_tokens=4)))

    found = live(SamplerModel(token_s=0.1), work)
    assert found.tokens == [0, 0, 0, 0]  # type: ignore[attr-defined]
    assert found.versions == [0, 0, 0, 0]  # type: ignore[attr-defined]


@given(
    st.lists(st.tuples(st.floats(0, 5), st.integers(1, 50), st.integers(0, 20)), min_size=1, max_size=12),
    st.floats(0.0, 0.2),
    st.integers(1, 3),
)
@settings(max_examples=60, deadline=None)
def test_one_clock_for_all_agrees_with_counting_every_token(
    requests: list[tuple[float, int, int]], running_s: float, most: int
) -> None:
    """Against a simulation in small steps that knows each request's own progress, and is a step late at each event."""
    model = SamplerModel(token_s=0.1, running_s=running_s, prompt_s=0.01, max_running=most)
    exact = times(model, [(begin, rollout(drawn, fresh=fresh)) for begin, drawn, fresh in requests])
    assert exact == pytest.approx(_by_small_steps(model, requests), abs=0.02 + 0.01 * len(requests))


def _by_small_steps(model: SamplerModel, requests: list[tuple[float, int, int]], step_s: float = 2e-3) -> list[float]:
    order = sorted(range(len(requests)), key=lambda index: requests[index][0])
    ends, left, running, debt_s, now = [0.0] * len(requests), {}, list[int](), 0.0, 0.0
    waiting = list[int]()
    while order or waiting or running:
        while order and requests[order[0]][0] <= now:
            waiting.append(order.pop(0))
        while waiting and len(running) < (model.max_running or len(requests)):
            index = waiting.pop(0)
            running.append(index)
            left[index] = float(requests[index][1])
            debt_s += requests[index][2] * model.prompt_s
        work_s = max(0.0, step_s - debt_s)
        debt_s = max(0.0, debt_s - step_s)
        pace = model.token_time(len(running))
        now += step_s
        for index in list(running):
            left[index] -= work_s / pace
            if left[index] <= 1e-9:
                ends[index] = now
                running.remove(index)
    return ends


def test_tokens_that_take_less_than_the_clock_can_tell_are_drawn() -> None:
    """At 1e9 s the clock has steps of 1e-7 s, and a token takes 1e-9."""
    late = 1e9
    assert times(SamplerModel(token_s=1e-9), [(late, rollout(3)), (late, rollout(5))]) == pytest.approx([late, late])
