"""`file.py:function` or `module:function` -> the user's function."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from asyncrl.errors import AsyncRLError, ConfigError, traceback_from


def is_reference(value: object) -> bool:
    """Whether a setting that can be a name or a function names a function to import."""
    return isinstance(value, str) and ":" in value


def load_function(reference: str, setting: str, folder: Path | None = None) -> Callable[..., Any]:
    """Import what `setting` names. Files and modules are looked for from `folder`, or from where the user stands.

    Their own imports are found from where they are, as if they were started as scripts. Raises `ConfigError`; for what
    their code raises while it is imported, with its traceback.
    """
    folder = folder or Path.cwd()
    source, colon, name = reference.rpartition(":")
    if not colon or not source or not name:
        raise ConfigError(f"{setting}: found {reference!r}, expected 'file.py:function' or 'module:function'.")
    load = _load_file if source.endswith(".py") else _load_module
    try:
        module = load(source, folder, setting)
    except AsyncRLError:
        raise
    except Exception as error:
        said = _users_traceback(error)
        raise ConfigError(f"{setting}: {reference!r} cannot be imported:\n{said}") from error
    found = _get(module, name, reference, setting)
    if not callable(found):
        raise ConfigError(f"{setting}: {reference!r} is a {type(found).__name__}, expected a function.")
    return found  # type: ignore[no-any-return]  # it is callable, which is all that can be known


def _load_file(file: str, folder: Path, setting: str) -> ModuleType:
    path = (folder / file).resolve()
    if not path.is_file():
        raise ConfigError(f"{setting}: there is no file {path}. Paths are relative to the config file.")
    _search(path.parent)
    # Its own name where that is free (its classes can be pickled then), else one that shadows nothing.
    name = path.stem if path.stem not in sys.modules else f"asyncrl_user_{path.stem}"
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


def _load_module(name: str, folder: Path, setting: str) -> ModuleType:
    _search(Path.cwd())
    _search(folder.resolve())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # the module is there; something that it imports is not
        raise ConfigError(
            f"{setting}: there is no module {error.name!r} in {folder}, here, or installed. "
            "Use 'file.py:function' for a file."
        ) from None


def _users_traceback(error: Exception) -> str:
    """From the user's file on: the frames that import it say nothing."""
    trace = traceback_from(error, (__file__, importlib.__file__, "<frozen "))
    return "".join(traceback.format_exception(type(error), error, trace)).rstrip()


def _search(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def _get(module: ModuleType, name: str, reference: str, setting: str) -> Any:
    found = vars(module).get(name)
    if found is None:
        functions = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        close = difflib.get_close_matches(name, functions, 1) or functions
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ConfigError(f"{setting}: {reference!r}: {module.__file__} has no function {name!r}.{hint}")
    return found
