"""Run a program that a model wrote: `run_python`.

    outcome = await run_python("print(6 * 7)")      # Outcome(stdout="42\\n", ...)

The program gets a process and an empty folder of its own, which are gone afterwards. It has limits on time, memory and
output, and on Linux no network, no other files to write, none to read but Python's, no processes to start or to
signal, and none of the rights of root. The environment is empty: no keys, no tokens.

That is a guard against accidents, and against a policy that has found out that cheating pays. It is no guard against
an attacker: the program runs on this machine's kernel. Give hostile code a virtual machine.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

import anyio
from anyio.abc import Process
from anyio.lowlevel import RunVar

from asyncrl.errors import UserError

if TYPE_CHECKING:  # importing it needs a POSIX system
    from asyncrl.agents.sandbox_walls import Plan

WALLS = str(Path(__file__).with_name("sandbox_walls.py"))
SLOTS = os.cpu_count() or 2
"""Programs at once: more than there are cores would only push each other over their time limits."""
FILE_BYTES = 1 << 24
"""Longest file, and longest output, on disk."""
LEAST_MEMORY_MB = 64
ALARM_S = 10.0
"""How long after its time a program ends by itself, should this process be gone."""
REMOVE_S = 60.0
"""How long it may take to remove what a program left behind."""

_running: RunVar[anyio.CapacityLimiter] = RunVar("asyncrl_sandbox_slots")


class SandboxError(UserError):
    """This system cannot build the walls that were asked for."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a program. `str(outcome)` is what a model should read."""

    stdout: str
    """Its beginning, where it is longer than `max_output_bytes`; it says so then."""
    stderr: str
    """Its end, since an error's name comes last."""
    exit_code: int
    """0 is success; below 0: the signal that ended it."""
    timed_out: bool = False

    @property
    def ok(self) -> bool:
        """It ended by itself and in time, and complained of nothing."""
        return self.exit_code == 0 and not self.timed_out

    def __str__(self) -> str:
        how = ""
        if self.timed_out:
            how = "[ended: it took too long]"
        elif self.exit_code < 0:
            how = f"[ended by {_signal_name(-self.exit_code)}]"
        elif self.exit_code > 0:
            how = f"[exit code {self.exit_code}]"
        return "\n".join(part for part in (self.stdout.rstrip(), self.stderr.rstrip(), how) if part) or "[no output]"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # one of the real-time signals, which a program can send itself
        return f"signal {number}"


async def run_python(
    code: str,
    stdin: str = "",
    *,
    timeout_s: float = 5.0,
    memory_mb: int = 512,
    max_output_bytes: int = 1 << 16,
    strict: bool = True,
) -> Outcome:
    """Run `code` by this Python, with the packages that are installed for it, in a process of its own.

    As many run at once as there are cores; the wait for a slot does not count against `timeout_s`. Cancelling the call
    ends the program.

    Args:
        code: A whole program.
        stdin: What it reads.
        timeout_s: Longest run, the start of Python (some 30 ms) included.
        memory_mb: Address space, at least 64. Enforced on Linux only.
        max_output_bytes: Of each stream, so much is kept.
        strict: Refuse where the walls cannot be built (another system than Linux, a kernel before 5.13, a container
            that forbids it). False: go without those that are missing; time and output are limited in any case.

    Raises:
        SandboxError: `strict`, and this system lacks a wall.
        UserError: a limit that cannot be kept.
    """
    if os.name != "posix":
        raise SandboxError(
            f"run_python needs a POSIX system, best Linux; this is {sys.platform}. Run there, or in WSL."
        )
    if timeout_s <= 0 or memory_mb < LEAST_MEMORY_MB or max_output_bytes < 1:
        raise UserError(
            f"run_python: timeout_s={timeout_s:g}, memory_mb={memory_mb}, max_output_bytes={max_output_bytes}. "
            f"Expected a time above 0, at least {LEAST_MEMORY_MB} MB (Python itself needs them), and room for output."
        )
    async with _slots():
        room = _Room(Path(tempfile.mkdtemp(prefix="asyncrl-sandbox-")))
        try:
            room.furnish(code, stdin)
            exit_code = await room.run(_plan(room, timeout_s, memory_mb, strict), timeout_s)
            return room.outcome(exit_code, max_output_bytes)
        finally:
            with anyio.move_on_after(REMOVE_S, shield=True):  # `rm`: a program can nest folders deeper than shutil goes
                await anyio.run_process(["rm", "-rf", "--", str(room.folder)], check=False)


