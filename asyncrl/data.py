"""From dataset rows to prompts: in a seeded order, with a cursor that is exact.

JSONL | list of dicts | datasets.Dataset  ->  Rows  ->  PromptStream  ->  Draw  ->  Prompt
"""

from __future__ import annotations

import copy
import hashlib
import json
import random
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from asyncrl.errors import DataError

if TYPE_CHECKING:
    from asyncrl.agents.policy import Policy
    from asyncrl.config import DataConfig


FINGERPRINT_ROWS = 1000


class Rows(Protocol):
    """Anything with a length that gives a mapping for an index: a list of dicts, a `datasets.Dataset`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Mapping[str, Any]: ...


def load_rows(dataset: str | Path | Rows) -> Rows:
    """Open a dataset: a path is a JSONL file, anything else must be indexable.

    Raises:
        DataError: no such file, a line that is no JSON object (with its number), no rows, or not indexable.
    """
    rows: Any = _read_jsonl(Path(dataset)) if isinstance(dataset, (str, Path)) else dataset
    if isinstance(rows, Mapping) or (not isinstance(rows, Sequence) and not _is_indexable(rows)):
        raise DataError(
            f"the dataset is a {type(rows).__name__}. Expected the path of a JSONL file, a list of dicts, or anything "
            "with len() and [index], such as one split of a datasets.Dataset."
        )
    if len(rows) == 0:
        raise DataError("the dataset has no rows.")
    return rows  # type: ignore[no-any-return]


def _is_indexable(rows: Any) -> bool:
    return callable(getattr(type(rows), "__len__", None)) and callable(getattr(type(rows), "__getitem__", None))


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DataError(f"there is no dataset file {str(path)!r} (looked in {Path.cwd()}).") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"the dataset file {str(path)!r} cannot be read as UTF-8 text: {error}.") from None
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path}, line {number}: not JSON: {error.msg} at column {error.colno}: {_around(line, error.pos)}. "
                "Expected one JSON object per line."
            ) from None
        if not isinstance(row, dict):
            raise DataError(
                f"{path}, line {number}: found a JSON {type(row).__name__}: {line[:60]}. Expected a JSON object."
            )
        rows.append(row)
    return rows


def fingerprint(rows: Rows) -> str:
    """Tells one dataset from another: their number, and what stands in them. Of long ones, rows spread over it all."""
    count = len(rows)
    digest = hashlib.sha256(str(count).encode())
    for index in range(0, count, max(1, count // FINGERPRINT_ROWS)):
        row: Any = rows[index]
        named = {str(name): value for name, value in row.items()} if isinstance(row, Mapping) else type(row).__name__
        # An object has a type that lasts, and perhaps an address that does not.
        digest.update(json.dumps(named, sort_keys=True, default=lambda value: type(value).__name__).encode())
    return digest.hexdigest()[:16]


def _around(line: str, position: int) -> str:
    start = max(0, position - 20)
    return repr(line[start : position + 20])


class Prompt(Mapping[str, Any]):
    """One dataset row to answer, as a rollout function sees it: a read-only mapping over the row.

    Lists and dicts that you take out of it are your own copies, so one rollout cannot change another's prompt.
    """

    __slots__ = ("_rng", "_row", "_seed", "epoch", "evaluation", "index", "policy", "rollout_index")

    def __init__(
        self,
        row: Mapping[str, Any],
        *,
        policy: Policy,
        index: int,
        epoch: int = 0,
        rollout_index: int = 0,
        evaluation: bool = False,
        seed: int = 0,
    ) -> None:
        self._row = row
        self._seed = seed
        self._rng: random.Random | None = None
        self.policy = policy
        """The model that is being trained, bound to this rollout."""
        self.index = index
        """Of the row in the dataset."""
        self.epoch = epoch
        self.rollout_index = rollout_index
        """Which member of the group this is, 0 to completions_per_prompt - 1."""
        self.evaluation = evaluation
        """True when the sample is not trained on."""

    def __getitem__(self, key: str) -> Any:
        try:
            value = self._row[key]
        except KeyError:
            raise KeyError(f"{key!r}; the row has {', '.join(map(repr, self._row))}") from None
        return copy.deepcopy(value) if isinstance(value, (list, dict)) else value

    def __iter__(self) -> Iterator[str]:
        return iter(self._row)

    def __len__(self) -> int:
        return len(self._row)

    @property
    def rng(self) -> random.Random:
        """Randomness for this rollout: the same for the same seed, epoch, row and rollout index; another one in an
        evaluation, so that a world made from it is none that is trained in."""
        if self._rng is None:
            world = f"{self._seed}/{self.epoch}/{self.index}/{self.rollout_index}"
            self._rng = random.Random(f"{world}/evaluation" if self.evaluation else world)
        return self._rng

    @property
    def group_seed(self) -> int:
        """A number for the world of this rollout, below 2**31: the same for all members of its group."""
        world = f"{self._seed}/{self.epoch}/{self.index}/{self.evaluation}"
        return random.Random(world).getrandbits(31)

    def __repr__(self) -> str:
        place = f"index={self.index}, epoch={self.epoch}, rollout_index={self.rollout_index}"
        return f"Prompt({place}, {dict(self._row)!r})"


@dataclass(frozen=True, slots=True)
class Draw:
    """One row in one epoch: the thing that the ledger accounts for."""

    epoch: int
    index: int
    row: Mapping[str, Any]
    again: bool = False
    """It has been handed out before and was given back."""

    @property
    def key(self) -> tuple[int, int]:
        return self.epoch, self.index


@dataclass(frozen=True, slots=True)
class Cursor:
    """Where the stream stands: `position` draws of `epoch` have been handed out."""

    epoch: int = 0
    position: int = 0


class PromptStream:
    """Hands out draws, epoch after epoch. Owns the order and the cursor.

    Each epoch is shuffled anew from (seed, epoch), so that the order after a resume is the order before it.
    """

    def __init__(self, rows: Rows, config: DataConfig, seed: int) -> None:
        self._rows = rows
        self._count = min(len(rows), config.max_rows or len(rows))
        self._epochs = config.epochs
        self._shuffle = config.shuffle
        self._seed = seed
        self._returned: deque[Draw] = deque()
        self.go_on(Cursor())

    @property
    def cursor(self) -> Cursor:
        return self._cursor

    def go_on(self, cursor: Cursor) -> None:
        """Stand where an earlier life of the run stood."""
        self._cursor = cursor
        self._order = self._order_of(cursor.epoch)

    @property
    def exhausted(self) -> bool:
        return not self._returned and self._cursor.epoch >= self._epochs

    def draw(self) -> Draw:
        """The next draw. Only while not `exhausted`."""
        if self._returned:
            return self._returned.popleft()
        epoch, position = self._cursor.epoch, self._cursor.position
        index = self._order[position]
        row = self._rows[index]
        if not isinstance(row, Mapping):
            raise DataError(f"row {index} of the dataset is a {type(row).__name__}. Expected a mapping.")
        if position + 1 < self._count:
            self._cursor = Cursor(epoch, position + 1)
        else:
            self._cursor = Cursor(epoch + 1, 0)
            self._order = self._order_of(epoch + 1)
        return Draw(epoch, index, row)

    def give_back(self, epoch: int, index: int) -> None:
        """This draw shall be handed out again, before all others."""
        self._returned.append(Draw(epoch, index, self._rows[index], again=True))

    def _order_of(self, epoch: int) -> Sequence[int]:
        if not self._shuffle or epoch >= self._epochs:
            return range(self._count)
        order = list(range(self._count))
        random.Random(f"{self._seed}/{epoch}").shuffle(order)
        return order
