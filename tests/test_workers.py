from __future__ import annotations

import asyncio
import contextlib
import contextvars
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import asyncrl
from asyncrl import workers
from asyncrl.errors import RecoverableRolloutError, UserError
from asyncrl.rollout.failures import is_recoverable, users_traceback
from tests import offloaded

SOON_S = 30.0


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(SOON_S):
        while not true():  # noqa: ASYNC110 - threads and processes set no events of the loop
            await asyncio.sleep(0.01)


async def test_a_thread_runs_beside_the_loop_and_sees_its_context() -> None:
    variable = contextvars.ContextVar("variable", default=0)
    variable.set(7)

    def work(add: int, *, factor: int) -> tuple[str, int]:
        return threading.current_thread().name, (variable.get() + add) * factor

    name, value = await asyncrl.offload(work, 1, factor=2)
    assert value == 16
    assert name.startswith("asyncrl offload")


async def test_an_error_in_a_thread_arrives_with_its_traceback() -> None:
    with pytest.raises(LookupError) as caught:
        await asyncrl.offload(offloaded.fail)
    assert "in fail" in users_traceback(caught.value)


async def test_a_thread_that_overruns_is_recoverable_and_its_slot_is_free_when_it_ends() -> None:
    gate = threading.Event()
    with pytest.raises(TimeoutError, match=r"longer than 0\.05 s.*process=True") as caught:
        await asyncrl.offload(gate.wait, SOON_S, timeout_s=0.05)
    assert is_recoverable(caught.value)
    threads = workers.offload_threads()
    assert threads.running == 1
    gate.set()
    await until(lambda: threads.running == 0)


async def test_a_cancelled_call_gives_its_slot_back_when_the_thread_ends() -> None:
    gate, began = threading.Event(), threading.Event()
    task = asyncio.create_task(asyncrl.offload(lambda: (began.set(), gate.wait(SOON_S))))
    await until(began.is_set)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    threads = workers.offload_threads()
    assert threads.running == 1
    gate.set()
    await until(lambda: threads.running == 0)


async def test_no_more_threads_than_slots() -> None:
    running, most, lock = 0, 0, threading.Lock()

    def work() -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.002)
        with lock:
            running -= 1

    async with asyncio.timeout(SOON_S):
        await asyncio.gather(*(asyncrl.offload(work) for _ in range(5 * workers.SLOTS)))
    assert 1 <= most <= workers.SLOTS


async def test_a_process_is_another_one_and_is_used_again() -> None:
    first, value = await asyncrl.offload(offloaded.where, 2, factor=3, process=True)
    second, _ = await asyncrl.offload(offloaded.where, process=True)
    assert value == 9
    assert first == second != os.getpid()


async def test_an_error_in_a_process_arrives_with_its_traceback() -> None:
    with pytest.raises(LookupError, match="no such answer") as caught:
        await asyncrl.offload(offloaded.fail, process=True)
    assert "in fail" in users_traceback(caught.value)
    with pytest.raises(RuntimeError, match="Picky: 1 and 2"):
        await asyncrl.offload(offloaded.fail_pickily, process=True)


async def test_what_cannot_be_pickled_is_named() -> None:
    with pytest.raises(UserError, match=r"lambda.*cannot be sent to a process"):
        await asyncrl.offload(lambda: 1, process=True)
    with pytest.raises(UserError, match="returns_a_lambda returned cannot be pickled"):
        await asyncrl.offload(offloaded.returns_a_lambda, process=True)


