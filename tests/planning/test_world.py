"""Virtual time in which things happen inside of `select`."""

from __future__ import annotations

import asyncio

import pytest

from asyncrl.planning.world import World, run_in
from asyncrl.testing.clock import Deadlock


def test_what_is_to_come_and_timers_share_one_clock() -> None:
    world, seen = World(), list[tuple[str, float]]()

    async def main() -> float:
        world.at(2.0, lambda now: seen.append(("act", now)))
        asyncio.get_running_loop().call_later(1.0, lambda: seen.append(("timer", world.now)))
        await world.sleep(3.0)
        await asyncio.sleep(1.5)
        return asyncio.get_running_loop().time()

    assert run_in(world, main()) == pytest.approx(4.5)
    assert seen == [("timer", pytest.approx(1.0)), ("act", pytest.approx(2.0))]


def test_the_loop_goes_on_before_anything_else_happens() -> None:
    """Whoever is woken at 1 acts at 1, though more is set for 2."""
    world, seen = World(), list[tuple[str, float]]()

    async def main() -> None:
        world.at(2.0, lambda now: seen.append(("late", now)))
        await world.sleep(1.0)
        seen.append(("woken", world.now))
        world.at(1.5, lambda now: seen.append(("set then", now)))
        await world.sleep(2.0)

    run_in(world, main())
    assert seen == [("woken", 1.0), ("set then", 1.5), ("late", 2.0)]


def test_a_deadlock_shows_at_once() -> None:
    world = World()

    async def main() -> None:
        await asyncio.get_running_loop().create_future()

    with pytest.raises(Deadlock):
        run_in(world, main())
