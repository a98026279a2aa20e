from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from asyncrl.cli.rollout_fn import load_rollout
from asyncrl.errors import ConfigError

CODE = """
from dataclasses import dataclass
from rollout_fn_helper import REWARD

@dataclass
class Answer:
    text: str

async def rollout(prompt):
    return REWARD

def make_rollout(setup):
    return rollout

def plain(prompt):
    return None

class Agent:
    async def __call__(self, prompt):
        return REWARD

agent = Agent()
LIMIT = 3
"""


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A user's project. What it adds to this process is taken out again."""
    (tmp_path / "rollout_fn_case.py").write_text(CODE)
    (tmp_path / "rollout_fn_helper.py").write_text("REWARD = 0.5\n")
    path, modules = list(sys.path), set(sys.modules)
    yield tmp_path
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        del sys.modules[name]


@pytest.mark.parametrize("source", ["rollout_fn_case.py", "rollout_fn_case"])
@pytest.mark.parametrize("name", ["rollout", "agent"])
async def test_an_async_function_is_found_and_runs(folder: Path, source: str, name: str) -> None:
    assert await load_rollout(f"{source}:{name}", folder)(None) == 0.5


def test_a_factory_is_taken(folder: Path) -> None:
    assert load_rollout("rollout_fn_case.py:make_rollout", folder).__name__ == "make_rollout"


def test_a_file_may_be_called_like_a_module(folder: Path) -> None:
    import json

    (folder / "json.py").write_text("async def rollout(prompt): ...\n")
    load_rollout("json.py:rollout", folder)
    assert sys.modules["json"] is json


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        (None, "rollout_fn: this setting is needed"),
        ("rollout_fn_case.py", "expected 'file.py:function' or 'module:function'"),
        ("missing.py:rollout", r"there is no file .*missing.py. Paths are relative to the config file"),
        ("missing_module:rollout", "there is no module 'missing_module'"),
        ("rollout_fn_case.nested:rollout", "there is no module"),
        ("rollout_fn_case.py:rolout", "has no function 'rolout'. Did you mean 'rollout'"),
        ("rollout_fn_case.py:plain", "is not async. Write `async def plain"),
        ("rollout_fn_case.py:LIMIT", "is a int, expected a function"),
    ],
)
def test_what_cannot_be_used_is_named(folder: Path, reference: str | None, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_rollout(reference, folder)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("import not_installed_anywhere\n", "No module named 'not_installed_anywhere'"),
        ("async def rollout(prompt)\n", "SyntaxError: expected ':'"),
        ("raise RuntimeError('boom')\n", "RuntimeError: boom"),
    ],
)
@pytest.mark.parametrize("reference", ["rollout_fn_broken.py:rollout", "rollout_fn_broken:rollout"])
def test_errors_of_the_users_file_are_named_with_the_users_part_of_the_traceback(
    folder: Path, reference: str, source: str, said: str
) -> None:
    (folder / "rollout_fn_broken.py").write_text(source)
    with pytest.raises(ConfigError) as error:
        load_rollout(reference, folder)
    first, *trace = str(error.value).splitlines()
    assert first == f"rollout_fn: '{reference}' cannot be imported:"
    assert trace[-1].endswith(said)
    assert [line.split(", ")[1] for line in trace if line.startswith("  File")] == ["line 1"]
    assert "rollout_fn_broken" not in sys.modules
