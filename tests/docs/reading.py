"""Reading a page as its reader would: everything that can be typed is typed, in order, in one folder.

What is real: the code, the commands, the settings, the engine, the trainer. What is not, so that a page takes
seconds (`shortened`): how many steps, rollouts and held-out rows, how long an answer, and the sampler, which is always
the embedded one.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import json
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from blocks import PROSE, ROOT, Block, blocks, commands_in_prose

STEPS, STEPS_NAMED, STEPS_RESUMED = 2, 6, 14
"""Of a run that names no `max_steps`, of one that does, and of one that goes on, those of its first life included."""
MAX_TOKENS = 8
HELD_OUT_ROWS = 2
SHELL = ("sh", "bash", "console")
QUICKER = {"tune": {"--steps": "10", "--jobs": "1", "--max-staleness": "2", "--policy": "wait", "--window": "32"}}
"""Options that a command gets so that it takes seconds; of a page's own values for them the first is taken."""
ONLY_PARSED = ("demo", "--live")
"""`asyncrl` commands and options that take minutes, or never end by themselves: the parser alone sees them."""


class Reader:
    """One page, one folder, one `__main__`."""

    def __init__(self, page: Path, folder: Path) -> None:
        self._text = page.read_text()
        self._name = str(page.relative_to(ROOT)) if page.is_relative_to(ROOT) else page.name
        self._module = ModuleType("__main__")
        self._module.__file__ = str(folder / "page.py")  # as long as the page, so that tracebacks name its lines
        self._script = [""] * len(self._text.splitlines())
        if self._name != "README.md":
            self._script[0] = "from rollout import *"  # every page is read after README
        self._trained: set[Any] = set()

    def read(self) -> list[str]:
        """What does not run, with the line of the page."""
        sys.modules["__main__"] = self._module
        sys.argv = [self._name]
        failures = [
            f"{self._name}:{line}: this is typed by readers: put it into a block of `sh`, `console` or `python`"
            for line in commands_in_prose(self._text)
        ]
        with shortened(STEPS, self._trained):
            self._type(self._script[0])
            for block in blocks(self._text):
                try:
                    self._run(block)
                except BaseException as error:  # whatever a block raises is what this looks for
                    traceback.print_exc()
                    failures.append(f"{self._name}:{block.line}: {type(error).__name__}: {error}")
        return failures

    def _run(self, block: Block) -> None:
        if block.not_run is not None:
            if len(block.not_run.split()) < 2:
                raise ValueError(f"`not run: {block.not_run}` gives no reason")
            return
        if block.file is not None:
            Path(block.file).write_text(block.text)
        if block.language in PROSE:
            return
        if block.language == "python":
            self._python(block)
        elif block.language in SHELL:
            for command in commands(block):
                type_command(command)
        elif block.language == "toml":
            load_settings(tomllib.loads(block.text))
        elif block.language in ("json", "jsonl"):
            for row in _json(block.text):
                assert isinstance(row, dict), f"found {row!r} where a row or an object was expected"
        else:
            raise ValueError(
                f"nothing here runs {block.language!r}: teach {Path(__file__).name} how, or mark the block"
            )

    def _python(self, block: Block) -> None:
        lines = block.text.splitlines()
        self._script[block.line - 1 : block.line - 1 + len(lines)] = lines
        Path("page.py").write_text("\n".join(self._script) + "\n")
        before = dict(vars(self._module))
        self._trained.clear()
        self._type("\n" * (block.line - 1) + block.text)
        new = {name: value for name, value in vars(self._module).items() if before.get(name) is not value}
        for value in new.values():
            if _is_rollout(value) and value not in self._trained:
                self._roll_out(value)
        if "config" in new and not self._trained:
            self._train(new["config"])

    def _type(self, code: str) -> None:
        exec(compile(code, str(self._module.__file__), "exec", dont_inherit=True), vars(self._module))

    def _roll_out(self, rollout: Callable[..., Any]) -> None:
        """Run a rollout function that the page defines and does not use."""
        import asyncrl

        asyncrl.evaluate(rollout, dataset=self._rows()[:2], config=self._plain_config(), samples=2)

    def _train(self, config: Any) -> None:
        """Use settings that the page makes and does not use."""
        import asyncrl

        if isinstance(config, asyncrl.Config):
            asyncrl.train(vars(self._module)["rollout"], dataset=self._rows(), config=config)

    def _plain_config(self) -> Any:
        import asyncrl

        return asyncrl.Config(model="Qwen/Qwen3-0.6B")

    def _rows(self) -> Any:
        return vars(self._module).get("rows") or _json(Path("train.jsonl").read_text())


