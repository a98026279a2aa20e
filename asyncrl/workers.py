"""`asyncrl.offload`: CPU-heavy code of a rollout function, away from the event loop.

In a thread (the default) it costs microseconds and shares the interpreter's lock; in a process it runs in parallel,
and can be ended. Both wait for a slot of their own kind, so heavy code starves no other thread.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import os
import pickle
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import anyio
import anyio.to_process
from anyio.lowlevel import RunVar

from asyncrl.errors import RecoverableRolloutError, UserError

T = TypeVar("T")
SLOTS = os.cpu_count() or 2
"""Threads, and processes, at once: more than there are cores only makes each of them slower."""
LOST = (
    anyio.EndOfStream,
    anyio.IncompleteRead,
    anyio.DelimiterNotFound,
    anyio.BrokenResourceError,
    anyio.ClosedResourceError,
    TimeoutError,
)
"""How it shows that a worker process died, or did not come up."""

_threads: RunVar[anyio.CapacityLimiter] = RunVar("asyncrl_offload_threads")
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
            "the main script starts a run whenever it is imported, and a worker process of asyncrl.offload imports it. "
            'Start the run under `if __name__ == "__main__":`.'
        )


@dataclass(frozen=True, slots=True)
class _Outcome(Generic[T]):
    """What a call came to: a value or an error."""

    value: T | None = None
    error: BaseException | None = None

    @classmethod
    def of(cls, call: Callable[[], T]) -> _Outcome[T]:
        try:
            return cls(value=call())
        except BaseException as error:  # whoever awaits the call gets it, whatever it is; else it would wait for ever
            return cls(error=error)

    def unwrap(self) -> T:
        if self.error is not None:
            raise self.error
        return self.value  # type: ignore[return-value]  # there was no error, so it is what the call returned


# Threads


async def _in_thread(call: Callable[[], T], name: str, timeout_s: float) -> _Outcome[T]:
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[_Outcome[T]] = loop.create_future()
    slots = _slots(_threads)

    def finish(outcome: _Outcome[T]) -> None:
        slots.release_on_behalf_of(ended)
        if not ended.done():
            ended.set_result(outcome)

    def work(context: contextvars.Context) -> None:
        outcome = context.run(_Outcome.of, call)
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(finish, outcome)

    await slots.acquire_on_behalf_of(ended)
    # A daemon, so that code that never ends does not hold up the end of the process.
    context = contextvars.copy_context()
    threading.Thread(target=work, args=(context,), name=f"asyncrl offload {name}", daemon=True).start()
    with anyio.move_on_after(timeout_s):
        return await ended
    raise TimeoutError(
        f"asyncrl.offload: {name} took longer than timeout_s={timeout_s:g} s. A thread cannot be ended: it goes on and "
        f"holds one of {SLOTS} slots. With process=True it would have been ended; or raise the limit."
    )


# Processes


async def _in_process(call: Callable[[], T], name: str, timeout_s: float) -> _Outcome[T]:
    try:
        request = pickle.dumps(call)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise UserError(
            f"asyncrl.offload: {name} or an argument of it cannot be sent to a process: {error}. Expected a function "
            "from the top of a module and arguments that can be pickled; or leave process=True out."
        ) from None
    async with _slots(_processes):
        with anyio.move_on_after(timeout_s):
            return await _ask_worker(request, name)
    raise TimeoutError(
        f"asyncrl.offload: {name} took longer than timeout_s={timeout_s:g} s, so its process was ended. "
        "Raise the limit if it needs that long."
    )


async def _ask_worker(request: bytes, name: str) -> _Outcome[Any]:
    try:
        # The slot is already ours, hence a limiter that lets one in.
        answer = await anyio.to_process.run_sync(
            _answer, request, name, cancellable=True, limiter=anyio.CapacityLimiter(1)
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


def _answer(request: bytes, name: str) -> bytes:
    """In the worker: the pickled outcome, or one that says why there is none."""
    # Ctrl-C is for the run to handle. A function, since children of the worker would inherit SIG_IGN.
    signal.signal(signal.SIGINT, lambda number, frame: None)
    with _own_streams():
        outcome = _Outcome.of(lambda: pickle.loads(request)())
    if outcome.error is not None:
        trace = "".join(traceback.format_exception(outcome.error)).strip()
        outcome.error.add_note(f"In a worker process of asyncrl.offload:\n{trace}")
    try:
        answer = pickle.dumps(outcome)
        pickle.loads(answer)
    except Exception as error:  # a user's class may raise anything here
        if outcome.error is None:
            return pickle.dumps(
                _Outcome(error=UserError(f"asyncrl.offload: what {name} returned cannot be pickled: {error}"))
            )
        stand_in = RuntimeError(f"{type(outcome.error).__name__}: {outcome.error}")
        stand_in.add_note(outcome.error.__notes__[-1])
        return pickle.dumps(_Outcome(error=stand_in))
    return answer


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


def _slots(of: RunVar[anyio.CapacityLimiter]) -> anyio.CapacityLimiter:
    """One for each event loop: a limiter belongs to the loop it was first used in."""
    try:
        return of.get()
    except LookupError:
        limiter = anyio.CapacityLimiter(SLOTS)
        of.set(limiter)
        return limiter
