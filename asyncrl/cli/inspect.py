"""`asyncrl inspect RUN`: rollouts of a run in the terminal, newest first.

The log may be gigabytes: it is read from its end, one group at a time, and only what is shown is kept.
"""

from __future__ import annotations

import heapq
import io
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from asyncrl.errors import ConfigError
from asyncrl.metrics.jsonl import encode
from asyncrl.metrics.rows import shown
from asyncrl.storage.folder import RunFolder, existing_run
from asyncrl.storage.logged import TOLD_ELSEWHERE, Rollout, read_rollouts, timed_stretches, tool_calls, turns_of
from asyncrl.terminal import visible

STYLES = {"system": "magenta", "user": "cyan", "tool": "yellow", "policy": "bold green", "context": "bright_black"}
GUTTER = 11
"""Columns of the role's name."""
LONGEST_INFO = 300
"""Characters of one entry of `info`."""


@dataclass(frozen=True, slots=True)
class Filter:
    """Which rollouts are shown; None and empty ask for nothing."""

    reward: tuple[float, float] | None = None
    """Lowest and highest, both included."""
    min_tokens: int | None = None
    """Prompt and tool tokens count, and those of all segments."""
    max_tokens: int | None = None
    step: int | None = None
    row: int | None = None
    contains: str = ""
    errors: bool = False
    evaluation: bool = False
    """Rollouts of evaluations, and not those that were trained."""

    def keeps(self, rollout: Rollout) -> bool:
        return (
            rollout.group.get("evaluation", False) == self.evaluation
            and (self.step is None or rollout.group["step"] == self.step)
            and (self.row is None or rollout.group["row"] == self.row)
            and (self.reward is None or self.reward[0] <= rollout.reward <= self.reward[1])
            and (self.min_tokens is None or rollout.tokens >= self.min_tokens)
            and (self.max_tokens is None or rollout.tokens <= self.max_tokens)
            and (not self.errors or rollout.went_wrong)
            and self.contains in rollout.text
        )


