"""Runs a server so that nothing of it outlives its owner, however the owner ends. Run as a script; stdlib only.

    python guard.py GRACE_S SCRATCH COMMAND ARGUMENT...

The guard leads a process group in which the command and all its children live. Its stdin is a pipe that the owner
holds: when the pipe closes (the owner closed it, ended, or was killed), or when the command ends, the whole group
ends: SIGTERM to the command, which ends its own children in order; `GRACE_S` seconds; SIGKILL to all. Its stdout
says how the command ended: an exit code, or minus a signal. The folder SCRATCH, where the command keeps its temporary
files, is removed; "" is none.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time


def main(grace_s: float, scratch: str, command: list[str]) -> None:
    # A handler and not SIG_IGN: the command must not inherit deafness.
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.signal(signal.SIGINT, lambda *_: None)
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sys.stderr, stderr=sys.stderr)
    threading.Thread(target=_end_with_owner, args=(child, grace_s, scratch), daemon=True).start()
    code = child.wait()
    try:
        print(code, flush=True)
    finally:  # nobody listens where the owner was killed
        _end_all(scratch)


def _end_with_owner(child: subprocess.Popen[bytes], grace_s: float, scratch: str) -> None:
    # A raw read: a daemon thread in a buffered one would hold the lock of sys.stdin when the guard ends.
    while os.read(0, 4096):
        pass
    child.terminate()
    time.sleep(grace_s)
    _end_all(scratch)


def _end_all(scratch: str) -> None:
    """The server's workers, where it could not end them itself, and the guard."""
    shutil.rmtree(scratch, ignore_errors=True)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main(float(sys.argv[1]), sys.argv[2], sys.argv[3:])
