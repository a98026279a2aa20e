"""Runs a program that is spoken to over its pipes, so that it never outlives its owner. Run as a script; stdlib only.

    python -I -S tether.py OWNER COMMAND ARGUMENT...

The program has the pipes of this process, and its exit code becomes that of this one. Both are in one process group,
with whatever the program starts; when the process OWNER is gone, killed or not, the group is ended. A program that
reads to the end of its stdin ends by itself; one that hangs, or has left its work to children, would not.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from typing import NoReturn

LOOK_EVERY_S = 0.5


def main(owner: int, command: list[str]) -> NoReturn:
    try:
        program = os.posix_spawnp(command[0], command, os.environ)
    except OSError as error:
        sys.exit(f"{command[0]} cannot be run: {error.strerror}")
    threading.Thread(target=_end_with, args=(owner,), daemon=True).start()
    code = os.waitstatus_to_exitcode(os.waitpid(program, 0)[1])
    sys.exit(code if code >= 0 else 128 - code)


def _end_with(owner: int) -> None:
    # Not PR_SET_PDEATHSIG: it comes when the *thread* that started this process ends, and reaches no group.
    while os.getppid() == owner:
        time.sleep(LOOK_EVERY_S)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
