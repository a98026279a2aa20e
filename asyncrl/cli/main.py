"""The `asyncrl` command. Heavy things are imported by the command that needs them: `--help` is quick."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import fields
from typing import NoReturn

from asyncrl.cli import tune_options
from asyncrl.errors import AsyncRLError, ConfigError, StallError, UserError
from asyncrl.exits import FAILED, NO_READER, STALLED, USER_ERROR, stopped_by

LEAVE_S = 30.0
"""Python waits at its end for threads that others have started; one that never ends does not hold up the command."""

RECIPES = {
    "sft": "Train on conversations or texts as they are.",
    "dpo": "Train on pairs of answers, against a reference model.",
    "orpo": "Train on pairs of answers, without a reference model.",
}


def run() -> NoReturn:
    """The process of the `asyncrl` command."""
    try:
        code = main()
    except SystemExit as end:  # a signal other than Ctrl-C, or arguments that cannot be understood
        code = end.code if isinstance(end.code, int) else FAILED
    threading.Thread(target=_leave, args=(code,), name="asyncrl end", daemon=True).start()
    signal.signal(signal.SIGINT, lambda *_: os._exit(code))  # nobody has to wait for them
    sys.exit(code)


def _leave(code: int) -> None:
    time.sleep(LEAVE_S)
    left = [thread for thread in threading.enumerate() if not thread.daemon and thread is not threading.main_thread()]
    held = ", ".join(thread.name for thread in left)
    print(f"asyncrl has ended, and does not wait for its threads any longer: {held}", file=sys.stderr, flush=True)
    os._exit(code)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code (`exits.py`)."""
    arguments, rest = _parser().parse_known_args(argv)
    if rest and not arguments.takes_settings:
        _parser().error(f"{arguments.command} does not know {' '.join(rest)}")
    arguments.rest = rest
    try:
        code = int(arguments.run(arguments))
        sys.stdout.flush()  # what a reader has left unread shows here, or else when Python ends
        return code
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return stopped_by(signal.SIGINT)
    except BrokenPipeError:  # of a command that only prints; training goes on without a reader
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left is flushed there
        return NO_READER
    except AsyncRLError as error:
        if arguments.debug:
            raise
        _print_error(error)
        if isinstance(error, UserError):
            return USER_ERROR
        return STALLED if isinstance(error, StallError) else FAILED


def _print_error(error: AsyncRLError) -> None:
    from rich.console import Console
    from rich.text import Text

    from asyncrl.private import hide_secrets
    from asyncrl.terminal import visible

    said = visible(hide_secrets(str(error)))
    Console(stderr=True, highlight=False).print(Text.assemble(("error: ", "bold red"), said), soft_wrap=True)