@dataclass(frozen=True, slots=True)
class _Room:
    """The folder of one run. The program may write to `work` alone; its streams are files beside it.

    Files, because they bound what a program can print (RLIMIT_FSIZE), and nobody has to read while it runs.
    """

    folder: Path

    @property
    def work(self) -> Path:
        return self.folder / "work"

    @property
    def refused(self) -> Path:
        return self.folder / "refused"

    def furnish(self, code: str, stdin: str) -> None:
        self.work.mkdir()
        (self.work / "main.py").write_bytes(code.encode(errors="replace"))  # JSON can hold half a surrogate pair
        (self.folder / "stdin").write_bytes(stdin.encode(errors="replace"))

    async def run(self, plan: Plan, timeout_s: float) -> int | None:
        """The exit code; None if it took too long."""
        command = [sys.executable, "-I", "-S", WALLS, json.dumps(plan)]
        with (
            (self.folder / "stdin").open("rb") as stdin,
            (self.folder / "stdout").open("wb") as stdout,
            (self.folder / "stderr").open("wb") as stderr,
        ):
            process = await self._start(command, stdin, stdout, stderr)
        async with process:
            try:
                with anyio.move_on_after(timeout_s):
                    return await process.wait()
            finally:
                with suppress(ProcessLookupError, PermissionError):  # all gone; so says macOS of a zombie
                    os.killpg(process.pid, signal.SIGKILL)
        return None

    async def _start(self, command: list[str], stdin: IO[bytes], stdout: IO[bytes], stderr: IO[bytes]) -> Process:
        return await anyio.open_process(
            command,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            cwd=self.work,
            env={"HOME": str(self.work), "TMPDIR": str(self.work), "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )

    def outcome(self, exit_code: int | None, max_bytes: int) -> Outcome:
        """Raises SandboxError."""
        if self.refused.exists():
            raise SandboxError(
                f"run_python: {self.refused.read_text(encoding='utf-8')}. Run on Linux 5.13 or later (in a container: "
                "one that allows Landlock and seccomp), or give strict=False to go without what is missing."
            )
        late = exit_code is None or exit_code == -signal.SIGXCPU
        return Outcome(
            stdout=_head(self.folder / "stdout", max_bytes),
            stderr=_tail(self.folder / "stderr", max_bytes).replace(f"{self.work}/", ""),  # main.py says it all
            exit_code=-signal.SIGKILL if exit_code is None else exit_code,
            timed_out=late,
        )


def _plan(room: _Room, timeout_s: float, memory_mb: int, strict: bool) -> Plan:
    return {
        "memory_bytes": memory_mb << 20,
        "cpu_s": math.ceil(timeout_s) + 1,  # many threads can use more than the clock shows
        "file_bytes": FILE_BYTES,
        "readable": sorted({sys.prefix, sys.base_prefix, sys.exec_prefix, sys.base_exec_prefix}),
        "strict": strict,
        "refused": str(room.refused),
        "owner": os.getpid(),
        "alarm_s": timeout_s + ALARM_S,
    }


def _head(file: Path, max_bytes: int) -> str:
    with file.open("rb") as stream:
        text = stream.read(max_bytes).decode(errors="replace")
    size = file.stat().st_size
    return text if size <= max_bytes else f"{text}\n[cut: {max_bytes} of {size} bytes]"


def _tail(file: Path, max_bytes: int) -> str:
    size = file.stat().st_size
    with file.open("rb") as stream:
        stream.seek(max(0, size - max_bytes))
        text = stream.read(max_bytes).decode(errors="replace")
    return text if size <= max_bytes else f"[cut: the last {max_bytes} of {size} bytes]\n{text}"


def _slots() -> anyio.CapacityLimiter:
    """One for each event loop: a limiter belongs to the loop it was first used in."""
    try:
        return _running.get()
    except LookupError:
        limiter = anyio.CapacityLimiter(SLOTS)
        _running.set(limiter)
        return limiter
