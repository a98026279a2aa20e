"""The trainer's state on the disk: it goes on bit by bit, beside training, and a bad disk costs no good file."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import threading
from collections import namedtuple
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from structlog.testing import capture_logs
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from asyncrl.config import Config
from asyncrl.errors import TrainerError
from asyncrl.training import checkpoint, host_memory
from asyncrl.training.optimizer import optimizer_tensors
from asyncrl.training.tensor_files import Tree, leaves
from asyncrl.training.trainer import TorchTrainer
from tests.training.cases import make_trainer, model_folder, token_lists, train_sequences, weights

TOKENS = token_lists(5, (40,))
SETTINGS: dict[str, dict[str, Any]] = {
    "full, with a KL": {},
    "adapter, with a KL": {"lora": {"rank": 4}},
    "schedule": {"optimizer": {"learning_rate": 1e-2, "schedule": "cosine", "warmup_steps": 2}, "policy_loss": "dapo"},
    "8 bits": {"optimizer": {"learning_rate": 1e-2, "state_bits": 8}},
    "gspo": {"policy_loss": "gspo", "trainer": {"share_prompts": False}},
}


def train(trainer: TorchTrainer, *seeds: int) -> list[dict[str, float]]:
    """One optimizer step per seed; their metrics, without times."""
    metrics = []
    for seed in seeds:
        trainer.forward_backward(train_sequences(seed, (20, 9, 14)))
        found = trainer.optim_step().metrics
        metrics.append({name: value for name, value in found.items() if not name.endswith("_s")})
    return metrics


def tensors(trainer: TorchTrainer) -> dict[str, torch.Tensor]:
    named = {name: w for name, w in trainer.policy.causal_lm.named_parameters() if w.requires_grad}
    tree: Tree = {"model": weights(trainer), "optimizer": optimizer_tensors(trainer._optimizer, named)}
    return {".".join(path): tensor.detach().clone() for path, tensor in leaves(tree)}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def fresh(settings: dict[str, Any]) -> TorchTrainer:
    settings = {"optimizer": {"learning_rate": 1e-2}, **settings}
    config = Config(model=model_folder("llama"), **settings)
    return TorchTrainer(config, total_steps=9, weights_format="tensors")


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_it_goes_on_bit_by_bit(settings: dict[str, Any], tmp_path: Path) -> None:
    if settings.get("optimizer", {}).get("state_bits") == 8:
        pytest.importorskip("bitsandbytes")
    undisturbed = fresh(settings)
    train(undisturbed, 1, 2, 3)
    undisturbed.save_state(tmp_path / "state")
    expected = train(undisturbed, 4, 5)

    resumed = fresh(settings)
    train(resumed, 9)  # what it did before does not matter
    resumed.forward_backward(train_sequences(8, (12,)))  # nor what it had begun
    assert resumed.load_state_with_optimizer(tmp_path / "state") == resumed.step == 3
    assert train(resumed, 4, 5) == expected
    assert same(tensors(resumed), tensors(undisturbed))


def test_a_warm_start_goes_on_bit_by_bit(tmp_path: Path) -> None:
    first = make_trainer(lora={"rank": 4})
    train(first, 1)
    first.save_model(tmp_path / "adapter")
    settings: dict[str, Any] = {"lora": {"warm_start": tmp_path / "adapter"}, "loss": {"kl_beta": 0.1}}
    undisturbed = make_trainer(**settings)
    train(undisturbed, 1, 2)
    undisturbed.save_state(tmp_path / "state")
    expected = train(undisturbed, 4, 5)

    resumed = make_trainer(**settings)
    assert resumed.load_state_with_optimizer(tmp_path / "state") == 2
    assert train(resumed, 4, 5) == expected, "the KL refers to the adapter that was given, not to the one resumed"
    assert same(tensors(resumed), tensors(undisturbed))


def test_before_the_first_step(tmp_path: Path) -> None:
    trainer = make_trainer()
    trainer.save_state(tmp_path / "state")
    expected = train(trainer, 1)
    other = make_trainer()
    train(other, 2, 3)
    assert other.load_state_with_optimizer(tmp_path / "state") == 0
    assert train(other, 1) == expected


def test_randomness_goes_on(tmp_path: Path) -> None:
    trainer = make_trainer()
    torch.manual_seed(3)
    trainer.save_state(tmp_path / "state")
    expected = torch.rand(4)
    torch.manual_seed(4)
    trainer.load_state_with_optimizer(tmp_path / "state")
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize("rank", [0, 4])
def test_weights_alone_are_a_new_start(rank: int, tmp_path: Path) -> None:
    """Step 0, no moments, and a KL of 0: it refers to the weights that were loaded."""
    old = make_trainer(lora={"rank": rank})
    train(old, 1, 2)
    old.save_state(tmp_path / "state")
    new = make_trainer(lora={"rank": rank}, loss={"kl_beta": 0.1})
    train(new, 7)
    new.load_state(tmp_path / "state")
    assert new.step == 0
    assert same(weights(new), weights(old))
    assert not new._optimizer.state
    assert train(new, 3)[0]["ref_kld"] == pytest.approx(0, abs=1e-7)
    assert train(new, 4)[0]["ref_kld"] > 1e-4


def test_other_tools_read_it(tmp_path: Path) -> None:
    """It is the format of torch.distributed.checkpoint."""
    trainer = make_trainer()
    train(trainer, 1)
    trainer.save_state(tmp_path / "state")
    dcp_to_torch_save(tmp_path / "state", tmp_path / "one.pt")
    found = torch.load(tmp_path / "one.pt", weights_only=True)
    assert set(found) == {"model", "optimizer", "randomness"}
    assert same(found["model"], weights(trainer))
    assert set(next(iter(found["optimizer"].values()))) == {"step", "exp_avg", "exp_avg_sq"}


def test_only_the_owner_can_look_inside_and_no_path_is_written(tmp_path: Path) -> None:
    trainer = make_trainer()
    trainer.save_state(tmp_path / "state")
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o700
    assert str(tmp_path).encode() not in (tmp_path / "state" / ".metadata").read_bytes()


# Beside training


@contextmanager
def held_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Nothing comes to the disk until the event is set."""
    release, honest = threading.Event(), checkpoint.write_tensors

    def slow(tree: Tree, folder: Path) -> None:
        release.wait(20)
        honest(tree, folder)

    monkeypatch.setattr(checkpoint, "write_tensors", slow)
    try:
        yield release
    finally:
        release.set()


