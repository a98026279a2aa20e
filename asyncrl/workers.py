"""Code of the user's, kept apart from the event loop and from the engine. `asyncrl.offload` is for CPU-heavy code of a
rollout function; tools run through the same threads and tasks.

In a thread (the default) it costs microseconds and shares the interpreter's lock; in a process it runs in parallel,
and can be ended. Both wait for a slot of their own kind, so heavy code starves no other thread.
"""

from __future__ import annotations

import asyncio
import atexit
import contextvars
import functools
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any, Generic, TypeVar

import anyio
import anyio.to_process
import structlog
from anyio.lowlevel import RunVar

from asyncrl.errors import RecoverableRolloutError, UserError

T = TypeVar("T")
SLOTS = os.cpu_count() or 2
"""Threads, and processes, at once: more than there are cores only makes each of them slower."""
IDLE_S = 30.0
"""How long a thread without a call stays."""
PARENT_EVERY_S = 1.0
"""How often a worker process looks whether the run is still there."""
LOST = (
    anyio.EndOfStream,
    anyio.IncompleteRead,
    anyio.DelimiterNotFound,
    anyio.BrokenResourceError,
    anyio.ClosedResourceError,
    TimeoutError,
)
"""How it shows that a worker process died, or did not come up."""

log = structlog.get_logger(__name__)

_threads: RunVar[Threads] = RunVar("asyncrl_offload_threads")
_processes: RunVar[anyio.CapacityLimiter] = RunVar("asyncrl_offload_processes")


async def offload(
    function: Callable[..., T], *args: Any, process: bool = False, timeout_s: float = 60.0, **kwargs: Any
) -> T:
    """Run `function(*args, **kwargs)` without blocking the event loop; what it returns or raises comes back.

    Args:
        function: A synchronous function. For a process one that can be pickled: defined at the top of a module.
        process: In a process of its own instead of a thread. It starts without this process's state, and a script
            that uses it must start the run under `if __name__ == "__main__":`.
        timeout_s: Longest call, from when it gets a slot; a process has to start in that time too. A process is
            ended then, and when the call is cancelled. A thread cannot be: its result is thrown away, and its slot
            is free when it ends.

    Raises:
        TimeoutError: it took longer. A rollout is drawn again for it, as for the next.
        RecoverableRolloutError: the worker process died, and harmed no other call.
        UserError: the function, an argument or the result cannot be pickled, or the main script cannot be imported.
    """
    call = functools.partial(function, *args, **kwargs)
    name = getattr(function, "__qualname__", repr(function))
    outcome = await (_in_process if process else _in_thread)(call, name, timeout_s)
    return outcome.unwrap()


def refuse_in_worker() -> None:
    """A worker process imports the main script; one that starts a run when it is imported would start another.

    Raises: UserError.
    """
    if "anyio.to_process" in sys.orig_argv:
        raise UserError(
            "a worker process of asyncrl.offload was to start a run, or a worker of its own. It imports the main "
            'script: start the run under `if __name__ == "__main__":` there. An offloaded function can start neither.'
        )


@dataclass(frozen=True, slots=True)
class Outcome(Generic[T]):
    """What a call came to: a value or an error, whatever it is. As data, since some exceptions cannot travel: asyncio
    lets a SystemExit of one task end the whole loop."""

    value: T | None = None
    error: BaseException | None = None

    @classmethod
    def of(cls, call: Callable[[], T]) -> Outcome[T]:
        try:
            return cls(value=call())
        except BaseException as error:  # whoever awaits the call gets it, whatever it is; else it would wait for ever
            return cls(error=error)

    @classmethod
    async def awaiting(cls, call: Callable[[], Awaitable[T]]) -> Outcome[T]:
        """Of an async function. For a task of its own: its cancellation is an outcome too."""
        try:
            return cls(value=await call())
        except BaseException as error:  # as above
            return cls(error=error)

    def unwrap(self) -> T:
        if self.error is not None:
            raise self.error
        return self.value  # type: ignore[return-value]  # there was no error, so it is what the call returned


# Threads


Work = Callable[[], Callable[[], None]]
"""What a thread does; what it returns tells whoever waits, once the thread is free again."""
_idle: deque[SimpleQueue[tuple[str, Work]]] = deque()
"""The inboxes of threads that have nothing to do, of all loops. Starting a thread makes the loop wait for it."""