class _ShowVersions(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        _version(argparse.Namespace())
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="asyncrl", allow_abbrev=False, description="Train language models on asynchronous rollouts."
    )
    about = "show the versions of asyncrl, torch, transformers, vLLM"
    parser.add_argument("--version", action=_ShowVersions, nargs=0, help=about)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(
        name: str, about: str, takes_settings: bool = False, usage: str | None = None, page: str = "configuration"
    ) -> argparse.ArgumentParser:
        epilog = f"Any setting of docs/{page}.md may follow: --section.field VALUE" if takes_settings else None
        made = commands.add_parser(
            name, help=about, description=about, parents=[common], allow_abbrev=False, epilog=epilog, usage=usage
        )
        made.set_defaults(run=_RUN[name], takes_settings=takes_settings)
        return made

    train = command(
        "train",
        "Train as a config file says.",
        True,
        "asyncrl train CONFIG.toml [--resume [WHICH]] [--quiet] [--section.field VALUE ...]",
    )
    train.add_argument("config", metavar="CONFIG.toml")
    _resume_argument(train)
    _quiet_argument(train)
    _sweep_arguments(
        command(
            "sweep",
            "Train every combination of some settings, and compare them.",
            True,
            "asyncrl sweep CONFIG.toml NAME=VALUE,VALUE ... [--out DIR] [--jobs N] [--section.field VALUE ...]",
        )
    )
    resume = command(
        "resume",
        "Go on with a run that ended early.",
        True,
        "asyncrl resume RUN[:WHICH] [--quiet] [--section.field VALUE ...]",
    )
    resume.add_argument("target", metavar="RUN[:WHICH]", help="run folder; WHICH is a checkpoint, such as step-000012")
    _quiet_argument(resume)
    for name, about in RECIPES.items():
        usage = f"asyncrl {name} CONFIG.toml [--resume [WHICH]] [--quiet] [--field VALUE ...]"
        recipe = command(name, about, True, usage, page="supervised")
        recipe.add_argument("config", metavar="CONFIG.toml")
        _resume_argument(recipe)
        _quiet_argument(recipe)
    demo = command("demo", "Train a tiny tool-using agent on this machine, start to end.")
    demo.add_argument("--sampler", choices=("auto", "transformers", "vllm"), default="auto")
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument("--lora", action="store_true", help="train an adapter instead of the full model")
    demo.add_argument("--steps", type=_positive, metavar="N", help="optimizer steps (default: 80)")
    demo.add_argument("--out", metavar="DIR", help="run folder (default: runs/demo-<time>)")
    _quiet_argument(demo)
    evaluate = command("eval", "Measure the mean reward on a dataset.", True)
    evaluate.add_argument("target", metavar="RUN_FOLDER|CONFIG.toml")
    evaluate.add_argument("--dataset", metavar="FILE", help="rows (default: evaluation.dataset, or else dataset)")
    evaluate.add_argument("--samples", type=int, metavar="N", help="rollouts of each row (default: evaluation.samples)")
    _quiet_argument(evaluate)
    _inspect_arguments(command("inspect", "Look at the rollouts of a run, newest first."))
    audit = command("audit", "Prove that every prompt of a run is accounted for, or say what is off.")
    audit.add_argument("runs", metavar="RUN", nargs="+", help="run folder, such as runs/<time>; it may be going on")
    audit.add_argument("--row", type=int, metavar="N", help="show the history of this dataset row instead")
    _replay_arguments(command("replay", "Train again from what a run recorded, to the same weights."))
    _report_arguments(command("report", "Show what runs did, as one HTML page that opens without a network."))
    _trace_arguments(command("trace", "Write the timeline of a run as a file for trace viewers (Perfetto)."))
    tune_options.add_arguments(command("tune", tune_options.ABOUT, True, tune_options.USAGE))
    promote = command("promote", "Write the model of a run, for transformers, peft and vLLM.")
    promote.add_argument("which", metavar="RUN[:step-000012]", help="or an exported adapter, to merge it")
    promote.add_argument("--out", metavar="DIR", required=True, help="a folder that does not exist yet")
    promote.add_argument("--merge", action="store_true", help="lay the LoRA adapter into its base model")
    promote.add_argument("--base-model", metavar="MODEL", help="where it is now (default: where it was)")
    command("doctor", "Show what is installed, what a run would use, and how to mend what is missing.")
    command("version", "The same as --version.")
    return parser


def _resume_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--resume",
        metavar="WHICH",
        nargs="?",
        const="latest",
        help="a run folder, RUN:step-000012, or step-000012 of the config's run folder (default: its newest, "
        "or its start where there is none yet)",
    )


def _quiet_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quiet", action="store_true", help="show no progress")


def _sweep_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG.toml")
    parser.add_argument("axes", metavar="NAME=VALUE,VALUE", nargs="+", help="such as staleness=0,2,4 seed=1,2,3")
    parser.add_argument("--out", metavar="DIR", help="folder of the runs (default: sweeps/<name of the config>)")
    parser.add_argument("--jobs", type=_positive, default=1, metavar="N", help="runs at once (default: 1)")


