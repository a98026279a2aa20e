"""`python -m asyncrl` is the `asyncrl` command."""

from __future__ import annotations

from asyncrl.cli.main import run

if __name__ == "__main__":
    run()
