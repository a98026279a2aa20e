"""A config file and the command line's settings -> `Config`."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from datetime import date, datetime, time
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, TypeVar, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from asyncrl.config import Config
from asyncrl.errors import ConfigError
from asyncrl.storage.folder import OFF

Settings = dict[str, Any]
Kind = TypeVar("Kind", bound=BaseModel)

PATHS = ("dataset", "evaluation.dataset", "evaluation_dataset", "lora.warm_start", "warm_start_from_adapter")
MODELS = ("model", "base_model")
"""Also names on the hub: a path begins with `.` or `~`, or is absolute."""
FUNCTIONS = ("rollout_fn", "policy_loss", "advantage", "group_filter")
"""`file.py:function`, or a name without a path."""


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a TOML file, lay settings such as `["--staleness.max_staleness", "8", "--seed=3"]` over it, and validate.

    Datasets, adapters, `rollout_fn` and a model that begins with `.` are paths relative to the file that names them;
    those on the command line are relative to where the user stands. Raises `ConfigError`.
    """
    return read_config(Config, path, overrides)


def read_config(kind: type[Kind], path: str | Path, overrides: Sequence[str] = ()) -> Kind:
    """`load_config` for the settings of a recipe."""
    path = Path(path)
    settings = read_toml(path)
    _anchor(settings, path.absolute().parent)
    given = parse_overrides(overrides, kind)
    _anchor(given, Path.cwd())
    _lay_over(settings, given)
    try:
        return kind(**_without_off(kind, settings))
    except ConfigError as error:
        source = f"{path} with the settings of the command line" if overrides else str(path)
        raise ConfigError(f"{source} cannot be used:\n{error}") from None


def parse_overrides(arguments: Sequence[str], kind: type[BaseModel] = Config) -> Settings:
    """`--a.b value` and `--a.b=value` -> `{"a": {"b": value}}`. Raises `ConfigError` for anything else."""
    settings: Settings = {}
    for name, text in _pairs(arguments):
        field = _find(name, kind)
        _set(settings, name, text if field is None else parse_value(text, field.annotation))
    return settings


def parse_value(text: str, annotation: Any) -> Any:
    """The value of a setting as it stands on the command line.

    A TOML value where that is one (`8`, `true`, `["a", "b"]`), else the text itself. A setting that holds
    text is never read as a number, and one that holds several values takes them separated by commas.
    """
    kinds = set(_kinds(annotation))
    value = _toml_value(text)
    if isinstance(value, list):
        return value
    if kinds & {str, Path}:
        return value if isinstance(value, str) else text
    if tuple in kinds and text != OFF:
        return [part.strip() for part in str(value).split(",") if part.strip()]
    return value


def _pairs(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    rest = iter(arguments)
    for argument in rest:
        if not argument.startswith("--") or argument == "--":
            raise ConfigError(
                f"found {argument!r} where a setting was expected. Settings are written "
                "--section.field value, after the config file."
            )
        name, equals, value = argument[2:].partition("=")
        if not equals:
            following = next(rest, None)
            if following is None or following.startswith("--"):
                raise ConfigError(f"--{name} needs a value: --{name} VALUE (true or false for a switch).")
            value = following
        yield name.replace("-", "_"), value


def _find(name: str, model: type[BaseModel]) -> FieldInfo | None:
    """The setting of this dotted name; None where there is none, which `model` then says better."""
    *sections, leaf = name.split(".")
    for section in sections:
        inner = model.model_fields.get(section)
        if inner is None:
            return None
        if (found := _section_in(inner.annotation)) is None:
            raise ConfigError(
                f"--{name}: {section!r} is a setting, not a section. docs/configuration.md lists them all."
            )
        model = found
    field = model.model_fields.get(leaf)
    if field is not None and (found := _section_in(field.annotation)) is not None:
        example = next(iter(found.model_fields))
        raise ConfigError(f"--{name} is a section. Name one of its settings, such as --{name}.{example} VALUE.")
    return field


def _set(settings: Settings, name: str, value: Any) -> None:
    *sections, leaf = name.split(".")
    for section in sections:
        settings = settings.setdefault(section, {})
    settings[leaf] = value


def _lay_over(below: Settings, above: Mapping[str, Any]) -> None:
    for name, value in above.items():
        if isinstance(value, dict) and isinstance(below.get(name), dict):
            _lay_over(below[name], value)
        else:
            below[name] = value


def read_toml(path: Path) -> Settings:
    """Raises `ConfigError` where it is not there, or no TOML."""
    try:
        text = path.read_text(encoding="utf-8")
    except IsADirectoryError:
        raise ConfigError(
            f"{path} is a folder, and a config file was expected. A run goes on with: asyncrl resume {path}"
        ) from None
    except FileNotFoundError:
        raise ConfigError(f"there is no config file {path}. The config file comes first, then settings.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as a config file: {error}. It must be a TOML text file.") from None
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        line = re.search(r"line (\d+)", str(error))
        where = f"{path}:{line[1]}" if line else f"{path}, at its end"
        raise ConfigError(f'{where}: this is not valid TOML: {error}. Text needs quotes: name = "text".') from None


def _anchor(settings: Settings, folder: Path) -> None:
    """Make the paths of a config absolute, so that they hold wherever the config as used is read again."""

    def absolute(path: str) -> str:
        return str((folder / Path(path).expanduser()).resolve())

    for name in PATHS:
        *sections, leaf = name.split(".")
        inner: Any = settings
        for section in sections:
            inner = inner.get(section)
            inner = inner if isinstance(inner, dict) else {}
        if isinstance(path := inner.get(leaf), str) and path != OFF:
            inner[leaf] = absolute(path)
    for name in MODELS:
        if isinstance(model := settings.get(name), str) and model.startswith((".", "~")):
            settings[name] = absolute(model)
    for name in FUNCTIONS:
        if isinstance(reference := settings.get(name), str):
            file, colon, function = reference.rpartition(":")
            if colon and file.endswith(".py"):
                settings[name] = f"{absolute(file)}:{function}"


def _without_off(section: type[BaseModel], settings: Mapping[str, Any]) -> Settings:
    """The word `none` is None where a setting can be None: TOML has no null."""
    read: Settings = {}
    for name, value in settings.items():
        field = section.model_fields.get(name)
        inner = None if field is None else _section_in(field.annotation)
        if inner is not None and isinstance(value, dict):
            read[name] = _without_off(inner, value)
        elif field is not None and value == OFF and NoneType in _kinds(field.annotation):
            read[name] = None
        else:
            read[name] = value
    return read


def _toml_value(text: str) -> Any:
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
    return text if isinstance(value, date | datetime | time | dict) else value


def _kinds(annotation: Any) -> Iterator[Any]:
    """The plain types in an annotation: `tuple[str, ...] | None` -> tuple, NoneType."""
    origin = get_origin(annotation)
    if origin is None:
        yield annotation
    elif origin is Annotated:
        yield from _kinds(get_args(annotation)[0])
    elif origin is tuple:
        yield tuple
    else:
        for inner in get_args(annotation):
            yield from _kinds(inner)


def _section_in(annotation: Any) -> type[BaseModel] | None:
    """The section of an annotation: `WandbConfig | None` has one. `engine` of a recipe is a part of `Config`."""
    if get_origin(annotation) is Mapping:
        return Config
    sections = (kind for kind in _kinds(annotation) if isinstance(kind, type) and issubclass(kind, BaseModel))
    return next(sections, None)