def inspect_run(run: str, wanted: Filter, limit: int, best: int | None = None, worst: int | None = None) -> int:
    """Print the newest `limit` rollouts that are wanted, or the `best` or `worst` by reward; returns the exit code.

    Raises:
        ConfigError: there is no such run, or it has logged no rollouts.
        DataError: a line of the log cannot be read.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # a model writes letters that not every terminal has
        sys.stdout.reconfigure(errors="replace")
    console = Console(highlight=False, emoji=False, markup=False)
    count = 0
    for rollout in _choose(filter(wanted.keeps, _logged(Path(run))), limit, best, worst):
        show(rollout, console)
        count += 1
    if not count:
        console.print("No rollout in the log matches. Ask for less, or look without filters.")
    elif best is None and worst is None and count == limit:
        console.print(f"The newest {count} that match. --limit N shows more.", style="bright_black")
    return 0


def _choose(rollouts: Iterator[Rollout], limit: int, best: int | None, worst: int | None) -> Iterator[Rollout]:
    """Equal rewards: the newer first."""
    if best is not None:
        return iter(heapq.nlargest(best, rollouts, key=lambda rollout: rollout.reward))
    if worst is not None:
        return iter(heapq.nsmallest(worst, rollouts, key=lambda rollout: rollout.reward))
    return islice(rollouts, limit)


def _logged(root: Path) -> Iterator[Rollout]:
    """The rollouts of a run folder; at least one."""
    path = RunFolder(existing_run(root)).rollouts
    rollouts = read_rollouts(path) if path.is_file() else iter(())
    first = next(rollouts, None)
    if first is None:
        raise ConfigError(
            f"{root} holds no logged rollouts. They are written to {path.name} after each step, unless the run "
            "has log_rollouts = 0: wait for the first step, or train with log_rollouts above 0."
        )
    return chain([first], rollouts)


def show(rollout: Rollout, console: Console) -> None:
    """A headline, the numbers, and the text, with a bar beside what is trained."""
    group = rollout.group
    if group.get("evaluation"):
        console.rule(f"evaluation at step {group['step']} · row {group['row']}", align="left")
        console.print(f"reward {shown(rollout.reward)}", style="bold")
        console.print(f"it took {shown(rollout.seconds)} s")
    else:
        console.rule(
            f"step {group['step']} · row {group['row']} · epoch {group['epoch']} · group {group['group']} · "
            f"rollout {rollout.member + 1} of {len(group['rewards'])}",
            align="left",
        )
        console.print(f"reward {shown(rollout.reward)}   advantage {shown(rollout.advantage)}", style="bold")
        took = "" if rollout.seconds is None else f"it took {rollout.seconds:.1f} s, "
        console.print(f"admitted at version {group['version']}   {took}the group {group['seconds']:.1f} s")
    for index, sample in enumerate(rollout.samples):
        if len(rollout.samples) > 1:
            console.print(f"segment {index + 1} of {len(rollout.samples)}", style="bold")
        for line in _facts(sample):
            console.print(Text(line, "bright_black"))
        for call in _calls(sample.get("info", {})):
            console.print(call, soft_wrap=True)
        for stretch, seconds in timed_stretches(sample):
            for role, piece in turns_of(stretch["kind"], stretch["text"]):
                _print_turn(console, role, piece)
            if stretch["kind"] == "policy":
                console.print(Text(" " * GUTTER + _about(stretch, seconds), "bright_black"))
    console.print()


def _about(stretch: Mapping[str, Any], seconds: float | None) -> str:
    facts = [f"{stretch['tokens']} tokens"]
    if stretch["versions"]:
        facts.append(f"version {', '.join(map(str, stretch['versions']))}")
    facts.append(f"log-prob {shown(stretch['logprob_mean'])}")
    if seconds is not None:
        facts.append(f"{seconds:.2f} s")
    return "╰ " + " · ".join(facts)


def _calls(info: Mapping[str, Any]) -> Iterator[Text]:
    """The tool calls of a chat, one line each: what was called, what came back, how long it took."""
    for call in tool_calls(info):
        line = Text.assemble(
            (" " * GUTTER + "→ ", STYLES["tool"]), f"{_visible(str(call.name))} {_brief(call.arguments)}"
        )
        if call.result is None:
            line.append("   not run", "bright_black")
        else:
            line.append(f"   {_brief(call.result)}", "red" if call.failed else "default")
            if call.seconds is not None:
                line.append(f"   {call.seconds:.2f} s", "bright_black")
        yield line


def _facts(sample: Mapping[str, Any]) -> Iterator[str]:
    """Lines on one segment: what is in the log, and nothing for what is not."""
    versions = sample["versions"]
    drawn = f"   drawn by version {', '.join(map(str, versions))}" if versions else ""
    yield f"{sample['tokens']} tokens, {sample['loss_tokens']} trained{drawn}"
    facts = [f"log-prob mean {shown(sample['logprob_mean'])}, lowest {shown(sample['logprob_min'])}"]
    if "advantage_mean" in sample:
        facts.append(f"mean advantage of its tokens {shown(sample['advantage_mean'])}")
    if sample.get("turn_rewards"):
        facts.append(f"turn rewards {_brief(sample['turn_rewards'])}")
    info = sample.get("info", {})
    if info.get("finish_reason") is not None:
        facts.append(f"finish {_visible(str(info['finish_reason']))}")
    if info.get("tool_calls"):
        failed = f" ({info['tool_errors']} failed)" if info.get("tool_errors") else ""
        facts.append(f"tool calls {_brief(info['tool_calls'])}{failed}")
    yield "   ".join(facts)
    for name, value in info.items():
        if name not in TOLD_ELSEWHERE:
            yield f"{_visible(name)}: {_brief(value)}"


def _print_turn(console: Console, role: str, text: str) -> None:
    style = STYLES.get(role, "blue")
    mark = "┃ " if role == "policy" else "  "
    lines = Text(_visible(text).strip("\n"), style).wrap(console, max(20, console.width - GUTTER - 2), overflow="fold")
    for index, line in enumerate(lines):
        name = role[: GUTTER - 1].ljust(GUTTER) if index == 0 else " " * GUTTER
        whole = Text.assemble((name, style), (mark, STYLES["policy"]), line)
        whole.rstrip()
        console.print(whole, soft_wrap=True)


def _visible(text: str) -> str:
    return visible(text.expandtabs(4))


def _brief(value: Any) -> str:
    text = _visible(value if isinstance(value, str) else encode(value)).replace("\n", "\\n")
    return text if len(text) <= LONGEST_INFO else f"{text[:LONGEST_INFO]}..."