@contextlib.contextmanager
def shortened(steps: int, trained: set[Any] | None = None) -> Iterator[None]:
    """Inside, every run is a short one. What was trained is added to `trained`."""
    import asyncrl.run

    train, evaluate = asyncrl.run.train_async, asyncrl.run.evaluate_async

    @functools.wraps(train)
    async def short_train(
        rollout: Any, *, config: Any, evaluation: Any = None, resume: Any = False, **more: Any
    ) -> Any:
        if trained is not None:
            trained.add(rollout)
        short = _short(config, STEPS_RESUMED if resume else steps)
        held_out = evaluation[:HELD_OUT_ROWS] if isinstance(evaluation, list) else evaluation
        return await train(rollout, config=short, evaluation=held_out, resume=resume, **more)

    @functools.wraps(evaluate)
    async def short_evaluate(rollout: Any, *, config: Any, **more: Any) -> Any:
        return await evaluate(rollout, config=_short(config, steps), **more)

    asyncrl.run.train_async, asyncrl.run.evaluate_async = short_train, short_evaluate
    try:
        yield
    finally:
        asyncrl.run.train_async, asyncrl.run.evaluate_async = train, evaluate


def _short(config: Any, steps: int) -> Any:
    """The same settings, for a run of seconds."""
    sections = {
        "sampling": {"max_tokens": min(config.sampling.max_tokens, MAX_TOKENS)},
        "sampler": {"kind": "transformers", "urls": ()},
        "trainer": {"device": "cpu"},
    }
    update = {name: getattr(config, name).model_copy(update=values) for name, values in sections.items()}
    return config.model_copy(
        update={
            **update,
            "max_steps": min(config.max_steps or steps, max(steps, STEPS_NAMED)),
            "prompt_groups_per_step": 1,
            "completions_per_prompt": min(config.completions_per_prompt, 4),
            "group_filter": config.group_filter or every_group,
        }
    )


def every_group(rewards: list[float]) -> bool:
    """Is worth a step: nobody waits here for rewards that differ."""
    return True


def _is_rollout(value: Any) -> bool:
    """A rollout function or a factory of one: known by the name of its only parameter."""
    if not callable(value) or isinstance(value, type):
        return False
    try:
        takes = list(inspect.signature(value).parameters)
    except (TypeError, ValueError):
        return False
    return takes == ["setup"] or (takes == ["prompt"] and inspect.iscoroutinefunction(value))


def load_settings(settings: dict[str, Any]) -> None:
    """Raises `ConfigError` where a file of these settings could not be used. Needed ones may stand in other blocks."""
    from asyncrl.config import Config
    from asyncrl.recipes import async_rl_loop, dpo_loop, orpo_loop, sft_loop

    if "base_model" not in settings:
        Config(**{"model": "Qwen/Qwen3-0.6B"} | settings)
        return
    loops = (async_rl_loop, sft_loop, dpo_loop, orpo_loop)
    fitting = [loop.Config for loop in loops if settings.keys() <= loop.Config.model_fields.keys()]
    assert fitting, f"no recipe has all of {sorted(settings)}"
    fitting[0](**settings)


def _json(text: str) -> list[Any]:
    """One value, or one for each line."""
    try:
        return [json.loads(text)]
    except json.JSONDecodeError:
        return [json.loads(line) for line in text.splitlines() if line.strip()]


# Commands


