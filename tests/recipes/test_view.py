from __future__ import annotations

from collections.abc import Iterator
from io import StringIO

import pytest
from rich.console import Console

from asyncrl.recipes.view import Mode, RunView


def records(count: int) -> Iterator[dict[str, float]]:
    yield from ({"step": step, "loss": 1 / step, "time_s": 0.0} for step in range(1, count + 1))


def shown(mode: Mode, *, terminal: bool) -> str:
    """What a short run writes."""
    file = StringIO()
    with RunView("sft", mode, Console(file=file, force_terminal=terminal, width=120, highlight=False)) as view:
        view.note("run folder: [a]")
        assert list(view.watch("tokenising", range(3))) == [0, 1, 2]
        assert [record["step"] for record in view.steps(4, records(4))] == [1, 2, 3, 4]
    return file.getvalue()


def test_a_terminal_gets_a_bar_with_the_last_loss() -> None:
    text = shown("auto", terminal=True)
    assert "4/4" in text
    assert "loss 0.25" in text
    assert "run folder: [a]" in text
    assert "run folder" not in shown("bar", terminal=True)
    assert "4/4" in shown("bar", terminal=True)


def test_a_file_gets_the_last_step_at_least() -> None:
    assert shown("auto", terminal=False) == "run folder: [a]\nsft: step 4/4 loss 0.25\n"
    assert shown("bar", terminal=False) == "sft: step 4/4 loss 0.25\n"


@pytest.mark.parametrize("terminal", [True, False])
def test_quiet_is_silent(terminal: bool) -> None:
    assert shown("quiet", terminal=terminal) == ""