async def test_a_killed_worker_harms_only_its_call() -> None:
    died, (_, value) = await asyncio.gather(
        asyncrl.offload(offloaded.die, process=True),
        asyncrl.offload(offloaded.where, process=True),
        return_exceptions=True,
    )
    assert isinstance(died, RecoverableRolloutError)
    assert value == 1
    assert (await asyncrl.offload(offloaded.where, process=True))[1] == 1


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("how", ["time limit", "cancellation"])
async def test_a_process_is_ended_by(how: str, tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    await asyncrl.offload(offloaded.where, process=True)  # so that the limit is for the call, not for the start
    limit_s = 2.0 if how == "time limit" else SOON_S
    task = asyncio.create_task(
        asyncrl.offload(offloaded.sleep_for_ever, str(pid_file), process=True, timeout_s=limit_s)
    )
    await until(lambda: pid_file.exists() and pid_file.read_text() != "")
    if how == "cancellation":
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
    else:
        with pytest.raises(TimeoutError, match="its process was ended") as caught:
            await task
        assert is_recoverable(caught.value)
    assert not is_alive(int(pid_file.read_text()))
    assert workers._process_slots().borrowed_tokens == 0


async def test_code_that_prints_reads_and_starts_programs_does_not_spoil_the_answer() -> None:
    assert await asyncrl.offload(offloaded.talk, process=True) == "done"


async def test_when_every_slot_is_held_by_threads_that_never_end_the_next_call_is_told() -> None:
    gate = threading.Event()
    threads = workers.Threads(2)
    for _ in range(2):
        with pytest.raises(TimeoutError, match=r"hang took longer than 0\.01 s"):
            await threads.run(lambda: gate.wait(SOON_S), "hang", 0.01)
    with pytest.raises(TimeoutError, match="all 2 threads for next are held by calls that took too long"):
        await threads.run(lambda: None, "next", 0.01)
    gate.set()
    await until(lambda: threads.running == 0)
    assert (await threads.run(lambda: 7, "next", SOON_S)).unwrap() == 7


async def test_a_call_waits_for_threads_that_are_within_their_limit() -> None:
    gate = threading.Event()
    threads = workers.Threads(1)
    async with asyncio.timeout(SOON_S), asyncio.TaskGroup() as tasks:
        slow = tasks.create_task(threads.run(lambda: gate.wait(SOON_S), "slow", SOON_S))
        await until(lambda: threads.running == 1)
        quick = tasks.create_task(threads.run(lambda: 7, "quick", 0.01))
        await asyncio.sleep(0.05)
        gate.set()
    assert slow.result().value is True
    assert quick.result().value == 7, "its own limit begins with its slot"


@pytest.mark.parametrize("fault", [SystemExit(2), KeyboardInterrupt(), GeneratorExit()])
async def test_what_would_end_the_loop_comes_back_to_who_called(fault: BaseException) -> None:
    def fail() -> None:
        raise fault

    with pytest.raises(type(fault)) as caught:
        await asyncrl.offload(fail)
    assert caught.value is fault


def test_worker_processes_end_with_the_run_however_it_ends(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    code = (
        "import asyncio, asyncrl, sys\nfrom tests import offloaded\n"
        "asyncio.run(asyncrl.offload(offloaded.sleep_for_ever, sys.argv[1], process=True))"
    )
    run = subprocess.Popen([sys.executable, "-c", code, str(pid_file)], cwd=Path(__file__).parents[1])
    try:
        wait_for(lambda: pid_file.exists() and pid_file.read_text() != "")
    finally:
        run.kill()
        run.wait(SOON_S)
    wait_for(lambda: not is_alive(int(pid_file.read_text())))


def wait_for(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SOON_S
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(
    "start",
    [
        "run_interruptible(lambda interrupt: asyncrl.offload(work, process=True))",
        "asyncio.run(asyncrl.offload(work, process=True))",
        "asyncio.run(asyncrl.train_async(work, config=None))",
    ],
)
def test_a_script_that_would_start_a_second_run_is_told(start: str, tmp_path: Path) -> None:
    script = tmp_path / "unguarded.py"
    script.write_text(
        "import asyncio, asyncrl\nfrom asyncrl.interrupt import run_interruptible\n"
        "def work(): return 1\n"
        f"if __name__ == '__main__': asyncio.run(asyncrl.offload(work, process=True))\nelse: {start}\n",
        encoding="utf-8",
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert 'start the run under `if __name__ == "__main__":`' in done.stderr
