"""Disks that are full, slow, broken, read-only or gone, under everything that a run writes.

The whole run is real but for its two ends, which draw and train nothing. Whatever the disk does: no checkpoint that is
not whole is ever chosen, the last good one stays, and a run that cannot go on ends with one error that names its
folder.
"""

from __future__ import annotations

import asyncio
import builtins
import errno
import io
import os
import re
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

import asyncrl
from asyncrl import checkpointing
from asyncrl.checkpointing import load_state
from asyncrl.config import Config
from asyncrl.errors import AsyncRLError, EngineError
from asyncrl.metrics.producer import Producer
from asyncrl.result import TrainResult
from asyncrl.run import train_async
from asyncrl.storage.audit_run import audit_run
from asyncrl.storage.checkpoints import Checkpoints
from asyncrl.storage.folder import RunFolder
from asyncrl.testing.fakes import CountingTrainer, ScriptedSampler
from asyncrl.types import Weights
from tests.conftest import SMALL

GROUPS = 2
"""Of one step."""
NO_ROOM = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


async def rollout(prompt: asyncrl.Prompt) -> asyncrl.RolloutSample:
    completion = await prompt.policy.generate([1, 2], max_tokens=4)
    return asyncrl.RolloutSample.from_completion([1, 2], completion, prompt.rng.random(), row=prompt["n"])


def full(*arguments: Any) -> None:
    raise NO_ROOM


def writes_checkpoint(task: asyncio.Task[Any]) -> bool:
    return task.get_name().startswith("asyncrl checkpoint")


class Ends:
    """The fake trainer and sampler of the runs of a test; what is set here happens in them."""

    def __init__(self) -> None:
        self.before_step: Callable[[int], None] = lambda step: None
        self.patient = False
        """Each step waits until the checkpoint of the one before is on the disk, so that every step has one."""
        self.saving_model: OSError | None = None
        self.publishing: OSError | None = None
        self.trainer: CountingTrainer | None = None

    def make_trainer(self, config: Config, **options: Any) -> CountingTrainer:
        ends = self

        class Trainer(CountingTrainer):
            async def forward_backward(self, sequences: Any) -> None:
                if ends.patient and (writing := list(filter(writes_checkpoint, asyncio.all_tasks()))):
                    await asyncio.wait(writing)
                ends.before_step(self.step + 1)
                await super().forward_backward(sequences)

            async def save_weights_for_sampler(self) -> Weights:
                if ends.publishing is not None:
                    raise ends.publishing
                return await super().save_weights_for_sampler()

            async def save_model(self, folder: Path) -> None:
                if ends.saving_model is not None:
                    raise ends.saving_model
                folder.mkdir(exist_ok=True)  # noqa: ASYNC240 - as real trainers do

        self.trainer = Trainer(step_s=lambda: 0.002)
        return self.trainer

    @asynccontextmanager
    async def open_sampler(self, *args: Any) -> AsyncIterator[ScriptedSampler]:
        async with ScriptedSampler(latency_s=lambda request: 0.001) as sampler:
            yield sampler


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> Ends:
    ends = Ends()
    monkeypatch.setattr("asyncrl.training.thread.ThreadedTrainer", ends.make_trainer)
    monkeypatch.setattr("asyncrl.training_run.open_sampler", ends.open_sampler)
    return ends


Train = Callable[..., Any]


@pytest.fixture
def train(model: Path, ends: Ends) -> Train:
    """Trains so many steps in a folder, or goes on there."""

    async def train(folder: Path, steps: int, *, resume: bool = False, **settings: Any) -> TrainResult:
        config = Config(
            **SMALL
            | {
                "model": str(model),
                "run_dir": folder,
                "prompt_groups_per_step": GROUPS,
                "data": {"epochs": 100},
                "checkpoint": {"interval": 1},
                "publish": {"canary": False},
                "max_steps": steps,
            }
            | settings
        )
        rows = [{"n": n} for n in range(50)]
        return await train_async(rollout, dataset=rows, config=config, resume=resume, view="plain")

    return train


def newest(folder: Path) -> int:
    """The step of the checkpoint that a resume would choose; all of it can be read."""
    checkpoint = Checkpoints(folder).latest()
    if checkpoint is None:
        return 0
    state = load_state(checkpoint)
    assert state.step == state.loop["step"] == checkpoint.step
    return checkpoint.step


async def assert_goes_on(train: Train, folder: Path, steps: int, **settings: Any) -> None:
    """A resume finds all in order, and comes to the end."""
    result = await train(folder, steps, resume=True, **settings)
    assert result.steps == steps == newest(folder)
    audit = audit_run(folder)
    assert not audit.faults, audit.faults


# Checkpoints


