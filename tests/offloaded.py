"""What tests send to worker processes: those import it by name."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NoReturn


def where(add: int = 0, *, factor: int = 1) -> tuple[int, int]:
    return os.getpid(), (1 + add) * factor


def fail() -> NoReturn:
    raise LookupError("no such answer")


class Picky(Exception):
    def __init__(self, first: int, second: int) -> None:
        super().__init__(f"{first} and {second}")


def fail_pickily() -> NoReturn:
    raise Picky(1, 2)


def returns_a_lambda() -> object:
    return lambda: 1


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def sleep_for_ever(pid_file: str) -> None:
    Path(pid_file).write_text(str(os.getpid()), encoding="utf-8")
    time.sleep(600)


def talk() -> str:
    """Everything that could spoil the pipes."""
    os.write(1, b"RETURN 3\n")
    subprocess.run([sys.executable, "-c", "print(input('?') if False else 'hello')"], check=True, timeout=60)
    return "done" + sys.stdin.read()
