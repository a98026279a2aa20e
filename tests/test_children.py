"""No process outlives the one that started it, even where that one is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIMIT_S = 60.0
HANGS = """
import signal, subprocess, sys, time
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
if "child" not in sys.argv:
    subprocess.Popen([sys.executable, __file__, f"{sys.argv[1]}-s", "child"])
time.sleep(600)
"""
"""A program that is deaf to everything, and has started another one."""

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks processes up in /proc")


def until(reached: Callable[[], bool], said: Callable[[], object]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not reached():
        assert time.monotonic() < deadline, said()
        time.sleep(0.05)


def processes() -> dict[int, tuple[int, str, str]]:
    """Those that live: pid -> parent, when it was started, its command."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            stat = (folder / "stat").read_text().rpartition(")")[2].split()
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:  # it has just ended
            continue
        if stat[0] != "Z":
            found[int(folder.name)] = (int(stat[1]), stat[19], command)
    return found


def descendants(root: int) -> dict[tuple[int, str], str]:
    """(pid, when it was started), since a pid may be given again -> command."""
    everybody = processes()
    family = {root}
    while more := {pid for pid, (parent, _, _) in everybody.items() if parent in family} - family:
        family |= more
    return {(pid, everybody[pid][1]): everybody[pid][2] for pid in family - {root}}


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_children_of_every_kind_end_with_a_process_that_is_killed(number: signal.Signals, tmp_path: Path) -> None:
    (tmp_path / "hangs.py").write_text(HANGS)
    run = subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "children_of_a_run.py"), str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    family: dict[tuple[int, str], str] = {}

    def all_there() -> bool:
        nonlocal family
        family = descendants(run.pid)
        told = " ; ".join(family.values())
        return all(part in told for part in ("of-a-worker-s child", "server-s child", "mcp-s child", "utf8 main.py"))

    def left() -> dict[tuple[int, str], str]:
        everybody = {(pid, began) for pid, (_, began, _) in processes().items()}
        return {key: command for key, command in family.items() if key in everybody}

    try:
        until(all_there, lambda: family)
        assert run.poll() is None
        run.send_signal(number)
        run.wait(LIMIT_S)
        until(lambda: not left(), left)
    finally:
        run.kill()
        run.wait(LIMIT_S)
        for pid, _ in left():
            os.kill(pid, signal.SIGKILL)
