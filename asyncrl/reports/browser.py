"""The browser of rollouts: what the policy said, with what was trained marked. assets/rollouts.js shows it.

The log of a run may be gigabytes, and a page has to open: a bounded part of it is read, from its end, and a choice of
that is kept, which the page says.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

from asyncrl.metrics.jsonl import encode
from asyncrl.reports.curves import Entry
from asyncrl.reports.page import Block, number
from asyncrl.reports.run_data import RunData
from asyncrl.storage.logged import TOLD_ELSEWHERE, Rollout, timed_stretches, tool_calls, turns_of
from asyncrl.terminal import visible

MOST_READ = 64_000_000
"""Characters of the log of a run that are looked at, the newest."""
MOST_SHOWN = 2_500_000
"""Characters of all rollouts on the page."""
CHOSEN = 100
"""Of a run: so many of the newest, of the best, of the worst, of evaluations, and of those evenly through the run."""
LONGEST_TEXT = 20_000
"""Characters of one stretch of text; of a longer one its beginning and its end are shown."""
LONGEST_VALUE = 300

_REORDERING = re.compile("[\u200e\u200f\u202a-\u202e\u2066-\u2069]")
"""Characters that turn the direction of the text around them, and show something else than stands there."""


def rollouts_block(entries: Sequence[Entry]) -> Block:
    """The block of a page (kind `rollouts`), for `page(..., scripts=["rollouts.js"])`."""
    runs = [(entry, run) for entry in entries for run in entry.runs]
    shown: list[dict[str, Any]] = []
    known, whole = 0, True
    for entry, run in runs:
        found, all_read = _read(run)
        known, whole = known + len(found), whole and all_read
        name = entry.name if len(entry.runs) == 1 else run.name
        described = (_describe(rollout, name) for rollout in _choose(found))
        shown += _within(described, MOST_SHOWN // len(runs))
    several = len(runs) > 1
    return {
        **{"kind": "rollouts", "id": "rollouts", "title": "Rollouts", "several": several, "rollouts": shown},
        "about": _about(len(shown), known, whole),
    }


def _about(shown: int, known: int, whole: bool) -> str:
    if not known:
        return "No rollouts were logged. `log_rollouts` says how many groups of each step are."
    of = f"{known:,} that were logged" if whole else f"the newest {known:,} that were logged"
    if shown == known and whole:
        return f"All {of}. What is trained stands on a coloured ground."
    return (
        f"{shown:,} of {of}: the newest, the best, the worst, those of evaluations, and some evenly through the run. "
        "`asyncrl inspect` shows the others. What is trained stands on a coloured ground."
    )


def _read(run: RunData) -> tuple[list[Rollout], bool]:
    """The newest first, and whether they are all."""
    found: list[Rollout] = []
    left = MOST_READ
    for rollout in run.rollouts():
        left -= sum(len(stretch["text"]) for sample in rollout.samples for stretch in sample["text"])
        if left < 0:
            return found, False
        found.append(rollout)
    return found, True


def _choose(rollouts: Sequence[Rollout]) -> Iterator[Rollout]:
    """Each once, by turns one of each sort: wherever the page is full, each has had its share."""
    trained = [place for place, rollout in enumerate(rollouts) if not rollout.group.get("evaluation")]
    evaluated = [place for place, rollout in enumerate(rollouts) if rollout.group.get("evaluation")]
    stride = max(1, -(-len(trained) // CHOSEN))
    sorts = (
        trained[:CHOSEN],
        heapq.nlargest(CHOSEN, trained, key=lambda place: rollouts[place].reward or 0.0),
        heapq.nsmallest(CHOSEN, trained, key=lambda place: rollouts[place].reward or 0.0),
        trained[::stride],
        evaluated[:CHOSEN],
    )
    turns = chain.from_iterable(
        (sort[turn] for sort in sorts if turn < len(sort)) for turn in range(max(map(len, sorts), default=0))
    )
    return (rollouts[place] for place in dict.fromkeys(turns))


def _within(described: Iterator[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    """As many as there is room for, the newest first; one too long for what is left is passed over."""
    kept = []
    for one in described:
        size = len(encode(one))
        if size <= most:
            kept.append(one)
            most -= size
    return sorted(kept, key=lambda one: (-one["step"], one["evaluation"], one["row"], one["member"]))


def _describe(rollout: Rollout, run: str) -> dict[str, Any]:
    """A rollout as the page has it."""
    group = rollout.group
    evaluation = bool(group.get("evaluation"))
    versions = [version for sample in rollout.samples for version in sample["versions"]]
    return {
        "key": f"{run}/{group['step']}/{group.get('group', 'evaluation')}/{group['row']}/{rollout.member}",
        **{"run": run, "evaluation": evaluation, "step": group["step"], "row": group["row"]},
        **{"epoch": group.get("epoch"), "member": rollout.member},
        **{"reward": number(rollout.reward), "advantage": number(rollout.advantage)},
        "tokens": rollout.tokens,
        "trained": sum(sample["loss_tokens"] for sample in rollout.samples),
        "turns": sum(stretch["kind"] == "policy" for sample in rollout.samples for stretch in sample["text"]),
        "seconds": number(rollout.seconds),
        "staleness": None if evaluation or not versions else max(0, group["step"] - 1 - min(versions)),
        "wrong": rollout.went_wrong,
        "samples": [_describe_sample(sample) for sample in rollout.samples],
    }


def _describe_sample(sample: Mapping[str, Any]) -> dict[str, Any]:
    stretches = []
    for stretch, seconds in timed_stretches(sample):
        about = _about_turn(stretch, seconds) if stretch["kind"] == "policy" else ""
        for role, text in turns_of(stretch["kind"], stretch["text"]):
            stretches.append({"role": shown_text(role)[:20], "text": shown_text(_cut(text)), "about": about})
    return {"facts": list(_facts(sample)), "calls": list(_calls(sample.get("info", {}))), "text": stretches}


def _about_turn(stretch: Mapping[str, Any], seconds: float | None) -> str:
    facts = [f"{stretch['tokens']} tokens trained"]
    if stretch["versions"]:
        facts.append(f"drawn by version {', '.join(map(str, stretch['versions']))}")
    if stretch["logprob_mean"] is not None:
        facts.append(f"mean log-prob {stretch['logprob_mean']:.3f}")
    if seconds is not None:
        facts.append(f"{seconds:.2f} s")
    return " · ".join(facts)


def _facts(sample: Mapping[str, Any]) -> Iterator[list[str]]:
    """Pairs of a name and a value."""
    yield ["tokens", f"{sample['tokens']:,}, {sample['loss_tokens']:,} trained"]
    if sample["versions"]:
        yield ["versions", ", ".join(map(str, sample["versions"]))]
    if sample.get("logprob_mean") is not None:
        yield ["log-prob", f"mean {sample['logprob_mean']:.3f}, lowest {sample['logprob_min']:.3f}"]
    if sample.get("advantage_mean") is not None:
        yield ["mean advantage", f"{sample['advantage_mean']:.3f}"]
    if sample.get("turn_rewards"):
        yield ["turn rewards", _brief(sample["turn_rewards"])]
    info = sample.get("info", {})
    if info.get("finish_reason") is not None:
        yield ["finish", _brief(info["finish_reason"])]
    for name, value in info.items():
        if name not in TOLD_ELSEWHERE:
            yield [shown_text(str(name))[:60], _brief(value)]


def _calls(info: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for call in tool_calls(info):
        result = "not run" if call.result is None else _brief(call.result)
        seconds = None if call.seconds is None else number(call.seconds)
        said = f"{_brief(call.name)} {_brief(call.arguments)}"
        yield {"call": said, "result": result, "failed": call.failed, "seconds": seconds}


def shown_text(text: str) -> str:
    """`text` as it stands there: control characters, and those that turn the direction, are written out."""
    return _REORDERING.sub(lambda found: f"\\u{ord(found[0]):04x}", visible(text))


def _cut(text: str) -> str:
    if len(text) <= LONGEST_TEXT:
        return text
    half = LONGEST_TEXT // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half:,} characters are left out ...]\n{text[-half:]}"


def _brief(value: Any) -> str:
    text = shown_text(value if isinstance(value, str) else encode(value))
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}..."
