"""Makes every await of the sampler's clients and of a whole run never return, one after the other. In real time.

    python tests/durability/hang_hunt_clients.py [--only sampler|run] [--part N [--seed S]]

Each hang has a process of its own, forked from this one, which has imported everything with its fault points; so have
the stubs of vLLM servers. `hang_hunt.py` is the same for the engine, in virtual time.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import re
import select
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from client_verdicts import verdict
from fault_points import POINTS, REACHED, Point, arm, has_hung, instrument

ROOT = Path(__file__).parents[2]
FIRST = ("aiohttp.web", "anyio._backends._asyncio", "peft", "torch", "transformers.models.llama.modeling_llama")
"""What takes long to import, and has no fault points."""
MODULES = {
    "sampler": tuple(
        f"asyncrl.sampling.{name}"
        for name in ("connect", "endpoint", "fleet", "live", "replica", "scoring", "server", "supervisor", "vllm")
    ),
    "run": (
        "asyncrl.agents.endpoint.server",
        "asyncrl.checkpointing",
        "asyncrl.ends",
        "asyncrl.rollout.factory",
        "asyncrl.run",
        "asyncrl.sampling.transformers",
        "asyncrl.storage.ledger",
        "asyncrl.storage.ledger_file",
        "asyncrl.storage.samples",
        "asyncrl.training.thread",
        "asyncrl.training_run",
    ),
}
KINDS = {"vllm": "sampler", "embedded": "run"}
"""Of a run, by how its name begins."""
AT_ONCE = 10
"""They mostly wait."""
LIMIT_S = 60.0
"""A process that has not ended by then hangs."""
LEFT_LIMIT_S = 5.0
MARK = "ASYNCRL_TEST_HUNT"
"""An environment variable: what a run starts inherits it."""


@dataclass(frozen=True, slots=True)
class Case:
    run: str
    point: Point | None
    """None: nothing hangs."""
    at_call: int = 1


@dataclass(slots=True)
class Outcome:
    """What came of one hang."""

    run: str
    point: str
    function: str
    line: int
    at_call: int
    code: int
    """Of the process; None: it hung."""
    seconds: float
    error: str = ""
    """Of the run; empty: it finished."""
    report: str = ""
    stderr: str = ""
    whole: bool = False
    """Every step was trained and saved."""
    reached: bool = True
    """It did hang. Not known of a process that was ended: then it had."""
    left: tuple[str, ...] = ()
    """Processes that were left behind."""


@dataclass(slots=True)
class _Running:
    """A process in which something hangs."""

    case: Case
    pid: int
    folder: Path
    began: float = field(default_factory=time.monotonic)
    process: int = field(init=False)
    """A file that can be read when it has ended."""
    seconds: float | None = None
    """Until its end."""
    left: list[str] = field(default_factory=list)
    hung: bool = False
    code: int = 0

    def __post_init__(self) -> None:
        self.process = os.pidfd_open(self.pid)

    def is_over(self) -> bool:
        """It has ended, and so has what it started, or should have."""
        from tests.durability.client_runs import left_behind

        seconds = time.monotonic() - self.began
        if self.seconds is None:
            self.hung = seconds > LIMIT_S
            if self.hung:
                os.killpg(self.pid, signal.SIGKILL)
            if not select.select([self.process], [], [], 0)[0] and not self.hung:
                return False
            self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
            os.close(self.process)
            self.seconds = seconds
        self.left = left_behind(str(self.folder))
        return not self.left or seconds > self.seconds + LEFT_LIMIT_S

    def told(self) -> tuple[Outcome, Counter[int]]:
        assert self.seconds is not None
        told = self.folder / "told.json"
        found = json.loads(told.read_text()) if told.exists() else {"error": "", "whole": False, "reached": {}}
        report = self.folder / "run" / "stalled.txt"
        point = self.case.point
        outcome = Outcome(
            run=self.case.run,
            point=str(point),
            function=point.function if point is not None else "",
            line=point.line if point is not None else 0,
            at_call=self.case.at_call,
            code=self.code,
            seconds=round(self.seconds, 1),
            error="hung" if self.hung else found["error"],
            report=report.read_text() if report.exists() else "",
            stderr=(self.folder / "log").read_text(),
            whole=found["whole"],
            reached=not told.exists() or found["hung"],
            left=tuple(self.left),
        )
        shutil.rmtree(self.folder)
        return outcome, Counter({int(number): count for number, count in found["reached"].items()})


class Hunt:
    """Owns the processes, and the folder in which they work."""

    def __init__(self, shared: Path) -> None:
        from tests.durability.client_runs import STAND_IN_SOCKET

        self._shared = shared
        self._stubs: set[int] = set()
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(str(shared / STAND_IN_SOCKET))
        self._listening.listen(64)
        self._number = 0

    def go(self, cases: Sequence[Case]) -> Iterator[tuple[Outcome, Counter[int]]]:
        """All of them, some at once, in the order in which they end; and how often each await was reached."""
        waiting = list(reversed(cases))
        running: list[_Running] = []
        while waiting or running:
            while waiting and len(running) < AT_ONCE:
                running.append(self._begin(waiting.pop()))
            going = [each.process for each in running if each.seconds is None]
            if self._listening in select.select([*going, self._listening], [], [], 0.2)[0]:
                self._fork_stub()
            self._stubs = {pid for pid in self._stubs if not os.waitpid(pid, os.WNOHANG)[0]}
            for each in list(running):
                if each.is_over():
                    running.remove(each)
                    yield each.told()

    def _begin(self, case: Case) -> _Running:
        self._number += 1
        folder = self._shared / f"case-{self._number}"
        folder.mkdir()
        pid = os.fork()
        if pid:
            return _Running(case, pid, folder)
        os.setsid()
        os.environ[MARK] = str(folder)
        _quietly(folder / "log")
        arm(case.point, case.at_call)
        live(case.run, self._shared, folder)
        raise SystemExit  # as a user's process ends, with all that its end waits for

    def prepare(self) -> None:
        from tests.durability.client_runs import prepare

        pid = os.fork()
        if not pid:
            _quietly(self._shared / "prepared.log")
            prepare(self._shared)
            raise SystemExit
        assert os.waitpid(pid, 0)[1] == 0, (self._shared / "prepared.log").read_text()

    def _fork_stub(self) -> None:
        """For a stand-in that asks: it ends with the stub, and the stub with it."""
        asked, _ = self._listening.accept()
        port, key = asked.makefile("r").readline().split()
        pid = os.fork()
        if pid:
            self._stubs.add(pid)
            asked.close()
            return
        import asyncio

        from tests.sampling.stub_vllm import StubVllm

        def end_with_stand_in() -> None:
            with suppress(OSError):
                asked.recv(1)
            os._exit(0)

        async def serve() -> None:
            await StubVllm(key).start(int(port))
            await asyncio.Event().wait()

        threading.Thread(target=end_with_stand_in, daemon=True).start()
        try:
            asyncio.run(serve())
        finally:
            os._exit(1)


def _quietly(log: Path) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)


def live(run: str, shared: Path, folder: Path) -> None:
    from asyncrl.errors import AsyncRLError
    from tests.durability.client_runs import RUNS

    error, whole = "", False
    try:
        whole = RUNS[run](shared, folder / "run")
    except AsyncRLError as found:
        error = f"{type(found).__name__}: {found}"
    except BaseException as found:  # a fault of ours: reported as it is
        traceback.print_exc()
        error = f"not one of ours: {found!r}"
    told = {"error": error, "whole": whole, "hung": has_hung(), "reached": dict(REACHED)}
    (folder / "told.json").write_text(json.dumps(told))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(MODULES), help="half of it")
    parser.add_argument("--part", type=int, metavar="N", help="N points alone, of as many modules as can be")
    parser.add_argument("--seed", type=int, default=0, help="of the part")
    parser.add_argument("--point", default="", help="those whose name contains this regular expression")
    parser.add_argument("--json", action="store_true", help="a line of JSON for each hang")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    os.environ["OMP_NUM_THREADS"] = "1"  # more threads than one could not be forked
    kinds = [options.only] if options.only else list(MODULES)
    for name in FIRST:
        importlib.import_module(name)
    points = instrument([name for kind in kinds for name in MODULES[kind]])
    from tests.durability.client_runs import RUNS, shorten_limits

    shorten_limits()
    rng = random.Random(options.seed)
    ends: Counter[str] = Counter()
    with shared_folder() as folder:
        hunt = Hunt(folder)
        hunt.prepare()
        wanted = [point for point in points if re.search(options.point, str(point))]
        if options.part:
            cases = [Case(rng.choice(runs_of(point, RUNS)), point) for point in spread(wanted, options.part, rng)]
        else:
            cases = list(
                cases_of(wanted, undisturbed(hunt, [run for run in RUNS if KINDS[run.partition("-")[0]] in kinds]))
            )
        for outcome, _ in hunt.go(cases):
            found = verdict(asdict(outcome))
            ends[found.partition(":")[0]] += 1
            where = f"{outcome.point} @{outcome.at_call}"
            print(
                json.dumps(asdict(outcome))
                if options.json
                else f"{outcome.run:19} {where:58} {outcome.seconds:5} s  {found}",
                flush=True,
            )
    if not options.json:
        print(f"{len(points)} points, {len({case.point for case in cases})} of them chosen; {dict(ends)}")


def runs_of(point: Point, runs: Iterable[str]) -> list[str]:
    """Those that may come to it."""
    return [run for run in runs if point.module in MODULES[KINDS[run.partition("-")[0]]]]


def undisturbed(hunt: Hunt, runs: Sequence[str]) -> dict[str, Counter[int]]:
    """How often each await is come to in a run in which none hangs, by the run."""
    reached: dict[str, Counter[int]] = {}
    for outcome, found in hunt.go([Case(run, None) for run in runs]):
        assert outcome.whole, f"{outcome.run} without any hang: {outcome.error}\n{outcome.stderr}"
        reached[outcome.run] = found
    return reached


def cases_of(points: Sequence[Point], reached: dict[str, Counter[int]]) -> Iterator[Case]:
    """The first time that an await is come to, in one of the runs, and one in the middle of another where it can."""
    for point in points:
        number = POINTS.index(point)
        runs = [run for run in runs_of(point, reached) if reached[run][number]]
        if runs:
            yield Case(runs[0], point)
            times = reached[runs[-1]][number]
            if times > 1 or len(runs) > 1:
                yield Case(runs[-1], point, times // 2 + 1)


def spread(points: Sequence[Point], count: int, rng: random.Random) -> list[Point]:
    """`count` of them, none of a module twice before each had its turn."""
    turns: Counter[str] = Counter()
    drawn = []
    for point in rng.sample(points, len(points)):
        turns[point.module] += 1
        drawn.append((turns[point.module], rng.random(), point))
    return [point for _, _, point in sorted(drawn, key=lambda item: item[:2])[:count]]


@contextmanager
def shared_folder() -> Iterator[Path]:
    """Gone when this process leaves the block, and not when one does that was forked in it."""
    owner, folder = os.getpid(), Path(tempfile.mkdtemp())
    try:
        yield folder
    finally:
        if os.getpid() == owner:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