def test_training_goes_on_while_a_slow_disk_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer()
    train(trainer, 1)
    expected = tensors(trainer)
    with held_disk(monkeypatch) as release:
        written = trainer.begin_save_state(tmp_path / "state")
        train(trainer, 2, 3)
        assert not written.done()
        release.set()
        written.result(timeout=20)
    assert not same(tensors(trainer), expected)
    assert trainer.load_state_with_optimizer(tmp_path / "state") == 1
    assert same(tensors(trainer), expected), "what is written is the copy"


def test_one_copy_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(checkpoint={"timeout_s": 0.05})
    with held_disk(monkeypatch) as release:
        first = trainer.begin_save_state(tmp_path / "first")
        second = trainer.begin_save_state(tmp_path / "second")
        with pytest.raises(TimeoutError, match=r"the checkpoint before .* checkpoint\.timeout_s=0\.05 s"):
            second.result(timeout=20)
        release.set()
        first.result(timeout=20)
    assert not (tmp_path / "second").exists()


def test_the_second_waits_for_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer()
    with held_disk(monkeypatch) as release:
        first = trainer.begin_save_state(tmp_path / "first")
        threading.Timer(0.05, release.set).start()
        second = trainer.begin_save_state(tmp_path / "second")
        assert first.done()
        second.result(timeout=20)
    assert (tmp_path / "second" / "facts.json").exists()


