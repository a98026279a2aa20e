"""The order of the house: who may import whom, how large a file may be, what `import asyncrl` costs."""

from __future__ import annotations

import ast
import re
import statistics
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

import asyncrl

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "asyncrl"
FILES = sorted(PACKAGE.rglob("*.py"))

TORCH_SIDE = (
    "losses",
    "training",
    "sampling/transformers.py",
    "sampling/embedded",
    "demo",
    "recipes/learner.py",
    "replay.py",
    "promotion.py",
)
LAZY_TORCH = ("run.py", "ends.py", "testing/models.py", "installation.py", "model_facts.py")
"""Import torch or transformers inside functions: whoever loads these files does not pay for it."""
TORCH = {"torch", "transformers", "peft", "safetensors", "tokenizers"}
LOOP = {"asyncio", "anyio", "aiohttp"}
BOTTOM = {
    "types.py": set(),
    "errors.py": set(),
    "saved_adapter.py": {"asyncrl.errors"},
    "private.py": set(),
    "sections.py": {"asyncrl.private", "asyncrl.saved_adapter"},
    "config.py": {"asyncrl.errors", "asyncrl.sections"},
}
LONGEST_FILE, MEDIAN_FILE = 450, 200
FILE_DEBT: dict[str, int] = {}
"""Files that are longer for now, and how long they may be."""


def name(file: Path) -> str:
    return file.relative_to(PACKAGE).as_posix()


def within(file: Path, places: tuple[str, ...]) -> bool:
    return any(name(file) == place or name(file).startswith(f"{place}/") for place in places)


def imports(file: Path, *, lazy: bool = True) -> Iterator[str]:
    """Modules that a file imports, those for type checkers left out; `lazy`: also those inside functions."""
    waiting: list[ast.AST] = [ast.parse(file.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None, f"{name(file)}: relative imports hide the direction"
            yield node.module
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            waiting += node.orelse
        elif lazy or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            waiting += ast.iter_child_nodes(node)


def roots(modules: Iterator[str]) -> set[str]:
    return {module.partition(".")[0] for module in modules}


@pytest.mark.parametrize("file", FILES, ids=name)
def test_imports_keep_to_their_side(file: Path) -> None:
    if not within(file, TORCH_SIDE):
        assert not roots(imports(file, lazy=not within(file, LAZY_TORCH))) & TORCH
    elif within(file, ("losses", "training")) and name(file) != "training/thread.py":
        assert not roots(imports(file)) & LOOP
    if within(file, ("losses", "training")):
        above = ("asyncrl.rollout", "asyncrl.sampling", "asyncrl.agents", "asyncrl.engine", "asyncrl.run")
        assert not [module for module in imports(file) if module.startswith(above)]


def test_types_errors_and_config_are_at_the_bottom() -> None:
    for file, below in BOTTOM.items():
        assert {module for module in imports(PACKAGE / file) if module.startswith("asyncrl")} == below


def test_only_the_composition_root_sees_both_sides() -> None:
    """What is above the torch side imports it by name, and only run.py does so for the engine."""
    seers = {
        name(file)
        for file in FILES
        if not within(file, TORCH_SIDE)
        and [module for module in imports(file) if module.startswith(("asyncrl.training", "asyncrl.losses"))]
    }
    assert seers == {"run.py"}


def test_components_do_not_know_the_engine() -> None:
    above = ("asyncrl.run", "asyncrl.cli", "asyncrl.demo", "asyncrl.testing", "asyncrl.assemble", "asyncrl.engine")
    stages = ("data.py", "agents", "rollout", "sampling", "storage", "metrics", "losses", "training")
    for file in FILES:
        if within(file, stages):
            assert not [module for module in imports(file) if module.startswith(above)], name(file)


def test_files_are_short() -> None:
    lines = {name(file): len(file.read_text(encoding="utf-8").splitlines()) for file in FILES}
    assert {file: count for file, count in lines.items() if count > FILE_DEBT.get(file, LONGEST_FILE)} == {}
    assert statistics.median(lines.values()) < MEDIAN_FILE


def test_import_asyncrl_loads_nothing_heavy() -> None:
    code = (
        "import sys, asyncrl\nasyncrl.Config, asyncrl.Prompt, asyncrl.tool, asyncrl.RolloutSample, asyncrl.train\n"
        "print([name for name in ('torch', 'transformers', 'peft', 'vllm') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"


def test_every_public_name_can_be_imported() -> None:
    for public in asyncrl.__all__:
        found = getattr(asyncrl, public)
        assert public == "Rollout" or found.__name__ in (public, f"{public}_async")  # a union has no name
    assert set(asyncrl.__all__) <= set(dir(asyncrl))
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        asyncrl.trian  # noqa: B018


@pytest.mark.parametrize("file", [f for f in FILES if not within(f, ("sampling/vllm_worker.py",))], ids=name)
def test_every_module_can_be_imported(file: Path) -> None:
    module = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    assert import_module(module).__doc__ or file.name == "__init__.py", f"{name(file)} does not say what it is"


def test_no_file_names_this_machine() -> None:
    machine = re.compile(r"(?<![\w.])/(work|root|home/\w+|tmp)/\w|pypi\.org/simple|//[\w.]+/simple\b")
    text = (".py", ".md", ".toml", ".txt", ".cfg", "Makefile")
    places = ("asyncrl", "tests", "docs", "examples", "benchmarks")
    files = [file for place in places if (ROOT / place).is_dir() for file in (ROOT / place).rglob("*")]
    files += [ROOT / "README.md", ROOT / "Makefile", ROOT / "pyproject.toml"]
    named = [
        f"{file.relative_to(ROOT)}: {found[0]}"
        for file in files
        if file.is_file() and file.name.endswith(text) and file != Path(__file__)
        if (found := machine.search(file.read_text(encoding="utf-8")))
    ]
    assert named == []


def test_the_version_is_one() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["version"] == asyncrl.__version__
