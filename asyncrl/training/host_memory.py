"""How much memory this process may still take."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

SYSTEM, OWN_GROUP, GROUPS = Path("/proc/meminfo"), Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def available_bytes() -> int | None:
    """Host memory that is free, or can be freed at once: of the machine, and within the limits of a container (cgroup
    v2). None where the system does not say: other systems than Linux."""
    return min(_available(), default=None)


def _available() -> Iterator[int]:
    try:
        fields = dict(line.split(":", 1) for line in SYSTEM.read_text().splitlines())
        yield int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return
    for group in _groups():
        try:
            limit, used = (group / "memory.max").read_text().strip(), int((group / "memory.current").read_text())
            cached = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        except OSError:  # the group at the top has no limit, and no such files
            continue
        if limit != "max":
            yield max(0, int(limit) - used + int(cached["inactive_file"]))


def _groups() -> Iterator[Path]:
    """The control groups of this process, from its own up: each may have a limit."""
    try:
        (name,) = [line[3:] for line in OWN_GROUP.read_text().splitlines() if line.startswith("0::")]
    except (OSError, ValueError):  # no cgroup v2
        return
    group = GROUPS / name.lstrip("/")
    yield from (group, *(above for above in group.parents if above.is_relative_to(GROUPS)))