def commands(block: Block) -> list[list[str]]:
    """What a reader types, as words. In `console` those are the lines behind a `$`, the others are printed."""
    lines = block.text.replace("\\\n", " ").splitlines()
    if block.language == "console":
        lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
        if not lines:
            raise ValueError("a `console` without a line that begins with `$ `")
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def type_command(words: Sequence[str]) -> None:
    """Run one command, or check all of it that can be checked here."""
    program, *arguments = itertools.dropwhile(re.compile("[A-Z_]+=").match, words)  # `NAME=value asyncrl ...`
    if program == "python" and arguments[:2] == ["-m", "asyncrl"]:
        program, arguments = "asyncrl", arguments[2:]
    if program not in _PROGRAMS:
        raise ValueError(f"nothing here runs {program!r}: teach {Path(__file__).name} how, or mark the block")
    _PROGRAMS[program](arguments)


def asyncrl_command(arguments: list[str]) -> None:
    """`asyncrl ARGUMENTS`, in this process. Raises `AssertionError` when it does not end with 0."""
    from asyncrl.cli import main

    for option, value in QUICKER.get(arguments[0], {}).items():
        if option in arguments:
            place = arguments.index(option) + 1
            arguments[place] = arguments[place].partition(",")[0]
        else:
            arguments = [*arguments, option, value]
    parsed, rest = main._parser().parse_known_args(arguments)
    assert not rest or parsed.takes_settings, f"asyncrl {parsed.command} does not know {' '.join(rest)}"
    if not set(arguments) & set(ONLY_PARSED):
        with _another_main(), _sweeps_without_runs():
            code = main.main(arguments)
        assert code == 0, f"asyncrl {shlex.join(arguments)} ended with {code}"


@contextlib.contextmanager
def _sweeps_without_runs() -> Iterator[None]:
    """A sweep gets to where its runs would begin: each is a process, and takes seconds (tests/test_sweep.py)."""
    from asyncrl.sweeps.processes import Runner

    run, Runner.run = Runner.run, lambda self, look: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        Runner.run = run  # type: ignore[method-assign]


@contextlib.contextmanager
def _another_main() -> Iterator[None]:
    """A command is a process of its own: those that it starts import nothing of the page."""
    page = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = page


def _python_command(arguments: list[str]) -> None:
    """A script of the page or of `examples` is run; of `benchmarks`, which take minutes, the options are looked up."""
    if arguments[:2] == ["-m", "venv"]:
        return
    script, *options = arguments
    path = Path(script) if Path(script).exists() else ROOT / script
    assert path.exists(), f"there is no {script}"
    if path.parent.name == "benchmarks":
        text = path.read_text()
        unknown = [word for word in options if word.startswith("--") and f'"{word}"' not in text]
        assert not unknown, f"{script} has no {' '.join(unknown)}"
        return
    before = sys.argv
    sys.argv = [script, *options]
    try:
        runpy.run_path(str(path), run_name="__main__")
    finally:
        sys.argv = before


def _pip(arguments: list[str]) -> None:
    """Its files and extras exist; what it would download is not tried."""
    assert arguments[:1] == ["install"], "only `pip install` is known here"
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for flag, value in zip(arguments, [*arguments[1:], ""], strict=True):
        if flag in ("-c", "-r", "--constraint", "--requirement"):
            assert (ROOT / value).is_file(), f"there is no {value}"
        if found := re.fullmatch(r"(?:\.|asyncrl)\[([\w,-]+)\]", flag):
            unknown = set(found[1].split(",")) - extras.keys()
            assert not unknown, f"pyproject.toml has no extra {sorted(unknown)}"


def _make(arguments: list[str]) -> None:
    subprocess.run(["make", "--dry-run", *arguments], cwd=ROOT, check=True, capture_output=True)


def _really(program: str) -> Callable[[list[str]], None]:
    return lambda arguments: subprocess.run([program, *arguments], check=True) and None


def _taken_for_granted(arguments: list[str]) -> None:
    """Needs a network, or changes the reader's shell alone."""


_PROGRAMS: dict[str, Callable[[list[str]], None]] = {
    "asyncrl": asyncrl_command,
    "python": _python_command,
    "pip": _pip,
    "make": _make,
    **{name: _really(name) for name in ("cat", "head", "ls", "tail", "wc")},
    **dict.fromkeys(("cd", "git", "source"), _taken_for_granted),
}
