from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncrl.config import ConcurrencyConfig, Config
from asyncrl.errors import ConfigError
from asyncrl.rollout.concurrency import AdaptiveWindow, FixedWindow, controller
from asyncrl.types import Load


def adaptive(initial: int = 16, low: int = 1, high: int = 1000) -> AdaptiveWindow:
    window = controller(ConcurrencyConfig(initial_window=initial, min_window=low, max_window=high))
    assert isinstance(window, AdaptiveWindow)
    return window


def fill(window: AdaptiveWindow) -> None:
    while window.try_acquire():
        pass


def turn_over(window: AdaptiveWindow) -> None:
    """As many rollouts end and begin as the window holds."""
    for _ in range(window.window_size):
        window.release()
        window.try_acquire()
    fill(window)


def observe_full(window: AdaptiveWindow, load: Load, now: float) -> None:
    turn_over(window)
    window.observe(load, now)


IDLE = Load(running=16, waiting=0)


def test_from_a_cold_start_it_doubles_with_each_turnover() -> None:
    window = adaptive(8)
    fill(window)
    window.observe(IDLE, 0.0)
    sizes = []
    for now in range(1, 5):
        observe_full(window, IDLE, float(now))
        sizes.append(window.window_size)
    assert sizes == [16, 32, 64, 128]
    assert window.reason == "64 -> 128: the limit binds and nothing waits"


def test_it_grows_only_while_its_limit_is_what_holds_rollouts_back() -> None:
    window = adaptive(8)
    for now in range(10):
        for _ in range(4):
            assert window.try_acquire()
        for _ in range(4):
            window.release()
        window.observe(IDLE, float(now))
    assert window.window_size == 8


def test_observations_that_stop_coming_permit_no_growth() -> None:
    window = adaptive(8)
    fill(window)
    window.observe(IDLE, 0.0)
    for _ in range(50):
        turn_over(window)
    assert window.window_size == 8
    window.observe(IDLE, 60.0)
    assert window.window_size == 8, "a minute without metrics is no evidence of room"
    observe_full(window, IDLE, 61.0)
    assert window.window_size == 16


def test_a_full_kv_cache_stops_growth() -> None:
    sizes = {}
    for kv_use in (0.5, 0.875, 0.95, 1.0):
        window = adaptive(100)
        fill(window)
        window.observe(Load(100, 0, kv_use), 0.0)
        observe_full(window, Load(100, 0, kv_use), 1.0)
        sizes[kv_use] = window.window_size
    assert sizes == {0.5: 200, 0.875: 150, 0.95: 100, 1.0: 100}


class TestCongestion:
    def congested(self) -> AdaptiveWindow:
        window = adaptive(64)
        fill(window)
        window.observe(Load(48, 0), 0.0)
        window.observe(Load(48, 16), 1.0)
        return window

    def test_one_look_at_a_queue_is_not_enough(self) -> None:
        window = self.congested()
        assert window.window_size == 64
        window.observe(Load(48, 16), 2.0)
        assert window.window_size == 48
        assert window.reason == "64 -> 48: 16 requests wait"

    def test_it_shrinks_once_and_waits_for_the_effect(self) -> None:
        window = self.congested()
        for now in range(2, 20):
            window.observe(Load(48, 16), float(now))
        assert window.window_size == 48, "nothing is learned while the old rollouts drain"

    def test_the_slots_that_are_too_many_are_paid_back_by_releases(self) -> None:
        window = self.congested()
        window.observe(Load(48, 16), 2.0)
        assert window.in_flight == 64
        for left in range(63, 47, -1):
            window.release()
            assert window.in_flight == left
            assert not window.try_acquire() or left < 48
        window.release()
        assert window.try_acquire()

    def test_it_never_shrinks_below_what_the_engine_runs(self) -> None:
        window = adaptive(64)
        fill(window)
        for now in range(3):
            window.observe(Load(60, 200), float(now))
        assert window.window_size == 60

    def test_refused_requests_count_at_once_and_rare_preemptions_do_not(self) -> None:
        window = adaptive(100)
        fill(window)
        window.observe(Load(100, 0), 0.0)
        window.observe(Load(100, 0, rejected=1), 1.0)
        assert window.window_size == 95
        window = adaptive(100)
        fill(window)
        window.observe(Load(100, 0, 1.0), 0.0)
        observe_full(window, Load(100, 0, 1.0, preemptions=20), 1.0)
        assert window.window_size == 100
        observe_full(window, Load(100, 0, 1.0, preemptions=120), 2.0)
        assert window.window_size == 95


def test_it_settles_at_the_capacity_without_swinging() -> None:
    """An engine that runs 40 at once and queues the rest; each turn of the loop is one turnover."""
    window = adaptive(16)
    sizes = []
    for now in range(300):
        fill(window)
        turn_over(window)
        window.observe(Load(min(40, window.in_flight), max(0, window.in_flight - 40)), float(now))
        while window.in_flight > window.window_size:
            window.release()
        sizes.append(window.window_size)
    settled = sizes[60:]
    assert min(settled) >= 38
    assert max(settled) <= 45
    assert sum(a != b for a, b in itertools.pairwise(settled)) < len(settled) / 5


loads = st.builds(
    Load,
    running=st.integers(0, 200),
    waiting=st.integers(0, 200),
    kv_use=st.none() | st.floats(0, 1),
    preemptions=st.integers(0, 50),
    rejected=st.integers(0, 5),
)


@given(
    st.integers(1, 50),
    st.integers(0, 150),
    st.lists(st.tuples(loads, st.integers(0, 60)), max_size=60),
    st.integers(1, 90),
)
def test_whatever_is_observed_the_window_stays_in_its_limits(
    low: int, more: int, steps: list[tuple[Load, int]], initial: int
) -> None:
    window = adaptive(initial, low, low + more + 1)
    for now, (load, releases) in enumerate(steps):
        fill(window)
        assert window.in_flight >= window.window_size
        for _ in range(min(releases, window.in_flight)):
            window.release()
        window.observe(load, float(now))
        assert low <= window.window_size <= low + more + 1


def test_equal_limits_are_a_fixed_window() -> None:
    window = controller(ConcurrencyConfig(min_window=3, max_window=3))
    assert isinstance(window, FixedWindow)
    assert [window.try_acquire() for _ in range(4)] == [True, True, True, False]
    window.observe(Load(1, 100), 0.0)
    assert window.step_completed() == {"window": 3.0, "in_flight": 3.0, "in_flight_peak": 3.0}
    window.release()
    assert window.try_acquire()


def test_a_minimum_above_the_maximum_is_refused() -> None:
    with pytest.raises(ConfigError, match="min_window is 9 and max_window is 3"):
        Config(model="none", concurrency={"min_window": 9, "max_window": 3})
