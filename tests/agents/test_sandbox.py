"""Hostile programs in the sandbox: each harms itself alone."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import anyio
import pytest

from asyncrl.agents.sandbox import Outcome, SandboxError, run_python
from asyncrl.agents.sandbox_walls import FORBIDDEN
from asyncrl.errors import UserError

pytestmark = pytest.mark.usefixtures("walls")


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """After each test: no folder of a run, and no process that lives in one."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    yield
    assert list(temporary.iterdir()) == []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended just now, or is none of ours
            assert str(temporary) not in os.readlink(process / "cwd")


async def test_a_program_reads_prints_and_ends() -> None:
    outcome = await run_python("print(sum(map(int, input().split())), 'ü')", "1 2 3")
    assert outcome == Outcome(stdout="6 ü\n", stderr="", exit_code=0)
    assert outcome.ok
    assert str(outcome) == "6 ü"


async def test_a_program_may_use_its_folder_threads_and_what_is_installed() -> None:
    outcome = await run_python(
        "import asyncio, json, os, shutil, threading, pydantic\n"
        "open('a', 'w').write('x'); shutil.copy('a', 'b'); os.mkdir('c')\n"
        "thread = threading.Thread(target=print, args=(sorted(os.listdir()),)); thread.start(); thread.join()\n"
        "asyncio.run(asyncio.sleep(0))"
    )
    assert str(outcome) == "['a', 'b', 'c', 'main.py']"


async def test_what_fails_says_so_in_short() -> None:
    outcome = await run_python("def f():\n    1 / 0\nf()")
    assert (outcome.ok, outcome.exit_code) == (False, 1)
    assert outcome.stderr.startswith('Traceback (most recent call last):\n  File "main.py", line 3')
    assert str(outcome).endswith("ZeroDivisionError: division by zero\n[exit code 1]")
    assert str(await run_python("import os; os.abort()")) == "[ended by SIGABRT]"
    assert str(Outcome("", "", exit_code=-40)) == "[ended by signal 40]"  # a program can send itself one without a name
    assert str(await run_python("pass")) == "[no output]"
    assert "EOFError" in (await run_python("input()")).stderr
    assert "null bytes" in (await run_python("print(1)\0")).stderr


@pytest.mark.parametrize("never", ["while True: pass", "import time; time.sleep(1000)"])
async def test_a_program_that_never_ends_is_ended_and_what_it_said_is_kept(never: str) -> None:
    with anyio.fail_after(60):
        outcome = await run_python(f"print('begun')\n{never}", timeout_s=0.5)
    assert outcome.timed_out
    assert not outcome.ok
    assert str(outcome) == "begun\n[ended: it took too long]"


async def test_ten_gigabytes_are_not_to_be_had() -> None:
    assert str(await run_python("x = bytearray(10 << 30)")).endswith("MemoryError\n[exit code 1]")


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
async def test_a_hundred_megabytes_of_output_are_cut(stream: str) -> None:
    code = f"import sys\nfor i in range(100): sys.{stream}.write('x' * (1 << 20))"
    outcome = await run_python(code, max_output_bytes=1000)
    said = getattr(outcome, stream)
    assert len(said) < 1100
    assert "of 16777216 bytes]" in said
    assert outcome.exit_code == 1


async def test_disk_is_limited_too_and_deep_folders_are_removed() -> None:
    outcome = await run_python("open('big', 'wb').write(bytes(1 << 25))")
    assert "File too large" in outcome.stderr
    outcome = await run_python("import os\nfor _ in range(1500): os.mkdir('d'); os.chdir('d')\nprint('deep')")
    assert outcome.stdout == "deep\n"


@pytest.mark.parametrize(
    "code",
    [
        "import os\nwhile True: os.fork()",
        "import subprocess; subprocess.run(['true'])",
        "import socket; socket.create_connection(('127.0.0.1', 22))",
        "import socket; socket.socket(socket.AF_UNIX)",
        "import os; os.kill(os.getppid(), 9)",
        "import os; os.kill(-1, 9)",
        "import os, resource; resource.prlimit(os.getppid(), resource.RLIMIT_CPU, (1, 1))",
        "import os; open(f'/proc/{os.getppid()}/environ').read()",
        "import os; open('/etc/passwd').read()",
        "import os; os.listdir('/')",
        "open('../escaped', 'w')",
        "import os; os.rename('main.py', '../main.py')",
        "import os; os.truncate('main.py', 0)",
        "import os; os.symlink('/etc', 'etc'); os.listdir('etc')",
        "import os; os.setuid(12345); os.chroot('.')",
    ],
)
async def test_what_is_outside_cannot_be_reached(code: str) -> None:
    outcome = await run_python(code)
    assert "PermissionError" in outcome.stderr
    assert outcome.exit_code == 1