def test_without_memory_for_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is written at once, and said once."""
    trainer = make_trainer()
    train(trainer, 1)
    monkeypatch.setattr(checkpoint, "available_bytes", lambda: 1000)
    with capture_logs() as logs:
        for name in ("one", "two"):
            written = trainer.begin_save_state(tmp_path / name)
            assert written.done()
            written.result()
    assert ["memory is too short" in entry["event"] for entry in logs] == [True]
    assert trainer.load_state_with_optimizer(tmp_path / "two") == 1


def test_memory_that_cannot_be_had_after_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(state: object) -> None:
        raise RuntimeError("CUDA error: out of memory\nat cudaHostAlloc")

    monkeypatch.setattr(checkpoint.State, "copy", refuse)
    trainer = make_trainer()
    with capture_logs() as logs:
        trainer.begin_save_state(tmp_path / "state").result(timeout=0)
    assert [entry.get("error") for entry in logs] == ["CUDA error: out of memory", None]


# Bad disks, bad weights

Usage = namedtuple("Usage", "total used free")


def test_a_disk_that_is_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9 - 5 * 10**4, 5 * 10**4))
    for save in (trainer.save_state, lambda folder: trainer.begin_save_state(folder).result()):
        with pytest.raises(OSError, match=r"No space left: a checkpoint takes .* MB, and 0\.1 MB are free") as found:
            save(tmp_path / "state")
        assert found.value.errno == errno.ENOSPC
    assert not (tmp_path / "state").exists()


@contextmanager
def files_at_most(size: int) -> Iterator[None]:
    """The system refuses to write more into a file (EFBIG)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_fails_half_way(tmp_path: Path) -> None:
    trainer = make_trainer()
    train(trainer, 1)
    written = trainer.begin_save_state(tmp_path / "good")
    written.result(timeout=20)
    with files_at_most(100_000), pytest.raises(OSError, match="too large") as found:
        trainer.save_state(tmp_path / "state")
    assert found.value.errno == errno.EFBIG
    assert os.listdir(tmp_path) == ["good"], "half a state takes no room"
    trainer.save_state(tmp_path / "state")


@pytest.mark.parametrize("taken", ["exists", "no parent"])
def test_a_folder_that_cannot_be_made(taken: str, tmp_path: Path) -> None:
    folder = tmp_path if taken == "exists" else tmp_path / "gone" / "state"
    trainer = make_trainer()
    with pytest.raises(FileExistsError if taken == "exists" else FileNotFoundError):
        trainer.save_state(folder)
    assert tmp_path.is_dir()
    assert not (tmp_path / "gone").exists(), "a run folder that vanished stays so"


def test_weights_that_are_not_finite(tmp_path: Path) -> None:
    trainer = make_trainer()
    name, weight = next(iter(trainer.policy.causal_lm.named_parameters()))
    weight.data[0, 0] = torch.nan
    with pytest.raises(TrainerError, match=f"step 0 was not saved: {name} is not finite"):
        trainer.begin_save_state(tmp_path / "state").result(timeout=20)
    assert not (tmp_path / "state").exists()


def test_an_update_that_broke_off_is_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer()
    trainer.save_state(tmp_path / "good")
    expected = tensors(trainer)

    def half(*_: object) -> None:
        next(iter(trainer.policy.causal_lm.parameters())).data.add_(1)
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(trainer._optimizer, "step", half)
        with pytest.raises(TrainerError, match=r"ran out of memory in the update of optimizer step 1"):
            train(trainer, 1)
    for save in (trainer.save_state, trainer.save_model):
        with pytest.raises(TrainerError, match="step 1 failed half way"):
            save(tmp_path / "state")
    trainer.load_state_with_optimizer(tmp_path / "good")
    assert same(tensors(trainer), expected)
    trainer.save_state(tmp_path / "state")


# Memory


@pytest.mark.parametrize(
    ("limit", "expected"), [(None, 8000 * 1024), ("max", 8000 * 1024), ("3000000", 2_100_000), ("1000", 0)]
)
def test_memory_that_is_left(limit: str | None, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of the machine, and of the container: what its cache holds can be had back."""
    (tmp_path / "meminfo").write_text("MemTotal:  9000 kB\nMemAvailable:   8000 kB\n")
    (tmp_path / "cgroup").write_text("0::/job/step\n")
    (tmp_path / "groups" / "job" / "step").mkdir(parents=True)
    if limit is not None:
        (tmp_path / "groups" / "job" / "memory.max").write_text(f"{limit}\n")
        (tmp_path / "groups" / "job" / "memory.current").write_text("1000000\n")
        (tmp_path / "groups" / "job" / "memory.stat").write_text("anon 5\ninactive_file 100000\n")
    for name, path in {"SYSTEM": "meminfo", "OWN_GROUP": "cgroup", "GROUPS": "groups"}.items():
        monkeypatch.setattr(host_memory, name, tmp_path / path)
    assert host_memory.available_bytes() == expected


def test_memory_on_another_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "SYSTEM", tmp_path / "none")
    assert host_memory.available_bytes() is None
