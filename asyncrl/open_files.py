"""How many files this process may have open. Each connection is one, and a run has thousands of them."""

from __future__ import annotations

OPEN_FILES = 65536


def raise_open_files_limit() -> None:
    """Ask for more than the usual soft limit of 1,024. Processes that are started later inherit it."""
    try:
        import resource
    except ImportError:  # not POSIX
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
