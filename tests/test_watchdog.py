"""A standstill ends the run, names who waits for what, and ends the process where nothing else can."""

from __future__ import annotations

import asyncio
import contextlib
import re
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import anyio
import pytest
import structlog

from asyncrl.errors import StallError
from asyncrl.exits import CUT_SHORT, STALLED
from asyncrl.interrupt import Interrupt
from asyncrl.last_resort import LastResort
from asyncrl.standstill import places_of, tasks_report, threads_report, where
from asyncrl.testing.clock import run_virtual
from asyncrl.watchdog import Watchdog

ROOT = Path(__file__).parents[1]
LIMIT_S = 60.0


async def for_ever() -> None:
    await asyncio.Event().wait()


# Phases


def test_a_phase_that_does_not_move_ends_with_the_culprit_first(tmp_path: Path) -> None:
    async def main() -> None:
        with Watchdog(100.0, tmp_path / "stalled.txt").phase("opening the sampler"):
            await for_ever()

    with pytest.raises(StallError) as caught:
        run_virtual(main())
    lines = str(caught.value).splitlines()
    assert lines[0] == "nothing has moved for stall_timeout_s=100 s."
    assert lines[1] == "run: opening the sampler, for 100 s"
    assert re.search(r"^it waits at: .*main \(test_watchdog.py:\d+\) > for_ever \(test_watchdog.py:\d+\)$", lines[2])
    assert lines[-1] == f"all tasks and threads: {tmp_path / 'stalled.txt'}"

    written = (tmp_path / "stalled.txt").read_text()
    assert (tmp_path / "stalled.txt").stat().st_mode & 0o077 == 0
    assert all(line in written for line in lines[:-1])
    assert "    Event.wait (" in written, "down to the last line, whoever's it is"
    assert "MainThread" in written
    assert [path.name for path in tmp_path.iterdir()] == ["stalled.txt"]


def test_what_moves_does_not_stall() -> None:
    async def main() -> float:
        moves = [0]
        with Watchdog(10.0).phase("training", marks=lambda: moves[0]):
            for _ in range(50):
                await asyncio.sleep(9.0)
                moves[0] += 1
        return asyncio.get_running_loop().time()

    assert run_virtual(main()) == 450.0


def test_a_phase_within_another_has_its_own_limit() -> None:
    async def main() -> None:
        watchdog = Watchdog(10.0)
        with watchdog.phase("the run"):
            for _ in range(3):
                with watchdog.phase("starting the sampler", limit_s=100.0):
                    await asyncio.sleep(90.0)
                await asyncio.sleep(9.0)
            with (
                pytest.raises(StallError, match=r"(?s)nothing has moved for 20 s\..*run: saving the model, for 20 s"),
                watchdog.phase("saving the model", limit_s=20.0),
            ):
                await for_ever()
            assert watchdog.ending is None
            await for_ever()

    with pytest.raises(StallError, match=r"(?s)nothing has moved for stall_timeout_s=10 s\..*run: the run, for 32\d s"):
        run_virtual(main())


def test_a_stall_wins_over_what_its_cancellation_leads_to() -> None:
    async def main() -> None:
        with Watchdog(10.0).phase("training"):
            try:
                await for_ever()
            finally:
                raise OSError("the disk is gone too")

    with pytest.raises(StallError) as caught:
        run_virtual(main())
    assert isinstance(caught.value.__cause__, OSError)


def test_what_goes_wrong_in_a_phase_and_a_cancellation_from_outside_are_themselves() -> None:
    async def main() -> None:
        watchdog = Watchdog(10.0)
        with pytest.raises(LookupError), watchdog.phase("one"):
            raise LookupError
        with anyio.move_on_after(5.0) as scope, watchdog.phase("two"):
            await for_ever()
        assert scope.cancelled_caught
        with watchdog.phase("three"):
            await asyncio.sleep(9.0)
        assert watchdog.ending is None

    run_virtual(main())


def test_code_that_swallows_one_cancellation_is_cancelled_again() -> None:
    async def main() -> None:
        with Watchdog(10.0).phase("training"):
            for _ in range(3):
                with contextlib.suppress(asyncio.CancelledError):
                    await for_ever()

    with pytest.raises(StallError):
        run_virtual(main())


def test_what_is_opened_in_a_phase_may_stay_open_longer() -> None:
    """Task groups and time limits too, which nest strictly otherwise."""

    async def main() -> None:
        watchdog = Watchdog(10.0)
        async with contextlib.AsyncExitStack() as stack:
            with watchdog.phase("opening the sampler"):
                group = await stack.enter_async_context(anyio.create_task_group())
            group.start_soon(anyio.sleep, 9.0)
            with pytest.raises(StallError), watchdog.phase("training"):
                await for_ever()
            task = asyncio.current_task()
            assert task is not None
            assert task.cancelling() == 0, "whoever waits for the run is not told that it was cancelled"
            await asyncio.sleep(1.0)

    run_virtual(main())


def test_where_the_report_cannot_be_written_all_of_it_is_said(tmp_path: Path) -> None:
    async def main() -> None:
        with Watchdog(10.0, tmp_path / "gone" / "stalled.txt").phase("training"):
            await for_ever()

    with pytest.raises(StallError) as caught:
        run_virtual(main())
    assert "Event.wait" in str(caught.value)
    assert str(caught.value).endswith("stalled.txt cannot be written: No such file or directory")


# Who waits for what