async def test_ways_around_the_usual_calls_are_shut_too() -> None:
    call = "import ctypes; libc = ctypes.CDLL(None, use_errno=True); print(libc.syscall({}, 0, 0), ctypes.get_errno())"
    assert str(await run_python(call.format(435))) == f"-1 {errno.ENOSYS}"  # clone3, whose flags cannot be read
    assert str(await run_python(call.format(425))) == f"-1 {errno.EPERM}"  # io_uring_setup


async def test_the_environment_is_empty_and_root_has_no_rights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_KEY", "secret")
    outcome = await run_python("import os; print(dict(os.environ)); print(open('/proc/self/status').read())")
    assert outcome.ok
    assert "secret" not in outcome.stdout
    assert "CapEff:\t0000000000000000" in outcome.stdout


async def test_a_file_outside_keeps_its_mode(tmp_path: Path) -> None:
    file = tmp_path / "mine"
    file.touch(mode=0o644)
    assert (await run_python(f"import os; os.chmod({str(file)!r}, 0)")).ok  # it says so, and does nothing
    assert file.stat().st_mode & 0o777 == 0o644


async def test_cancelling_ends_the_program() -> None:
    with anyio.move_on_after(0.5) as scope:
        await run_python("import time; time.sleep(1000)", timeout_s=1000)
    assert scope.cancelled_caught


async def test_more_programs_than_cores_wait_for_each_other() -> None:
    outcomes: list[Outcome] = []

    async def run(number: int) -> None:
        outcomes.append(await run_python(f"print({number})"))

    async with anyio.create_task_group() as group:
        for number in range(3 * (os.cpu_count() or 2)):
            group.start_soon(run, number)
    assert sorted(int(outcome.stdout) for outcome in outcomes) == list(range(len(outcomes)))


async def test_limits_that_cannot_be_kept_are_refused() -> None:
    for limits in ({"timeout_s": 0}, {"memory_mb": 8}, {"max_output_bytes": 0}):
        with pytest.raises(UserError, match="Expected a time above 0, at least 64 MB"):
            await run_python("pass", **limits)  # type: ignore[arg-type]


WITHOUT_LANDLOCK = """
import anyio, ctypes, os
from asyncrl.agents.sandbox import run_python
from asyncrl.agents.sandbox_walls import install_filter, refuse
ctypes.CDLL(None).prctl(38, 1, 0, 0, 0)
install_filter(refuse({444: 95}), os.uname().machine)
print(anyio.run(lambda: run_python(%r, strict=%r)))
"""


@pytest.mark.parametrize("strict", [True, False])
def test_where_a_wall_is_missing_a_strict_run_is_refused_and_another_has_the_rest(strict: bool) -> None:
    program = "open('../seen', 'w'); import socket; socket.socket()"
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_LANDLOCK % (program, strict)],
        env={**os.environ, "TMPDIR": tempfile.gettempdir()},
        capture_output=True,
        text=True,
        timeout=60,
    )
    if strict:
        assert done.returncode == 1
        assert f"{SandboxError.__name__}: run_python: this kernel has no Landlock" in done.stderr
        assert "strict=False" in done.stderr
    else:
        assert "PermissionError: [Errno 1] Operation not permitted" in done.stdout  # the socket, not the file


@pytest.mark.skipif(
    not Path("/usr/include/asm-generic/unistd.h").is_file() or shutil.which("cc") is None, reason="no kernel headers"
)
def test_the_numbers_of_the_system_calls_are_those_of_the_headers() -> None:
    names = {
        "network": ("socket", "io_uring_setup"),
        "processes": ("fork", "vfork"),
        "memory that outlives them": ("shmget", "msgget", "semget", "memfd_create"),
        "files by name": ("truncate",),
        "other processes": (
            *("kill", "tkill", "rt_sigqueueinfo", "rt_tgsigqueueinfo", "pidfd_send_signal", "ptrace", "setpriority"),
            *("sched_setaffinity", "sched_setscheduler", "sched_setparam", "sched_setattr", "ioprio_set"),
        ),
    }
    for column, include in enumerate(("-D__x86_64__ -include asm/unistd.h", "-include asm-generic/unistd.h")):
        if column == 0 and os.uname().machine != "x86_64":
            continue
        for group, calls in names.items():
            source = "\n".join(f"{call} __NR_{call}" for call in calls)
            done = subprocess.run(
                ["cc", "-E", "-P", *include.split(), "-"], input=source, capture_output=True, text=True, timeout=60
            )
            found = dict(line.split() for line in done.stdout.splitlines() if line.strip())
            for call, numbers in zip(calls, FORBIDDEN[group], strict=True):
                assert found[call] == str(numbers[column]) or numbers[column] is None, call
