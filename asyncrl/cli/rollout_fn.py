"""`file.py:function` or `module:function` -> the user's rollout function."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from asyncrl.errors import ConfigError


def load_rollout(reference: str | None, folder: Path) -> Callable[..., Any]:
    """Import what `rollout_fn` names: an `async def rollout(prompt)`, or a factory `def make_rollout(setup)`.

    Files and modules are looked for from `folder`, the config file's, and their own imports from where they
    are, as if they were started as scripts. What their code raises while it is imported is not caught: the
    traceback is the user's. Raises `ConfigError`.
    """
    if not reference:
        raise ConfigError(
            'rollout_fn: this setting is needed. Name your function: rollout_fn = "rollout.py:rollout", '
            "or call asyncrl.train from Python."
        )
    source, colon, name = reference.rpartition(":")
    if not colon or not source or not name:
        raise ConfigError(f"rollout_fn: found {reference!r}, expected 'file.py:function' or 'module:function'.")
    module = _load_file(folder / source) if source.endswith(".py") else _load_module(source, folder)
    return _check(_get(module, name, reference), reference)


def _load_file(path: Path) -> ModuleType:
    path = path.resolve()
    if not path.is_file():
        raise ConfigError(f"rollout_fn: there is no file {path}. Paths are relative to the config file.")
    _search(path.parent)
    # Its own name where that is free (its classes can be pickled then), else one that shadows nothing.
    name = path.stem if path.stem not in sys.modules else f"rollout_fn_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None, "a file that ends in .py has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _load_module(name: str, folder: Path) -> ModuleType:
    _search(Path.cwd())
    _search(folder.resolve())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # the module is there; something that it imports is not
        raise ConfigError(
            f"rollout_fn: there is no module {error.name!r} in {folder}, here, or installed. "
            "Use 'file.py:function' for a file."
        ) from None


def _search(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def _get(module: ModuleType, name: str, reference: str) -> Any:
    found = vars(module).get(name)
    if found is None:
        functions = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        close = difflib.get_close_matches(name, functions, 1) or functions
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ConfigError(f"rollout_fn: {reference!r}: {module.__file__} has no function {name!r}.{hint}")
    return found


def _check(found: Any, reference: str) -> Callable[..., Any]:
    if not callable(found):
        raise ConfigError(f"rollout_fn: {reference!r} is a {type(found).__name__}, expected an async function.")
    call = found if inspect.isroutine(found) or inspect.isclass(found) else type(found).__call__
    if inspect.iscoroutinefunction(call) or "setup" in inspect.signature(found).parameters:
        return found  # type: ignore[no-any-return]  # it is callable, which is all that can be known
    raise ConfigError(
        f"rollout_fn: {reference!r} is not async. Write `async def {reference.rpartition(':')[2]}(prompt)`; "
        "a factory that makes the rollout function takes one argument called `setup`."
    )