def _inspect_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="RUN", help="run folder, such as runs/<time>")
    parser.add_argument("--reward", type=_range, metavar="LOW:HIGH", help="either may be left out; --reward=-1:0")
    parser.add_argument("--min-tokens", type=int, metavar="N", help="length of the rollout, prompt and tools included")
    parser.add_argument("--max-tokens", type=int, metavar="N")
    parser.add_argument("--step", type=int, metavar="N", help="of this optimizer step")
    parser.add_argument("--row", type=int, metavar="N", help="of this dataset row")
    parser.add_argument("--contains", default="", metavar="TEXT", help="prompt, tools and answers are searched")
    parser.add_argument("--errors", action="store_true", help="a tool failed, or finish_reason is not stop")
    parser.add_argument("--evaluation", action="store_true", help="rollouts of evaluations, of their first rows")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--best", type=_positive, metavar="N", help="by reward")
    which.add_argument("--worst", type=_positive, metavar="N", help="by reward")
    which.add_argument("--limit", type=_positive, default=5, metavar="N", help="the newest N (default: 5)")


def _replay_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="RUN", help="run folder, such as runs/<time>")
    parser.add_argument(
        "--from", dest="start", metavar="step-000012", help="begin at a checkpoint (default: the start)"
    )
    parser.add_argument("--to", type=_positive, metavar="STEP", help="last step (default: the last that is recorded)")
    parser.add_argument("--step", type=_positive, metavar="STEP", help="train nothing: show what this step was given")
    parser.add_argument("--out", metavar="DIR", help="write the model; a folder that does not exist yet")


def _report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", metavar="RUN", nargs="+", help="run folder, such as runs/<time>; it may be going on")
    parser.add_argument("--join-seeds", action="store_true", help="show runs that differ in their seed alone as one")
    parser.add_argument("--open", action="store_true", help="open it in a browser")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--out", metavar="FILE", help="default: RUN/report.html; of several runs, report.html here")
    how.add_argument("--live", action="store_true", help="serve it to this machine, and follow the run until Ctrl-C")
    parser.add_argument("--port", type=_port, metavar="N", help="of --live (default: a free one)")


def _trace_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="RUN", help="run folder, such as runs/<time>; it may be going on")
    parser.add_argument(
        "--from", dest="start", type=float, metavar="S", help="first second (default: as much as opens)"
    )
    parser.add_argument("--to", dest="end", type=float, metavar="S", help="last second")
    parser.add_argument("--step", type=_steps, metavar="N[:M]", help="this optimizer step, or those from N to M")
    parser.add_argument("--out", metavar="FILE", help="gzipped if it ends in .gz (default: RUN/trace.json.gz)")


def _steps(text: str) -> tuple[int, int]:
    first, colon, last = text.partition(":")
    try:
        return _positive(first), _positive(last if colon else first)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{text!r} is not N or N:M, such as 12 or 12:20") from None


def _range(text: str) -> tuple[float, float]:
    low, colon, high = text.partition(":")
    try:
        lowest, highest = float(low or "-inf"), float(high or "inf")
    except ValueError:
        colon = ""
    if not colon or not lowest <= highest:
        raise argparse.ArgumentTypeError(f"{text!r} is not LOW:HIGH, such as 0.5:1, 0.5: or :0.5")
    return lowest, highest


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 up")
    return int(text)


def _port(text: str) -> int:
    from asyncrl.sections import LAST_PORT

    if (port := _positive(text)) > LAST_PORT:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port: they end at {LAST_PORT}")
    return port


def _train(arguments: argparse.Namespace) -> int:
    from asyncrl.cli.train import train

    return train(arguments.config, arguments.rest, arguments.resume, quiet=arguments.quiet)


def _sweep(arguments: argparse.Namespace) -> int:
    from asyncrl.cli.sweep import sweep

    return sweep(arguments.config, arguments.axes, arguments.rest, arguments.out, arguments.jobs)