class Threads:
    """At most `slots` calls at once, each in a thread. For one event loop.

    A thread cannot be ended: one that overruns goes on and holds its slot until it ends. All are daemons, so that
    code that never ends does not hold up the end of the process.
    """

    def __init__(self, slots: int) -> None:
        self._limiter = anyio.CapacityLimiter(slots)
        # Of every call that has not ended: the loop's time when it should have.
        self._limits: dict[object, float] = {}

    @property
    def running(self) -> int:
        """Threads that have not ended."""
        return len(self._limits)

    async def run(self, call: Callable[[], T], name: str, timeout_s: float) -> Outcome[T]:
        """Wait for a slot, then at most `timeout_s`.

        Raises:
            TimeoutError: the call took longer, or every slot is held by one that took longer and has not ended.
        """
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[Outcome[T]] = loop.create_future()

        def finish(outcome: Outcome[T]) -> None:
            del self._limits[ended]
            self._limiter.release_on_behalf_of(ended)
            if not ended.done():
                ended.set_result(outcome)

        def work() -> Callable[[], None]:
            outcome = context.run(Outcome.of, call)

            def tell() -> None:
                with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                    loop.call_soon_threadsafe(finish, outcome)

            return tell

        await self._acquire(ended, name, timeout_s)
        self._limits[ended] = loop.time() + timeout_s
        context = contextvars.copy_context()
        _in_some_thread(name, work)
        with anyio.move_on_after(timeout_s):
            return await ended
        raise TimeoutError(f"{name} took longer than {timeout_s:g} s")

    async def _acquire(self, holder: object, name: str, timeout_s: float) -> None:
        """Wait as long as a slot is held by a call that is still within its limit: that one will be free."""
        slots = int(self._limiter.total_tokens)
        while len(self._limits) < slots or max(self._limits.values()) > asyncio.get_running_loop().time():
            with anyio.move_on_after(timeout_s):
                await self._limiter.acquire_on_behalf_of(holder)
                return
        raise TimeoutError(f"all {slots} threads for {name} are held by calls that took too long and have not ended")


def _in_some_thread(name: str, work: Work) -> None:
    """In the one that was busy last, so that the others may go; in a new one where all are busy."""
    try:
        inbox = _idle.pop()
    except IndexError:
        inbox = SimpleQueue()
        threading.Thread(target=_serve, args=(inbox,), daemon=True).start()
    inbox.put((name, work))


def _serve(inbox: SimpleQueue[tuple[str, Work]]) -> None:
    """In a thread: one call after another, until there has been none for a while."""
    while True:
        try:
            name, work = inbox.get(timeout=IDLE_S)
        except Empty:
            with suppress(ValueError):  # somebody has just taken it: a call is on its way
                _idle.remove(inbox)
                return
            continue
        threading.current_thread().name = f"asyncrl offload {name}"
        tell = work()
        threading.current_thread().name = "asyncrl offload, idle"
        _idle.append(inbox)
        tell()
        del work, tell  # what the call held would live as long as the thread waits


async def _in_thread(call: Callable[[], T], name: str, timeout_s: float) -> Outcome[T]:
    try:
        return await offload_threads().run(call, name, timeout_s)
    except TimeoutError as error:
        raise TimeoutError(
            f"asyncrl.offload: {error}. A thread cannot be ended: it goes on and holds one of {SLOTS} slots. "
            "With process=True it would have been ended; or raise the limit."
        ) from None


# Tasks


async def in_own_task(call: Callable[[], Awaitable[T]], name: str, timeout_s: float, grace_s: float) -> Outcome[T]:
    """Await code of the user's in a task of its own: what it raises or cancels ends there, and it ends in time.

    One that ignores its cancellation for `grace_s` is left behind.

    Raises:
        TimeoutError: it took longer than `timeout_s`.
    """
    task = asyncio.get_running_loop().create_task(Outcome.awaiting(call), name=f"asyncrl {name}")
    try:
        await asyncio.wait({task}, timeout=timeout_s)
        overran = not task.done()
    finally:  # also when the caller is cancelled
        if not task.done():
            task.cancel()
            with anyio.CancelScope(shield=True):
                await asyncio.wait({task}, timeout=grace_s)
            if not task.done():
                log.warning("a call ignores its cancellation and is left behind", call=name)
    if overran:
        raise TimeoutError(f"{name} took longer than {timeout_s:g} s")
    return task.result()


