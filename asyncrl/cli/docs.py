"""`python -m asyncrl.cli.docs [FOLDER]`: write the pages that are made from code.

`docs/configuration.md` comes from the docstrings of `Config`, `docs/metrics.md` from the table of metrics.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from asyncrl.config import Config
from asyncrl.metrics.names import metrics_page

INTRODUCTION = """\
# Configuration

A run is one `asyncrl.Config`. In Python you write `asyncrl.Config(model=..., staleness={"max_staleness": 8})`; for
the command line, the same names go into a TOML file:

```toml
model = "Qwen/Qwen3-0.6B"
rollout_fn = "rollout.py:rollout"   # relative to this file, as `dataset` is
dataset = "train.jsonl"
completions_per_prompt = 8

[staleness]
max_staleness = 8
```

`asyncrl train config.toml --staleness.max_staleness 4 --trackers wandb` overrides it. Values are read as TOML
(`8`, `true`, `["a", "b"]`) and else as text; lists may also be written with commas; paths are relative to where you
stand. TOML has no null: `none` stands for it, in the file and on the command line (`--loss.tis_cap none`).
`config.toml` in the run folder holds the settings as they were used.

<!-- Made by `python -m asyncrl.cli.docs` from asyncrl/config.py and sections.py: change it there. -->
"""

PAGES = {"configuration.md": lambda: configuration_page(), "metrics.md": metrics_page}


def configuration_page() -> str:
    """The text of `docs/configuration.md`."""
    lines = [INTRODUCTION, "## The run", "", *_table(Config)]
    for name, field in Config.model_fields.items():
        if (section := _section(field.annotation)) is not None:
            lines += ["", f"## `[{name}]`", "", section.__doc__ or "", "", *_table(section)]
    return "\n".join(lines) + "\n"


def write_pages(folder: Path) -> list[Path]:
    written = []
    for name, page in PAGES.items():
        (folder / name).write_text(page(), encoding="utf-8")
        written.append(folder / name)
    return written


def _table(section: type[BaseModel]) -> Iterator[str]:
    yield "| setting | value | default | meaning |"
    yield "|---|---|---|---|"
    for name, field in section.model_fields.items():
        if _section(field.annotation) is None:
            meaning = " ".join((field.description or "").split())
            cells = (f"`{name}`", _values(field), _default(field), meaning)
            yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _section(annotation: Any) -> type[BaseModel] | None:
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "needed"
    return "none" if field.default is None else f"`{_toml(field.default)}`"


def _toml(value: Any) -> str:
    if isinstance(value, tuple):
        return json.dumps(list(value))
    return json.dumps(value) if isinstance(value, str | bool) else str(value)


def _values(field: FieldInfo) -> str:
    """What a setting takes, for people: `int > 0`, `"wait"`, `"pace"`, `list of text`."""
    return " or ".join(dict.fromkeys(_describe(field.annotation, field.metadata)))


def _describe(annotation: Any, limits: list[Any]) -> Iterator[str]:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        yield from _describe(arguments[0], list(arguments[1:]))
    elif origin is Literal:
        yield from (f"`{json.dumps(choice)}`" for choice in arguments)
    elif origin is tuple and arguments[-1] is ...:
        yield "list of " + " / ".join(_describe(arguments[0], []))
    elif origin is tuple:
        yield "[" + ", ".join(" ".join(_describe(inner, [])) for inner in arguments) + "]"
    elif arguments and "Callable" not in str(origin):
        for inner in arguments:
            yield from _describe(inner, [])
    else:
        plain = {str: "text", Path: "path", NoneType: "`none`", bool: "`true` or `false`"}.get(annotation)
        plain = "function (Python only)" if "Callable" in str(origin) else plain or annotation.__name__
        yield " ".join([plain, ", ".join(_limits(limits))]).strip()


def _limits(metadata: list[Any]) -> Iterator[str]:
    for limit in metadata:
        if isinstance(limit, FieldInfo):
            yield from _limits(limit.metadata)
        elif isinstance(limit, Gt):
            yield f"> {limit.gt}"
        elif isinstance(limit, Ge):
            yield f"≥ {limit.ge}"
        elif isinstance(limit, Le):
            yield f"≤ {limit.le}"
        elif isinstance(limit, Lt):
            yield f"< {limit.lt}"


if __name__ == "__main__":
    for path in write_pages(Path(sys.argv[1] if len(sys.argv) > 1 else "docs")):
        print(path)
