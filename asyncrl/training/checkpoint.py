"""The state of the trainer on the disk: what training goes on from as if it had never stopped.

    trainer/
        .metadata, __0_0.distcp   weights that are trained, optimizer, randomness (tensor_files.py)
        facts.json                step, what it is of (facts.py), size and checksum of the other files

facts.json comes last: a folder without it is not whole.
"""

from __future__ import annotations

import errno
import json
import shutil
import threading
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import structlog
import torch
from torch import Tensor

from asyncrl.storage.checkpoints import sync, write_file
from asyncrl.training.diagnosis import require_finite
from asyncrl.training.facts import Facts
from asyncrl.training.host_memory import available_bytes
from asyncrl.training.tensor_files import Tree, leaves, write_tensors

FACTS = "facts.json"
FORMAT = 1
OVERHEAD_BYTES = 1 << 14
"""Most that a tensor's header, padding and entry in the index take on the disk."""
COPY_SHARE = 0.5
"""A snapshot may take so much of the memory that is left: rollouts grow, and the disk cache wants some."""
READ_BYTES = 1 << 22

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class State:
    """All that a trainer goes on from. Its tensors are the trainer's own until they are copied."""

    step: int
    facts: Facts
    tensors: Tree

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for _, tensor in leaves(self.tensors))

    @property
    def copy_bytes(self) -> int:
        """What a copy takes: torch pins memory in powers of two."""
        sizes = ((tensor.nbytes, tensor.is_cuda) for _, tensor in leaves(self.tensors))
        return sum(1 << (size - 1).bit_length() if pinned else size for size, pinned in sizes)

    @property
    def on_gpu(self) -> bool:
        return any(tensor.is_cuda for _, tensor in leaves(self.tensors))

    def copy(self) -> State:
        """The same on the host, apart from what is trained on; pinned where it comes from a GPU."""
        copied = State(self.step, self.facts, _copied(self.tensors))
        if self.on_gpu:
            torch.cuda.synchronize()
        return copied

    def write(self, folder: Path) -> None:
        """Write all of it to `folder`, which does not exist yet, down to the disk; or leave nothing behind.

        Raises:
            OSError: the disk is full, or fails.
            TrainerError: a weight is not finite.
        """
        require_finite(self.tensors["model"], f"the state of step {self.step} was not saved")
        folder.mkdir(mode=0o700)
        try:
            write_tensors(self.tensors, folder)
            files = {path.name: checksum(path) for path in sorted(folder.iterdir())}
            facts = {"format": FORMAT, "step": self.step, **asdict(self.facts), "files": files}
            write_file(folder / FACTS, f"{json.dumps(sealed(facts), indent=2)}\n".encode())
            sync(folder)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)  # half a state is of no use, and the disk may be full
            raise


class StateWriter:
    """Writes states beside training. Owns the one copy that is on its way to the disk."""

    def __init__(self, timeout_s: float) -> None:
        """`timeout_s`: how long a state may wait for the one before it."""
        self._timeout_s = timeout_s
        self._thread: threading.Thread | None = None
        self._short_of_memory = False
        self._pinned_bytes = 0  # of the last copy: torch keeps them for the next

    def begin(self, state: State, folder: Path, *, beside: bool = True) -> Future[None]:
        """On return training may go on; the future is done when `state` is on the disk. It carries `OSError`.

        Where memory is short, or not `beside`, all is done on return.
        """
        done: Future[None] = Future()
        done.set_running_or_notify_cancel()  # nobody who gives up waiting can cancel it
        try:
            self._wait_for_the_one_before()
            _refuse_small_disk(state, folder.parent)
            copied = self._copy(state) if beside else None
        except OSError as error:
            done.set_exception(error)
            return done
        write = (copied or state).write
        if copied is None:
            _fulfil(done, write, folder)
        else:
            # A daemon: a disk that never answers cannot keep the process alive.
            self._thread = threading.Thread(
                target=_fulfil, args=(done, write, folder), name="asyncrl-checkpoint", daemon=True
            )
            self._thread.start()
        return done

    def _wait_for_the_one_before(self) -> None:
        if self._thread is None:
            return
        self._thread.join(self._timeout_s)
        if self._thread.is_alive():
            raise TimeoutError(
                errno.ETIMEDOUT,
                f"the checkpoint before is still being written after checkpoint.timeout_s={self._timeout_s:g} s",
            )
        self._thread = None

    def _copy(self, state: State) -> State | None:
        """None: there is no room for a copy."""
        available, needed = available_bytes(), state.copy_bytes - self._pinned_bytes
        if available is None or needed <= COPY_SHARE * available:
            try:
                copied = state.copy()
                self._pinned_bytes = state.copy_bytes if state.on_gpu else 0
                return copied
            except (MemoryError, RuntimeError) as error:  # RuntimeError: no memory to pin
                log.warning("no copy of the weights could be made", error=str(error).splitlines()[0])
        if not self._short_of_memory:
            self._short_of_memory = True
            log.warning(
                "memory is too short for a copy of weights and optimizer: training stands still while they are written",
                needed_gb=round(needed / 1e9, 2),
                available_gb=None if available is None else round(available / 1e9, 2),
            )
        return None


def _copied(tree: Tree) -> Tree:
    return {key: _copy_of(value) if isinstance(value, Tensor) else _copied(value) for key, value in tree.items()}


def _copy_of(tensor: Tensor) -> Tensor:
    if not tensor.is_cuda:
        return tensor.detach().to("cpu", copy=True)
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)


def _fulfil(done: Future[None], write: Callable[[Path], None], folder: Path) -> None:
    try:
        write(folder)
    except BaseException as error:  # carried to whoever waits, whatever it is
        done.set_exception(error)
    else:
        done.set_result(None)


def _refuse_small_disk(state: State, folder: Path) -> None:
    needed = state.nbytes + OVERHEAD_BYTES * (2 + sum(1 for _ in leaves(state.tensors)))
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            errno.ENOSPC, f"No space left: a checkpoint takes {_size(needed)}, and {_size(free)} are free", str(folder)
        )


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def sealed(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The same with a checksum of itself."""
    unsealed = {name: value for name, value in facts.items() if name != "crc32"}
    return {**unsealed, "crc32": zlib.crc32(json.dumps(unsealed, sort_keys=True).encode())}


def checksum(path: Path) -> dict[str, int]:
    """Its size, and a checksum against damage."""
    size = crc = 0
    with path.open("rb") as file:
        while data := file.read(READ_BYTES):
            size, crc = size + len(data), zlib.crc32(data, crc)
    return {"bytes": size, "crc32": crc}
