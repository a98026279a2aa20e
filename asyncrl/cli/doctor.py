"""`asyncrl doctor`: what is installed, what a run would use, and the command that mends what is missing.

Each check is a function of an `Installation`, so that machines which are not here can be checked too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from packaging.requirements import Requirement

from asyncrl.installation import (
    WITHOUT_METADATA,
    Installation,
    auto_sampler,
    inspect_installation,
    misfits,
    vllm_misfits,
    vllm_name,
)

State = Literal["ok", "note", "wrong"]

GIB = 1 << 30
LOW_MEMORY_BYTES = 4 * GIB
LOW_DISK_BYTES = 5 * GIB
"""Below these a small model does not fit, or a checkpoint of one."""


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the report."""

    name: str
    state: State
    """`wrong`: a run could not start."""
    found: str
    mend: str = ""
    """A command, or what to change."""


def doctor() -> int:
    """Print the report; 1 when a run could not start, else 0."""
    checks = examine(inspect_installation())
    print_report(checks)
    return int(any(check.state == "wrong" for check in checks))


def examine(here: Installation) -> list[Check]:
    """Every check, in the order in which a run would need them."""
    return [*_packages(here), *_vllm(here), _device(here), _sampler(here), *_room(here), *_trackers(here)]


def _packages(here: Installation) -> Iterator[Check]:
    own = here.requires.get("asyncrl")
    for text in own if own is not None else WITHOUT_METADATA:
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield _requirement(requirement, here)
    if own is None:
        yield Check("asyncrl", "note", "runs from its source folder", "pip install -e .")
    for misfit in misfits("torchvision", ("torch",), here):
        # A torchvision made for another torch fails when transformers imports it, and text models do not need it.
        yield Check("torchvision", "wrong", misfit, "pip uninstall -y torchvision")


def _requirement(requirement: Requirement, here: Installation) -> Check:
    name, wanted = requirement.name, str(requirement.specifier) or "any version"
    mend = f"pip install '{name}{requirement.specifier}'"
    version = here.versions.get(name)
    if version is None:
        return Check(name, "wrong", f"missing, needed: {wanted}", mend)
    if not requirement.specifier.contains(version, prereleases=True):
        return Check(name, "wrong", f"{version}, needed: {wanted}", mend)
    return Check(name, "ok", version)


def _vllm(here: Installation) -> Iterator[Check]:
    name = vllm_name(here)
    cuda = here.device is not None and here.device.kind == "cuda"
    if name is None:
        mend = "pip install 'asyncrl[vllm]'" if cuda else "docs/vllm.md says how to install it for a CPU"
        yield Check("vllm", "note", "not installed (the embedded sampler needs nothing more)", mend)
        return
    found = vllm_misfits(name, here)
    for misfit in found:
        # Only a run that would use vLLM is stopped by it.
        mend = "install the versions that go together: pip install -c constraints.txt 'asyncrl[vllm]'"
        yield Check(name, "note", misfit, mend)
    if not found:
        yield Check(name, "ok", f"{here.versions[name]}, fits torch {here.versions.get('torch', '-')}")


def _device(here: Installation) -> Check:
    if here.device is None:
        return Check(
            "device", "wrong", f"torch cannot be imported: {here.torch_error}", "pip install --force-reinstall torch"
        )
    memory = ""
    if here.device.free_bytes is not None and here.device.total_bytes is not None:
        memory = f", {_gib(here.device.free_bytes)} of {_gib(here.device.total_bytes)} free"
    return Check("device", "ok", f"{here.device.kind} ({here.device.name}{memory})")


def _sampler(here: Installation) -> Check:
    sampler, reason = auto_sampler(here)
    return Check("sampler", "ok", f"{sampler}: {reason}")


def _room(here: Installation) -> Iterator[Check]:
    if here.memory_bytes is not None:
        low = here.memory_bytes < LOW_MEMORY_BYTES
        mend = "close other programs, or use a smaller model" if low else ""
        yield Check("memory", "note" if low else "ok", f"{_gib(here.memory_bytes)} free", mend)
    if not here.writable:
        yield Check("folder", "wrong", "nothing can be written here", "go to a folder of yours, or set run_dir")
    elif here.disk_bytes is not None:
        low = here.disk_bytes < LOW_DISK_BYTES
        yield Check("disk", "note" if low else "ok", f"{_gib(here.disk_bytes)} free", "make room" if low else "")


def _trackers(here: Installation) -> Iterator[Check]:
    for name, installed in here.extras.items():
        if installed:
            yield Check(name, "ok", here.versions.get(name, "installed"))
    missing = [name for name, installed in here.extras.items() if not installed]
    if missing:
        names = ",".join(missing)
        yield Check(
            "trackers",
            "ok",
            f"not installed: {', '.join(missing)}",
            f"if you want them: pip install 'asyncrl[{names}]'",
        )


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"


def print_report(checks: Sequence[Check]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    style = {"ok": "green", "note": "yellow", "wrong": "bold red"}
    console = Console(highlight=False)
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for check in checks:
        table.add_row(Text(check.state, style[check.state]), check.name, Text(check.found))
        if check.mend:
            table.add_row("", "", Text(f"-> {check.mend}", "cyan"))
    console.print(table)
    wrong = sum(check.state == "wrong" for check in checks)
    verdict = f"A run cannot start: {wrong} to mend." if wrong else "A run can start."
    console.print(Text(verdict, style["wrong" if wrong else "ok"]))
