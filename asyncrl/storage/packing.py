"""Frames: a few facts and some arrays as bytes that show every fault. No pickle: JSON and plain numbers.

    magic | length of the facts | their crc32 | facts (JSON) | columns, one after the other, each compressed

The facts name the columns, with the crc32 of them all, so that a frame can be passed over without reading its columns.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from asyncrl.errors import DataError

HEAD = struct.Struct("<8sII")
MAGIC = b"asyncrl\x01"
"""Its last byte is the version of the format."""
KINDS = ("|u1", "<u2", "<u4", "<i8", "<f4", "<f8")
FAST = 1
"""Level of zlib: the levels above it take longer and gain a percent or two."""

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Facts:
    """The first part of a frame: everything but the columns."""

    own: Mapping[str, Any]
    """What the writer said."""
    columns: Mapping[str, tuple[str, int]]
    """Kind of number and compressed bytes of each column."""
    crc: int
    """crc32 of the compressed columns."""
    start: int
    """Bytes of the frame before its columns."""

    @property
    def columns_bytes(self) -> int:
        return sum(size for _, size in self.columns.values())

    @property
    def frame_bytes(self) -> int:
        return self.start + self.columns_bytes


class Torn(Exception):
    """The bytes end within the frame: it was being written when the process died."""


def pack(own: Mapping[str, Any], columns: Mapping[str, Array]) -> bytes:
    """One frame. `own` is plain JSON; the columns are arrays of one dimension."""
    packed = {name: zlib.compress(np.ascontiguousarray(column).data, FAST) for name, column in columns.items()}
    body = b"".join(packed.values())
    kinds = {name: (column.dtype.str, len(packed[name])) for name, column in columns.items()}
    assert all(kind in KINDS for kind, _ in kinds.values()), f"no kind of number for a file among {kinds}"
    facts = json.dumps({"own": own, "columns": kinds, "crc": zlib.crc32(body)}, allow_nan=False).encode()
    return HEAD.pack(MAGIC, len(facts), zlib.crc32(facts)) + facts + body


def unpack(frame: bytes) -> tuple[Mapping[str, Any], dict[str, Array]]:
    """What was packed.

    Raises:
        DataError: these are not the bytes that were written.
    """
    try:
        facts = read_facts(frame)
    except Torn:
        raise DataError(f"a frame ends after {len(frame)} bytes, within its facts. Expected all of it.") from None
    return facts.own, read_columns(facts, frame[facts.start :])


def read_facts(data: bytes) -> Facts:
    """Of the frame that `data` begins with.

    Raises:
        Torn: `data` is too short for them.
        DataError: this is no frame, or a damaged one.
    """
    if len(data) < HEAD.size:
        raise Torn
    magic, size, crc = HEAD.unpack_from(data)
    if magic != MAGIC:
        known = magic[:-1] == MAGIC[:-1]
        found = f"format {magic[-1]} of asyncrl, and this version reads {MAGIC[-1]}" if known else "something else"
        raise DataError(f"expected the beginning of a frame, found {found}.")
    text = data[HEAD.size : HEAD.size + size]
    if len(text) < size:
        raise Torn
    if zlib.crc32(text) != crc:
        raise DataError("the facts of a frame are damaged: their checksum is another.")
    read = json.loads(text)
    columns = {name: (kind, size) for name, (kind, size) in read["columns"].items()}
    return Facts(read["own"], columns, read["crc"], HEAD.size + size)


def read_columns(facts: Facts, body: bytes) -> dict[str, Array]:
    """The columns of a frame, out of the bytes after its facts.

    Raises:
        DataError: these are not the bytes that were written.
    """
    if len(body) != facts.columns_bytes or zlib.crc32(body) != facts.crc:
        raise DataError(
            f"the columns of a frame are damaged: found {len(body)} bytes of checksum {zlib.crc32(body)}, expected "
            f"{facts.columns_bytes} of {facts.crc}."
        )
    ends = list(accumulate(size for _, size in facts.columns.values()))
    return {
        name: np.frombuffer(zlib.decompress(body[end - size : end]), dtype=kind)
        for (name, (kind, size)), end in zip(facts.columns.items(), ends, strict=True)
    }


def narrow(numbers: Array) -> Array:
    """The same numbers in a smaller kind that holds each of them exactly, where there is one."""
    if numbers.dtype.kind == "f":
        with np.errstate(over="ignore"):
            single = numbers.astype("<f4")
        return single if np.array_equal(single.astype("<f8").view("<i8"), numbers.view("<i8")) else numbers
    if not numbers.size or numbers.min() < 0:
        return numbers
    highest = int(numbers.max())
    limits = {"|u1": 8, "<u2": 16, "<u4": 32}
    return numbers.astype(next((kind for kind, bits in limits.items() if highest < 1 << bits), "<i8"))
