"""A config file and the command line's settings -> `Config`."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from datetime import date, datetime, time
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from asyncrl.config import Config
from asyncrl.errors import ConfigError
from asyncrl.storage.folder import OFF

Settings = dict[str, Any]


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a TOML file, lay settings such as `["--staleness.max_staleness", "8", "--seed=3"]` over it, and validate.

    `dataset`, `rollout_fn` and a `model` that begins with `.` are paths relative to the file that names them;
    those on the command line are relative to where the user stands. Raises `ConfigError`.
    """
    path = Path(path)
    settings = _read(path)
    _anchor(settings, path.absolute().parent)
    given = parse_overrides(overrides)
    _anchor(given, Path.cwd())
    _lay_over(settings, given)
    try:
        return Config(**_without_off(Config, settings))
    except ConfigError as error:
        source = f"{path} with the settings of the command line" if overrides else str(path)
        raise ConfigError(f"{source} cannot be used:\n{error}") from None


def parse_overrides(arguments: Sequence[str]) -> Settings:
    """`--a.b value` and `--a.b=value` -> `{"a": {"b": value}}`. Raises `ConfigError` for anything else."""
    settings: Settings = {}
    for name, text in _pairs(arguments):
        field = _find(name)
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


def _find(name: str) -> FieldInfo | None:
    """The setting of this dotted name; None where there is none, which `Config` then says better."""
    model: type[BaseModel] = Config
    *sections, leaf = name.split(".")
    for section in sections:
        inner = model.model_fields.get(section)
        if inner is None:
            return None
        if not _is_section(inner.annotation):
            raise ConfigError(
                f"--{name}: {section!r} is a setting, not a section. docs/configuration.md lists them all."
            )
        model = inner.annotation  # type: ignore[assignment]  # _is_section said so
    field = model.model_fields.get(leaf)
    if field is not None and _is_section(field.annotation):
        example = next(iter(field.annotation.model_fields))  # type: ignore[union-attr]  # a section, as above
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


def _read(path: Path) -> Settings:
    try:
        text = path.read_text(encoding="utf-8")
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
    if isinstance(dataset := settings.get("dataset"), str) and dataset != OFF:
        settings["dataset"] = str((folder / Path(dataset).expanduser()).resolve())
    if isinstance(model := settings.get("model"), str) and model.startswith((".", "~")):
        settings["model"] = str((folder / Path(model).expanduser()).resolve())
    if isinstance(rollout := settings.get("rollout_fn"), str):
        file, colon, function = rollout.rpartition(":")
        if colon and file.endswith(".py"):
            settings["rollout_fn"] = f"{(folder / Path(file).expanduser()).resolve()}:{function}"


def _without_off(section: type[BaseModel], settings: Mapping[str, Any]) -> Settings:
    """The word `none` is None where a setting can be None: TOML has no null."""
    read: Settings = {}
    for name, value in settings.items():
        field = section.model_fields.get(name)
        if field is not None and _is_section(field.annotation) and isinstance(value, dict):
            read[name] = _without_off(field.annotation, value)  # type: ignore[arg-type]  # a section
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


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)
