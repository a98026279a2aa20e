"""The share of an evaluation in the training window."""

from __future__ import annotations

import asyncio

import pytest

from asyncrl.config import ConcurrencyConfig
from asyncrl.rollout.concurrency import FixedWindow, controller
from asyncrl.rollout.guests import Guests


def waiting(guests: Guests, count: int) -> list[asyncio.Task[None]]:
    return [asyncio.create_task(guests.acquire()) for _ in range(count)]


@pytest.mark.parametrize(("window", "most", "share"), [(64, None, 8), (4, None, 1), (1, None, 1), (64, 3, 3)])
async def test_the_share_of_a_window(window: int, most: int | None, share: int) -> None:
    slots = FixedWindow(window)
    guests = Guests(slots, most)
    tasks = waiting(guests, 20)
    await asyncio.sleep(0)
    assert (guests.in_use, slots.in_flight) == (share, share)
    guests.release()
    await asyncio.sleep(0)
    assert sum(task.done() for task in tasks) == share + 1
    for task in tasks:
        task.cancel()


async def test_the_share_follows_an_adaptive_window() -> None:
    guests = Guests(controller(ConcurrencyConfig(min_window=4, max_window=64, initial_window=32)))
    assert guests.most == 4


async def test_a_guest_waits_for_a_slot_of_a_full_window_and_leaves_it_to_training() -> None:
    """In a window of one they take turns."""
    slots = FixedWindow(1)
    guests = Guests(slots)
    turns: list[str] = []

    def train() -> None:
        if slots.try_acquire():
            turns.append("training")
        guests.admit()

    guests.freed = train
    train()
    for task in waiting(guests, 3):
        await asyncio.sleep(0)
        assert not task.done()
        slots.release()  # a training rollout has ended
        guests.admit()
        train()
        await task
        turns.append("evaluation")
        guests.release()
    assert turns == ["training", "evaluation"] * 3 + ["training"]


async def test_a_cancelled_guest_takes_no_slot() -> None:
    slots = FixedWindow(1)
    guests = Guests(slots)
    assert slots.try_acquire()
    first, second = waiting(guests, 2)
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.sleep(0)
    slots.release()
    guests.admit()
    second.cancel()  # it has the slot, but has not run since
    await asyncio.wait([first, second])
    assert first.cancelled()
    assert second.cancelled()
    assert (guests.in_use, slots.in_flight) == (0, 0)


async def test_after_training_the_window_does_not_count() -> None:
    """Rollouts that were cancelled when training ended never gave their slots back."""
    slots = FixedWindow(2)
    guests = Guests(slots)
    assert slots.try_acquire()
    assert slots.try_acquire()
    tasks = waiting(guests, 8)
    await asyncio.sleep(0)
    assert not any(task.done() for task in tasks)
    guests.training_is_over(5)
    await asyncio.sleep(0)
    assert sum(task.done() for task in tasks) == 5
    guests.release()
    await asyncio.sleep(0)
    assert sum(task.done() for task in tasks) == 6
    for task in tasks:
        task.cancel()
