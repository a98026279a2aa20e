"""kill -9 at random instants: runs are killed and resumed until they end, and then looked at for anything that shows.

    python benchmarks/kill.py --kills 100                    synchronous and deterministic: weights bit by bit
    python benchmarks/kill.py --kills 100 --asynchronous     staleness 2: the accounts
    python benchmarks/kill.py --kills 20 --sampler vllm      the accounts, and no server is left

tests/durability/harness.py says what must not show. The instants follow from --seed; what they hit depends on the
machine.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.durability.agent import make_model
from tests.durability.harness import ASYNCHRONOUS, VLLM, Nursery, Span, Trial, settings_of

MOST_KILLS_OF_A_RUN = 4


class Campaign:
    """Runs trials until enough processes have been killed. Owns the count."""

    def __init__(self, folder: Path, settings: dict[str, Any], kills: int, seed: int, console: Console) -> None:
        self._folder, self._settings, self._seed, self._console = folder, settings, seed, console
        self._left = kills
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self.trials: list[Trial] = []

    def work(self, number: int) -> None:
        """One worker: a nursery, an undisturbed run to compare with, and trials as long as kills are left."""
        with Nursery() as nursery:
            reference = Trial(self._folder / f"reference-{number}", self._settings)
            life = reference.live(nursery)
            reference.examine(None)
            self._report(f"undisturbed {number}", reference)
            if reference.faults:
                return
            span = Span(life.seconds, life.touches)
            same = reference if self._settings["deterministic"] else None
            for trial_number in self._trials():
                trial = Trial(self._folder / f"run-{trial_number:03d}", self._settings)
                trial.live_on(nursery, random.Random(f"{self._seed}/{trial_number}"), span, MOST_KILLS_OF_A_RUN)
                trial.examine(same)
                self._report(f"run {trial_number}", trial)

    def _trials(self) -> Iterator[int]:
        while self._left > 0:
            yield next(self._numbers)

    def _report(self, name: str, trial: Trial) -> None:
        with self._lock:
            self._left -= len(trial.kills)
            self.trials.append(trial)
        verdict = "[green]nothing shows[/]" if not trial.faults else "[red]" + "; ".join(trial.faults) + "[/]"
        how = ", ".join(map(str, trial.kills)) or "never killed"
        self._console.print(f"{name} ({trial.seconds:.0f} s): {how}: {verdict}", highlight=False, soft_wrap=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="runs at once")
    parser.add_argument("--sampler", choices=("transformers", "vllm"), default="transformers")
    parser.add_argument("--asynchronous", action="store_true")
    parser.add_argument("--folder", type=Path, help="where the runs stay; a temporary folder if left out")
    arguments = parser.parse_args()
    changed = VLLM if arguments.sampler == "vllm" else ASYNCHRONOUS if arguments.asynchronous else {}
    console = Console()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        settings = settings_of(make_model(folder / "model"), **changed)
        campaign = Campaign(folder, settings, arguments.kills, arguments.seed, console)
        began = time.monotonic()
        with ThreadPoolExecutor(arguments.jobs) as pool:
            list(pool.map(campaign.work, range(arguments.jobs)))
    console.print(summary(campaign.trials, time.monotonic() - began))
    sys.exit(any(trial.faults for trial in campaign.trials))


def summary(trials: list[Trial], seconds: float) -> Table:
    """What the kills hit, and how many of these runs show nothing."""
    total, clean = Counter[str](), Counter[str]()
    for trial in trials:
        hits = Counter(kill.hit for kill in trial.kills)
        total += hits
        if not trial.faults:
            clean += hits
    bad = sum(bool(trial.faults) for trial in trials)
    table = Table(title=f"{total.total()} kills of {len(trials)} runs in {seconds:.0f} s; {bad} runs show something")
    for name in ("killed while", "kills", "nothing shows"):
        table.add_column(name, justify="left" if name == "killed while" else "right")
    for hit, count in total.most_common():
        table.add_row(hit, str(count), str(clean[hit]))
    return table


if __name__ == "__main__":
    main()
