"""Signals and lost terminals without a run around them."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from asyncrl.exits import CUT_SHORT, NO_READER

ROOT = Path(__file__).parents[1]
LIMIT_S = 60.0
IMPORTS = (
    "import os, signal, sys\nfrom asyncrl.interrupt import Interrupt, stop_on_signals\n"
    "from asyncrl.streams import streams_that_last\nstop = Interrupt()\n"
)


def script(code: str, *options: str, **how: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # type: ignore[call-overload,no-any-return]
        [sys.executable, *options, "-c", IMPORTS + code], cwd=ROOT, text=True, timeout=LIMIT_S, **how
    )


def test_one_wish_that_is_said_twice_is_one() -> None:
    """GNU timeout tells the process and its group; of a lost terminal both the shell and the system tell."""
    done = script(
        "with stop_on_signals(stop):\n"
        "    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGHUP, signal.SIGHUP):\n"
        "        signal.raise_signal(number)\n"
        "    print(stop.requested, flush=True)\n"
        "    signal.raise_signal(signal.SIGINT)\n    print('not reached')\n",
        capture_output=True,
    )
    assert (done.returncode, done.stdout) == (CUT_SHORT, "True\n")
    assert done.stderr.count("stopping after this step") == 1
    assert f"stopping at once, with exit code {CUT_SHORT}" in done.stderr


def test_under_nohup_a_lost_terminal_is_none() -> None:
    done = script(
        "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "with stop_on_signals(stop):\n    signal.raise_signal(signal.SIGHUP)\n"
        "print(stop.requested, signal.getsignal(signal.SIGHUP) is signal.SIG_IGN)",
        capture_output=True,
    )
    assert (done.returncode, done.stdout) == (0, "False True\n")


def test_after_the_block_signals_are_what_they_were() -> None:
    done = script(
        "before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]\n"
        "with stop_on_signals(stop): pass\n"
        "print(before == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)])",
        capture_output=True,
    )
    assert done.stdout == "True\n"


@pytest.mark.parametrize("options", [(), ("-u",)])
def test_a_pipe_without_a_reader_takes_everything(options: tuple[str, ...], tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    code = (
        "before = sys.stdout\n"
        "with streams_that_last():\n"
        "    for _ in range(3): print('x' * 99999, flush=True)\n"
        "    print('no newline', end='')\n"
        "    print('heard', file=sys.stderr)\n"
        "print('and after it, too', flush=True)\n"
        "assert sys.stdout is before\n"
    )
    done = script(code, *options, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "heard\n")


def test_a_terminal_that_is_gone_takes_everything() -> None:
    """And a live view goes on drawing."""
    ours, terminal = pty.openpty()
    code = (
        "from asyncrl.metrics.live import LiveView\n"
        "os.read(0, 1)\n"
        "with streams_that_last(), LiveView('run', 10, mode='live') as live:\n"
        "    live.note('one')\n    live.step({'step': 1})\n"
        "    print('two', flush=True)\n    print('three', file=sys.stderr)\n"
        "os._exit(7)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", IMPORTS + code], cwd=ROOT, stdin=subprocess.PIPE, stdout=terminal, stderr=terminal
    )
    os.close(terminal)
    os.close(ours)
    process.communicate(b"x", timeout=LIMIT_S)
    assert process.returncode == 7


def test_a_disk_that_is_full_takes_everything() -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("needs /dev/full")
    with full.open("w") as nowhere:
        done = script("with streams_that_last(): print('x', flush=True)", stdout=nowhere, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_command_that_only_prints_ends_quietly_without_a_reader() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "asyncrl", "version"],
        cwd=ROOT,
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        timeout=LIMIT_S,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (NO_READER, "")


def test_the_command_does_not_wait_for_threads_that_never_end() -> None:
    code = (
        "import threading\nfrom asyncrl.cli import main\nmain.LEAVE_S = 0.1\nsys.argv = ['asyncrl', 'version']\n"
        "threading.Thread(target=threading.Event().wait, name='of the rollout function').start()\nmain.run()\n"
    )
    done = script(code, capture_output=True)
    assert done.returncode == 0
    assert "does not wait for its threads any longer: of the rollout function" in done.stderr


def test_a_ctrl_c_while_the_command_waits_for_threads_ends_it_at_once() -> None:
    code = (
        "import os, signal, sys, threading, time\nfrom asyncrl.cli import main\nsys.argv = ['asyncrl', 'version']\n"
        "def press():\n"
        "    while signal.getsignal(signal.SIGINT) is signal.default_int_handler:\n        time.sleep(0.001)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n    threading.Event().wait()\n"
        "threading.Thread(target=press).start()\nmain.run()\n"
    )
    done = script(code, capture_output=True)
    assert (done.returncode, done.stderr) == (0, "")
