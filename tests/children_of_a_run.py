"""A process that has children of every kind that a run has, all of which hang. Run by test_children.py.

python children_of_a_run.py FOLDER      ends never; FOLDER/hangs.py is what the children run
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import asyncrl
from asyncrl.agents.mcp import tethered
from asyncrl.sampling.server import GUARD


def work(hangs: str) -> None:
    """In a worker process: heavy code that has started a program."""
    subprocess.run([sys.executable, hangs, "of-a-worker"], check=False)


async def main(folder: Path) -> None:
    hangs = str(folder / "hangs.py")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "start_new_session": True}
    guarded = (sys.executable, "-I", "-S", str(GUARD), "0.5", "", sys.executable, hangs, "server")
    tied = tethered((sys.executable, hangs, "mcp"), None)
    for command in (guarded, tied):
        await asyncio.create_subprocess_exec(*command, **pipes)  # type: ignore[arg-type]
    await asyncio.gather(
        asyncrl.offload(work, hangs, process=True, timeout_s=600),
        asyncrl.run_python("import time; time.sleep(600)", timeout_s=600, strict=False),
    )


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