class Disk:
    """Lets every second checkpoint fail, each at an operation on its files at which none has failed yet."""

    PATCHED = ((builtins, "open"), (io, "open"), (os, "mkdir"), (os, "rename"), (os, "replace"), (os, "fsync"))
    FAULTS = (errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT)

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.folder = folder
        self.attempts = 0
        self.operations: Counter[str] = Counter()
        """Of this attempt, and how often."""
        self.failed: list[str] = []
        self._failing = False
        self._lock = threading.Lock()
        for module, name in self.PATCHED:
            monkeypatch.setattr(module, name, self._guarded(name, getattr(module, name)))

    def _guarded(self, name: str, operation: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(target: Any, *arguments: Any, **options: Any) -> Any:
            path = str(target)
            if name == "fsync":
                path = os.readlink(f"/proc/self/fd/{target}")
            if name == "mkdir" and path.endswith("/checkpoints"):  # it is there
                return operation(target, *arguments, **options)
            writes = name != "open" or not str(arguments[0] if arguments else "r").startswith("r")
            if writes and path.startswith(str(self.folder / "checkpoints")):
                self._count(name, path)
            return operation(target, *arguments, **options)

        return guarded

    def _count(self, name: str, path: str) -> None:
        with self._lock:
            if name == "mkdir" and path.endswith(".unfinished"):
                self.attempts += 1
                self.operations.clear()
                self._failing = self.attempts % 2 == 0
            operation = f"{name} {re.sub('[0-9]+', 'N', Path(path).name)}"
            self.operations[operation] += 1
            operation += f" {self.operations[operation]}"
            if self._failing and operation not in self.failed:
                self._failing = False
                fault = self.FAULTS[len(self.failed) % len(self.FAULTS)]
                self.failed.append(operation)
                raise OSError(fault, os.strerror(fault), path)


@pytest.mark.skipif(sys.platform != "linux", reason="the path of a file descriptor is asked of /proc")
async def test_a_checkpoint_that_fails_at_any_operation_costs_itself_alone(
    train: Train, ends: Ends, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, steps = tmp_path / "run", 70
    disk = Disk(monkeypatch, folder)
    chosen: list[int] = []

    def look(step: int) -> None:
        chosen.append(newest(folder))

    ends.before_step, ends.patient = look, True
    result = await train(folder, steps)
    assert result.steps == steps
    assert chosen == sorted(chosen), "the last good one stays"
    assert newest(folder) == steps
    assert len(set(chosen)) > disk.attempts // 3, "those between the faults were written"
    kinds = {failed.split()[0] for failed in disk.failed}
    assert kinds == {"open", "mkdir", "rename", "fsync"}
    files = ("groups.bin", "state.json", "manifest.json", "checkpoints.jsonl")
    assert {f"open {file} 1" for file in files} <= set(disk.failed)
    out, err = capsys.readouterr()
    told = out.count("could not be written") + err.count("could not be removed")
    assert told == len(disk.failed), (disk.failed, out)
    assert not list((folder / "checkpoints").glob("*.unfinished"))
    monkeypatch.undo()


async def test_a_run_goes_on_from_beside_a_failed_checkpoint(
    train: Train, ends: Ends, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, ends.patient = tmp_path / "run", True
    original = Checkpoints.commit

    def fails_from_six(self: Checkpoints, step: int, entry: Any) -> Any:
        if step >= 6:
            raise NO_ROOM
        return original(self, step, entry)

    with monkeypatch.context() as patched:
        patched.setattr(Checkpoints, "commit", fails_from_six)
        result = await train(folder, 9)
    assert result.steps == 9
    assert newest(folder) == 5
    await assert_goes_on(train, folder, 12)


async def test_training_does_not_wait_for_a_slow_disk(
    train: Train, ends: Ends, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first checkpoint is not on the disk before eight more steps have been taken."""
    folder, taken = tmp_path / "run", threading.Event()
    original = Checkpoints.commit
    late: list[bool] = []

    def slow(self: Checkpoints, step: int, entry: Any) -> Any:
        late.append(taken.wait(30))
        return original(self, step, entry)

    def count(step: int) -> None:
        if step == 8:
            taken.set()

    ends.before_step = count
    monkeypatch.setattr(Checkpoints, "commit", slow)
    monkeypatch.setattr(checkpointing, "LEAST_S", 0.0)
    await train(folder, 12, checkpoint={"interval": None})
    assert all(late), "nothing stood still for the disk"
    assert newest(folder) == 12
    assert audit_run(folder).faults == []


async def test_a_disk_that_takes_no_checkpoint_for_too_long_ends_the_run(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, forever = tmp_path / "run", threading.Event()
    monkeypatch.setattr(Checkpoints, "commit", lambda *args: forever.wait(60))
    try:
        with pytest.raises(EngineError, match=rf"checkpoint.timeout_s=0.5.*{folder}"):
            await train(folder, 10_000, checkpoint={"interval": 1, "timeout_s": 0.5})
    finally:
        forever.set()
    assert newest(folder) == 0


@pytest.mark.parametrize("harm", ["truncated", "missing"])
async def test_a_damaged_checkpoint_is_passed_over(train: Train, ends: Ends, tmp_path: Path, harm: str) -> None:
    folder, ends.patient = tmp_path / "run", True
    await train(folder, 6)
    checkpoints = Checkpoints(folder)
    (*_, last) = checkpoints.all()
    files = [path for path in sorted(last.folder.rglob("*")) if path.is_file()]
    assert len(files) >= 4
    for file in files:
        content = file.read_bytes()
        if harm == "missing":
            file.unlink()
        else:
            file.write_bytes(content[:-1])
        assert newest(folder) == 5, file
        file.write_bytes(content)
    assert newest(folder) == 6
    (last.folder / "state.json").unlink()
    await assert_goes_on(train, folder, 8)


# Everything else


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full is asked for")
@pytest.mark.parametrize("file", ["metrics.jsonl", "rollouts.jsonl", "logs/asyncrl.jsonl"])
async def test_a_full_disk_ends_the_run_with_its_folder_named(train: Train, tmp_path: Path, file: str) -> None:
    folder = tmp_path / "run"
    (folder / "logs").mkdir(parents=True)
    (folder / file).symlink_to("/dev/full")
    with pytest.raises(EngineError, match=rf"{folder}.* cannot be written: No space left on device"):
        await train(folder, 30)


@pytest.mark.parametrize("how", [shutil.rmtree, lambda folder: folder.rename(folder.with_name("elsewhere"))])
async def test_a_run_folder_that_vanishes_ends_the_run(
    train: Train, ends: Ends, tmp_path: Path, how: Callable[[Path], object]
) -> None:
    folder = tmp_path / "run"
    ends.before_step = lambda step: how(folder) if step == 4 else None
    with pytest.raises(EngineError, match=rf"{folder}") as ended:
        await train(folder, 10_000)
    assert ends.trainer is not None
    assert ends.trainer.step < 9_000
    assert any(word in str(ended.value) for word in ("gone", "removed", "cannot be written"))


@pytest.mark.parametrize("what", ["saving_model", "publishing"])
async def test_what_was_trained_is_kept_when_weights_cannot_be_written(
    train: Train, ends: Ends, tmp_path: Path, what: str
) -> None:
    folder = tmp_path / "run"

    def break_at(step: int) -> None:
        if step == 4:
            setattr(ends, what, NO_ROOM)

    ends.before_step = break_at
    with pytest.raises(EngineError, match=rf"{folder}.*cannot be written: No space left"):
        await train(folder, 6)
    assert newest(folder) >= 3
    ends.before_step, ends.saving_model, ends.publishing = lambda step: None, None, None
    shutil.rmtree(folder / "model", ignore_errors=True)
    await assert_goes_on(train, folder, 9)


async def test_a_disk_too_full_for_the_summary_is_one_clear_error(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(RunFolder, "write_summary", full)
        with pytest.raises(EngineError, match=rf"{folder}.*cannot be written: No space left"):
            await train(folder, 3)
    assert newest(folder) == 3
    with monkeypatch.context() as patched:
        patched.setattr(RunFolder, "begin_life", full)
        with pytest.raises(EngineError, match=rf"{folder}.*cannot be written: No space left"):
            await train(folder, 5, resume=True)
    await assert_goes_on(train, folder, 5)


async def test_what_was_trained_is_kept_when_the_last_records_cannot_be_written(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    monkeypatch.setattr(Producer, "close", full)
    with pytest.raises(EngineError, match=rf"{folder}.*cannot be written: No space left"):
        await train(folder, 3, checkpoint={"interval": 0})
    assert newest(folder) == 3
    assert (folder / "model").is_dir()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """One megabyte."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True, check=False
    )
    if not mounted or mounted.returncode:
        pytest.skip("this process may not mount a small disk")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def make_room(disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)


async def test_a_run_that_filled_its_disk_goes_on_when_there_is_room(train: Train, small_disk: Path) -> None:
    folder = small_disk / "run"
    with pytest.raises(AsyncRLError, match=r"(?s)disk/run.*(No space left|disk is full)"):
        await train(folder, 10_000)
    there = newest(folder)
    assert there > 0
    make_room(small_disk)
    await assert_goes_on(train, folder, there + 10)


REAL_RUN = """
import resource, sys
import asyncrl
from tests.conftest import SMALL
from tests.durability.test_disks import rollout

resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))
config = asyncrl.Config(**SMALL, model=sys.argv[1], run_dir=sys.argv[2], save_model=False, checkpoint={"interval": 1})
asyncrl.train(rollout, dataset=[{"n": n} for n in range(12)], config=config, view="plain")
"""


def test_the_real_trainers_files_do_not_fit(model: Path, tmp_path: Path) -> None:
    """Weights and optimizer are larger than a file may be. The run goes on, says so, and leaves nothing half-done."""
    folder = tmp_path / "run"
    limit = (model / "model.safetensors").stat().st_size
    done = subprocess.run(
        [sys.executable, "-c", REAL_RUN, str(model), str(folder), str(limit)],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "the checkpoint of step 1 could not be written (File too large); there is none yet" in done.stdout
    assert newest(folder) == 0
    assert not list((folder / "checkpoints").iterdir())
    assert audit_run(folder).faults == []
