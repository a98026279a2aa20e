"""`asyncrl tune RUN|CONFIG.toml`: simulates a grid of settings, prints the frontier, and recommends one of them."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from rich.console import Console

from asyncrl.cli.config import load_config
from asyncrl.config import Config
from asyncrl.errors import ConfigError
from asyncrl.planning.advice import GIVE, WORST, Advice, frontier, recommend
from asyncrl.planning.described import Description, changed, described
from asyncrl.planning.grid import Axes, Search, search
from asyncrl.planning.plan import Plan
from asyncrl.planning.runner import Question, running
from asyncrl.planning.setting import POLICIES, Point, Policy
from asyncrl.planning.told import print_plan
from asyncrl.storage.folder import RunFolder


@dataclass(frozen=True, slots=True)
class Choice:
    """What the user asks for."""

    axes: Axes
    give: float
    worst: float
    steps: int | None
    jobs: int


def tune(arguments: argparse.Namespace) -> int:
    """Print the plan and write its page; returns the exit code.

    Raises:
        ConfigError: an option, the config or the description cannot be used.
        DataError: the run has nothing to learn from, or cannot be read.
    """
    choice = _choice(arguments)
    names = [field.name for field in fields(Description)]
    description = Description(**{name: getattr(arguments, name) for name in names})
    run = Path(arguments.target).is_dir()
    make = _of_run if run else _of_config
    base, plan = make(arguments, description, choice)
    question = Question(base, plan.modelled.machine, plan.modelled.workload, arguments.seed, choice.steps)
    with _progress() as progress, running(question, choice.jobs, progress) as oracle:
        plan.search = search(base, choice.axes, oracle, give=choice.give, worst=choice.worst)
    plan.advice = recommend(plan.search.points, give=choice.give, worst=choice.worst)
    if arguments.json:
        print(json.dumps(plan.as_json(), indent=1, allow_nan=False))
    else:
        print_plan(plan, Console(highlight=False, emoji=False, markup=False))
    if arguments.out or not arguments.json:
        default = Path(arguments.target) / "tune.html" if run else Path("tune.html")
        _write(plan, Path(arguments.out or default), quiet=arguments.json)
    return 0