# Processes


async def _in_process(call: Callable[[], T], name: str, timeout_s: float) -> Outcome[T]:
    refuse_in_worker()
    try:
        request = pickle.dumps(call)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise UserError(
            f"asyncrl.offload: {name} or an argument of it cannot be sent to a process: {error}. Expected a function "
            "from the top of a module and arguments that can be pickled; or leave process=True out."
        ) from None
    async with _process_slots():
        with anyio.move_on_after(timeout_s):
            return await _ask_worker(request, name)
    raise TimeoutError(
        f"asyncrl.offload: {name} took longer than timeout_s={timeout_s:g} s, so its process was ended. "
        "Raise the limit if it needs that long."
    )


async def _ask_worker(request: bytes, name: str) -> Outcome[Any]:
    try:
        # The slot is already ours, hence a limiter that lets one in.
        answer = await anyio.to_process.run_sync(
            _answer, request, name, os.getpid(), cancellable=True, limiter=anyio.CapacityLimiter(1)
        )
    except anyio.BrokenWorkerProcess as error:
        cause = error.__cause__
        if cause is None or isinstance(cause, LOST):
            raise RecoverableRolloutError(
                f"asyncrl.offload: the process of {name} died or did not start. Its code may have crashed or ended "
                "the interpreter, or the system ended it for want of memory."
            ) from error
        raise UserError(f"asyncrl.offload: a worker process could not import the main script: {cause}") from error
    return pickle.loads(answer)  # type: ignore[no-any-return]  # made by _answer


def _answer(request: bytes, name: str, parent: int) -> bytes:
    """In the worker: the pickled outcome, or one that says why there is none."""
    _end_with(parent)
    # Ctrl-C is for the run to handle. A function, since children of the worker would inherit SIG_IGN.
    signal.signal(signal.SIGINT, lambda number, frame: None)
    with _own_streams():
        outcome = Outcome.of(lambda: pickle.loads(request)())
    if outcome.error is not None:
        trace = "".join(traceback.format_exception(outcome.error)).strip()
        outcome.error.add_note(f"In a worker process of asyncrl.offload:\n{trace}")
    try:
        answer = pickle.dumps(outcome)
        pickle.loads(answer)
    except Exception as error:  # a user's class may raise anything here
        if outcome.error is None:
            return pickle.dumps(
                Outcome(error=UserError(f"asyncrl.offload: what {name} returned cannot be pickled: {error}"))
            )
        stand_in = RuntimeError(f"{type(outcome.error).__name__}: {outcome.error}")
        stand_in.add_note(outcome.error.__notes__[-1])
        return pickle.dumps(Outcome(error=stand_in))
    return answer


@functools.cache
def _end_with(parent: int) -> None:
    """In the worker: end when the run has, however it ended, with all programs that were started here. An idle worker
    reads from the run and sees its end by itself; one that computes for ever would not."""
    leads = os.name == "posix"
    if leads:
        os.setpgid(0, 0)

    def end() -> None:
        if leads:
            os.killpg(0, signal.SIGKILL)
        os._exit(1)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT_EVERY_S)
        end()

    atexit.register(end)
    threading.Thread(target=watch, name="asyncrl parent watch", daemon=True).start()


@contextmanager
def _own_streams() -> Iterator[None]:
    """Keep the code, and programs that it starts, off the pipes through which the worker is spoken to."""
    pipes = [os.dup(number) for number in (0, 1)]
    nowhere = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nowhere, number)
    os.close(nowhere)
    try:
        yield
    finally:
        for number, pipe in enumerate(pipes):
            os.dup2(pipe, number)
            os.close(pipe)


def offload_threads() -> Threads:
    """Those of this event loop."""
    try:
        return _threads.get()
    except LookupError:
        threads = Threads(SLOTS)
        _threads.set(threads)
        return threads


def _process_slots() -> anyio.CapacityLimiter:
    try:
        return _processes.get()
    except LookupError:
        limiter = anyio.CapacityLimiter(SLOTS)
        _processes.set(limiter)
        return limiter