def _resume(arguments: argparse.Namespace) -> int:
    from asyncrl.cli.recipes import recipe_run
    from asyncrl.cli.train import resume

    if (found := recipe_run(arguments.target)) is not None:
        return found.resume(arguments.rest, quiet=arguments.quiet)
    return resume(arguments.target, arguments.rest, quiet=arguments.quiet)


def _recipe(arguments: argparse.Namespace) -> int:
    from asyncrl.cli.recipes import run_recipe

    return run_recipe(arguments.command, arguments.config, arguments.rest, arguments.resume, quiet=arguments.quiet)


def _promote(arguments: argparse.Namespace) -> int:
    from asyncrl.cli.promote import promote_run

    return promote_run(arguments.which, arguments.out, merge=arguments.merge, base_model=arguments.base_model)


def _demo(arguments: argparse.Namespace) -> int:
    from asyncrl.demo import run_demo

    chosen = {"steps": arguments.steps} if arguments.steps else {}
    return run_demo(
        out=arguments.out,
        sampler=arguments.sampler,
        seed=arguments.seed,
        lora=arguments.lora,
        quiet=arguments.quiet,
        **chosen,
    )


def _eval(arguments: argparse.Namespace) -> int:
    from asyncrl.cli.evaluate import evaluate

    return evaluate(arguments.target, arguments.dataset, arguments.samples, arguments.rest, quiet=arguments.quiet)


def _inspect(arguments: argparse.Namespace) -> int:
    from asyncrl.cli.inspect import Filter, inspect_run

    wanted = Filter(**{field.name: getattr(arguments, field.name) for field in fields(Filter)})
    return inspect_run(arguments.folder, wanted, arguments.limit, arguments.best, arguments.worst)


def _audit(arguments: argparse.Namespace) -> int:
    from asyncrl.cli.audit import audit_runs

    return audit_runs(arguments.runs, arguments.row)


def _report(arguments: argparse.Namespace) -> int:
    from asyncrl.cli.report import report_runs, serve_report

    seeds, show = arguments.join_seeds, arguments.open
    if arguments.live:
        return serve_report(arguments.runs, join_seeds=seeds, show=show, port=arguments.port or 0)
    if arguments.port is not None:
        raise ConfigError("--port is that of --live: give both, or neither.")
    return report_runs(arguments.runs, arguments.out, join_seeds=seeds, show=show)


def _trace(arguments: argparse.Namespace) -> int:
    from asyncrl.cli.trace import trace_run

    if arguments.step is not None and not (arguments.start is None and arguments.end is None):
        raise ConfigError("--step says which part to draw, and so do --from and --to: give one of them.")
    return trace_run(arguments.folder, arguments.start, arguments.end, arguments.step, arguments.out)


def _tune(arguments: argparse.Namespace) -> int:
    from asyncrl.cli.tune import tune

    return tune(arguments)


def _replay(arguments: argparse.Namespace) -> int:
    from asyncrl.cli.replay import replay_run, show_step

    if arguments.step is not None:
        return show_step(arguments.folder, arguments.step)
    return replay_run(arguments.folder, arguments.start, arguments.to, arguments.out)


def _doctor(arguments: argparse.Namespace) -> int:
    from asyncrl.cli.doctor import doctor

    return doctor()


def _version(arguments: argparse.Namespace) -> int:
    import asyncrl
    from asyncrl.storage.environment import versions

    print("asyncrl", asyncrl.__version__)
    for name, version in versions().items():
        if name != "asyncrl":  # what is imported counts
            print(name, version)
    return 0


_RUN = {
    "train": _train,
    "sweep": _sweep,
    "resume": _resume,
    **dict.fromkeys(RECIPES, _recipe),
    "demo": _demo,
    "eval": _eval,
    "inspect": _inspect,
    "audit": _audit,
    "tune": _tune,
    "promote": _promote,
    "replay": _replay,
    "report": _report,
    "trace": _trace,
    "doctor": _doctor,
    "version": _version,
}
