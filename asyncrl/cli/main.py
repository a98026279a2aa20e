"""The `asyncrl` command. Heavy things are imported by the command that needs them: `--help` is quick."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from asyncrl.errors import AsyncRLError, UserError

USER_ERROR, ENGINE_ERROR, INTERRUPTED = 2, 1, 130
"""Exit codes: something the user wrote; the run could not go on; Ctrl-C (128 + SIGINT)."""

RECIPES = {
    "sft": "Train on conversations or texts as they are.",
    "dpo": "Train on pairs of answers, against a reference model.",
    "orpo": "Train on pairs of answers, without a reference model.",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments, rest = _parser().parse_known_args(argv)
    if rest and not arguments.takes_settings:
        _parser().error(f"{arguments.command} does not know {' '.join(rest)}")
    arguments.rest = rest
    try:
        return int(arguments.run(arguments))
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return INTERRUPTED
    except AsyncRLError as error:
        if arguments.debug:
            raise
        _print_error(error)
        return USER_ERROR if isinstance(error, UserError) else ENGINE_ERROR


def _print_error(error: AsyncRLError) -> None:
    from rich.console import Console
    from rich.text import Text

    Console(stderr=True, highlight=False).print(Text.assemble(("error: ", "bold red"), str(error)), soft_wrap=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="asyncrl", allow_abbrev=False, description="Train language models on asynchronous rollouts."
    )
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
        "train", "Train as a config file says.", True, "asyncrl train CONFIG.toml [--section.field VALUE ...]"
    )
    train.add_argument("config", metavar="CONFIG.toml")
    for name, about in RECIPES.items():
        recipe = command(name, about, True, f"asyncrl {name} CONFIG.toml [--field VALUE ...]", page="supervised")
        recipe.add_argument("config", metavar="CONFIG.toml")
    demo = command("demo", "Train a tiny tool-using agent on this machine, start to end.")
    demo.add_argument("--sampler", choices=("auto", "transformers", "vllm"), default="auto")
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument("--lora", action="store_true", help="train an adapter instead of the full model")
    demo.add_argument("--steps", type=int, help="optimizer steps")
    demo.add_argument("--out", metavar="DIR", help="run folder (default: runs/<time>)")
    evaluate = command("eval", "Measure the mean reward on a dataset.", True)
    evaluate.add_argument("target", metavar="RUN_FOLDER|CONFIG.toml")
    evaluate.add_argument("--dataset", metavar="FILE", help="rows (default: evaluation.dataset, or else dataset)")
    evaluate.add_argument("--samples", type=int, metavar="N", help="rollouts of each row (default: evaluation.samples)")
    _inspect_arguments(command("inspect", "Look at the rollouts of a run, newest first."))
    command("doctor", "Show what is installed, what a run would use, and how to mend what is missing.")
    command("version", "Show the version.")
    return parser


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


def _train(arguments: argparse.Namespace) -> int:
    from asyncrl.cli.train import train

    return train(arguments.config, arguments.rest)


def _recipe(arguments: argparse.Namespace) -> int:
    from asyncrl.cli.recipes import run_recipe

    return run_recipe(arguments.command, arguments.config, arguments.rest)


def _demo(arguments: argparse.Namespace) -> int:
    from asyncrl.demo import main as run_demo

    argv = ["--sampler", arguments.sampler, "--seed", str(arguments.seed)]
    argv += ["--lora"] if arguments.lora else []
    argv += ["--steps", str(arguments.steps)] if arguments.steps is not None else []
    argv += ["--out", arguments.out] if arguments.out else []
    return int(run_demo(argv) or 0)


def _eval(arguments: argparse.Namespace) -> int:
    from asyncrl.cli.evaluate import evaluate

    return evaluate(arguments.target, arguments.dataset, arguments.samples, arguments.rest)


def _inspect(arguments: argparse.Namespace) -> int:
    from asyncrl.cli.inspect import Filter, inspect_run

    wanted = Filter(
        reward=arguments.reward,
        min_tokens=arguments.min_tokens,
        max_tokens=arguments.max_tokens,
        step=arguments.step,
        row=arguments.row,
        contains=arguments.contains,
        errors=arguments.errors,
        evaluation=arguments.evaluation,
    )
    return inspect_run(arguments.folder, wanted, arguments.limit, arguments.best, arguments.worst)


def _doctor(arguments: argparse.Namespace) -> int:
    from asyncrl.cli.doctor import doctor

    return doctor()


def _version(arguments: argparse.Namespace) -> int:
    import asyncrl

    print(f"asyncrl {asyncrl.__version__}")
    return 0


_RUN = {
    "train": _train,
    **dict.fromkeys(RECIPES, _recipe),
    "demo": _demo,
    "eval": _eval,
    "inspect": _inspect,
    "doctor": _doctor,
    "version": _version,
}
