"""Trees of tensors as files in the format of torch.distributed.checkpoint (DCP), written and read by one process.

    {"model": {name: Tensor}, "optimizer": {name: {key: Tensor}}, ...}  <->  .metadata, __0_0.distcp

DCP's planner, writer and reader are called one by one here, and not through its `save` and `load`. Those warn where
there is no process group, hide an OSError in an exception that is not even an `Exception`, and unpickle whatever a
checkpoint holds. A tree has tensors only, so nothing in it needs a pickle, but for `.metadata`: DCP's own index.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.planner import ReadItem

Tree = dict[str, Any]
"""Of dicts, with names as keys, down to tensors."""

INDEX = ".metadata"

KNOWN: dict[tuple[str, str], Any] = {
    **{
        (kind.__module__, kind.__qualname__): kind
        for kind in (
            dcp.Metadata,
            dcp.TensorStorageMetadata,
            dcp.TensorProperties,
            dcp.ChunkStorageMetadata,
            dcp.MetadataIndex,
            dcp.StorageMeta,
            dcp._MEM_FORMAT_ENCODING,
            _StorageInfo,
            torch.Size,
        )
    },
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    **{("torch", name): value for name, value in vars(torch).items() if isinstance(value, torch.dtype)},
}
"""All that the index of a tree of tensors names. `BytesStorageMetadata` is not among them: DCP unpickles such bytes."""


def leaves(tree: Mapping[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    """Every tensor of a tree, with the keys that lead to it."""
    for key, value in tree.items():
        if isinstance(value, Tensor):
            yield (*above, key), value
        else:
            yield from leaves(value, (*above, key))


def write_tensors(tree: Tree, folder: Path) -> None:
    """Write `tree` into `folder`, which exists and is empty; every file is synced to the disk. Raises `OSError`."""
    planner = DefaultSavePlanner()
    writer = _Writer(folder, sync_files=True, per_thread_copy_ahead=0)
    planner.set_up_planner(tree, is_coordinator=True)
    writer.set_up_storage_writer(is_coordinator=True)
    plans, metadata = planner.create_global_plan([writer.prepare_local_plan(planner.create_local_plan())])
    (plan,) = writer.prepare_global_plan(plans)
    try:
        results = writer.write_data(planner.finish_plan(plan), planner).wait()
    except RuntimeError as error:  # of torch's serializer, about a write that had raised already
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise
    writer.finish(metadata, [results])


def read_index(folder: Path) -> dcp.Metadata:
    """What the tree in `folder` holds, without its tensors. Raises whatever damaged bytes can raise."""
    return _Reader(folder).read_metadata()


def read_tensors(tree: Tree, folder: Path, index: dcp.Metadata) -> None:
    """Fill the tensors of `tree`, in place, with those of the same names in `folder`.

    Raises whatever damaged bytes can raise; `tree` may be filled in part then.
    """
    planner, reader = _Planner(), _Reader(folder)
    planner.set_up_planner(tree, index, is_coordinator=True)
    reader.set_up_storage_reader(index, is_coordinator=True)
    plans = planner.create_global_plan([reader.prepare_local_plan(planner.create_local_plan())])
    (plan,) = reader.prepare_global_plan(plans)
    reader.read_data(planner.finish_plan(plan), planner).wait()


class _Writer(FileSystemWriter):
    def storage_meta(self) -> dcp.StorageMeta:
        """Without the path: the folder is renamed once it is whole, and may be moved."""
        return dcp.StorageMeta()


class _Planner(DefaultLoadPlanner):
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> NoReturn:
        raise pickle.UnpicklingError(f"{read_item.dest_index.fqn} is no tensor")


class _Reader(FileSystemReader):
    """Reads an index of tensors, and files of the same folder."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> dcp.Metadata:
        with (Path(self.path) / INDEX).open("rb") as file:
            found = _Unpickler(file).load()
        if not isinstance(found, dcp.Metadata):
            raise pickle.UnpicklingError(f"{INDEX} holds a {type(found).__name__}")
        for name, entry in found.state_dict_metadata.items():
            if not isinstance(entry, dcp.TensorStorageMetadata):
                raise pickle.UnpicklingError(f"{name} is no tensor")
        for place in found.storage_data.values():
            if Path(place.relative_path).name != place.relative_path:
                raise pickle.UnpicklingError(f"{INDEX} names a file of another folder: {place.relative_path!r}")
        return found


class _Unpickler(pickle.Unpickler):
    """Makes the objects of `KNOWN`, and calls nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return KNOWN[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"{INDEX} asks for {module}.{name}, which is no part of an index") from None