async def test_the_way_to_where_a_task_waits_goes_through_whatever_it_awaits() -> None:
    """Generators, context managers, other tasks, and what wraps them."""

    @contextlib.asynccontextmanager
    async def opened() -> AsyncIterator[None]:
        await other
        yield

    async def items() -> AsyncIterator[int]:
        async with opened():
            yield 1

    async def outer() -> None:
        async for _ in items():
            pass

    other = asyncio.create_task(for_ever(), name="the other one")
    task = asyncio.create_task(outer())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    names = [place.function.rpartition(".")[2] for place in places_of(task)]
    assert names == ["outer", "items", "__aenter__", "opened", "for_ever", "wait"]
    assert [place.task for place in places_of(task)] == ["", "", "", "", "the other one", ""]
    assert re.search(
        r"outer \(.*\) > .*items \(.*\) > .*opened \(.*\) > for_ever \(test_watchdog.py:\d+\)$", where(task)
    )
    for each in (task, other):
        each.cancel()
    await asyncio.wait([task, other])


async def test_thousands_that_wait_alike_are_told_once() -> None:
    tasks = [asyncio.create_task(for_ever(), name=f"Task-{n}") for n in range(1, 2001)]
    own = asyncio.create_task(asyncio.sleep(100), name="asyncrl sweeper")
    await asyncio.sleep(0)
    lines = tasks_report([*tasks, own])
    assert lines[0] == "asyncrl sweeper"
    alike = lines.index("2000 alike, the oldest of them Task-1, Task-2, Task-3, Task-4, Task-5")
    assert [line.split(" (")[0].strip() for line in lines[alike + 1 :]] == ["for_ever", "Event.wait"]
    for task in (*tasks, own):
        task.cancel()
    await asyncio.wait([*tasks, own])


def test_threads_are_told_with_their_stacks() -> None:
    gate = threading.Event()
    thread = threading.Thread(target=gate.wait, name="asyncrl-trainer")
    thread.start()
    lines = threads_report()
    gate.set()
    thread.join()
    at = lines.index("asyncrl-trainer")
    assert any("Event.wait" in line for line in lines[at + 1 :])


# The last resort

SCRIPT = """
import asyncio, signal, sys, time
from pathlib import Path
from asyncrl.interrupt import run_interruptible
from asyncrl.last_resort import LastResort
from asyncrl.watchdog import Watchdog

def busy():
    while True:
        time.sleep(0.01)

async def deaf():
    busy()

async def stubborn():
    while True:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            pass

async def deaf_to_signals():
    signal.raise_signal(signal.SIGTERM)
    busy()

async def never_stops():
    signal.raise_signal(signal.SIGTERM)
    await asyncio.Event().wait()

async def main(interrupt):
    interrupt.stop = lambda: None
    watchdog = Watchdog(float(sys.argv[2]), Path("stalled.txt"))
    with LastResort(watchdog, interrupt, float(sys.argv[3])), watchdog.phase("training"):
        await globals()[sys.argv[1]]()

if __name__ == "__main__":
    run_interruptible(main)
"""


@pytest.mark.parametrize(
    ("what", "limits", "code", "said"),
    [
        (
            "deaf",
            (0.5, 60.0),
            STALLED,
            r"has not turned for stall_timeout_s=0\.5 s, blocked by busy \(.*script.py:\d+\)",
        ),
        (
            "stubborn",
            (0.3, 0.5),
            STALLED,
            r"training stalled, was cancelled, and did not end within stop_timeout_s=0\.5 s",
        ),
        (
            "deaf_to_signals",
            (60.0, 1.5),
            CUT_SHORT,
            r"the stop waits for the event loop, blocked by busy \(.*script.py:\d+\); once more stops at once\n"
            r"(.|\n)*the stop has not come to its end within stop_timeout_s=1\.5 s",
        ),
        ("never_stops", (60.0, 0.5), CUT_SHORT, r"the stop has not come to its end within stop_timeout_s=0\.5 s"),
    ],
)
def test_what_cannot_be_ended_ends_the_process(
    what: str, limits: tuple[float, float], code: int, said: str, tmp_path: Path
) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "script.py", what, *map(str, limits)],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.returncode == code, done.stderr
    assert re.search(said, done.stderr)
    assert f"the process is ended with exit code {code}" in done.stderr
    report = (tmp_path / "stalled.txt").read_text()
    headline = re.search(r"error: (.*)", done.stderr)
    assert headline is not None
    assert headline[1] in report
    assert f"{what} (" in report


async def test_somebody_elses_process_is_only_told() -> None:
    interrupt, watchdog = Interrupt(), Watchdog(60.0)
    with (
        structlog.testing.capture_logs() as logs,
        LastResort(watchdog, interrupt, stop_limit_s=0.02),
        watchdog.phase("training"),
    ):
        interrupt()
        async with asyncio.timeout(LIMIT_S):
            while not logs:  # noqa: ASYNC110 - a thread sets no events of the loop
                await asyncio.sleep(0.01)
    assert "the stop has not come to its end within stop_timeout_s=0.02 s" in logs[0]["event"]
    assert len(logs) == 1


async def test_a_run_that_ends_in_time_is_left_alone_and_so_is_its_thread() -> None:
    watchdog = Watchdog(60.0)
    with LastResort(watchdog, Interrupt(), 60.0), watchdog.phase("training"):
        assert [thread for thread in threading.enumerate() if thread.name == "asyncrl last resort"]
    async with asyncio.timeout(LIMIT_S):
        while [t for t in threading.enumerate() if t.name == "asyncrl last resort"]:  # noqa: ASYNC110 - as above
            await asyncio.sleep(0.01)
