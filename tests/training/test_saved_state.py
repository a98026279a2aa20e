"""What a trainer refuses to go on from: each by name, with what to do; and nothing in it is ever run."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import metadata as dcp

from asyncrl.config import Config
from asyncrl.errors import CheckpointError
from asyncrl.training.checkpoint import checksum, sealed
from asyncrl.training.trainer import TorchTrainer
from tests.training.cases import fresh_model, make_trainer, model_folder, train_sequences, weights


def refusal(trainer: TorchTrainer, folder: Path, *, weights_alone: bool = False) -> str:
    """Its message; the trainer stays as it was."""
    before, step = weights(trainer), trainer.step
    with pytest.raises(CheckpointError) as found:
        (trainer.load_state if weights_alone else trainer.load_state_with_optimizer)(folder)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(trainer).items())
    assert trainer.step == step
    return str(found.value)


def saved(folder: Path, **settings: Any) -> Path:
    trainer = make_trainer(**settings)
    trainer.forward_backward(train_sequences(0, (9, 7)))
    trainer.optim_step()
    trainer.save_state(folder)
    return folder


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("saved") / "full")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("saved") / "adapter", lora={"rank": 4})


# Misuse


@pytest.mark.parametrize("weights_alone", [False, True])
@pytest.mark.parametrize(("rank", "kind", "setting"), [(0, "model", "model="), (4, "adapter", "lora.warm_start=")])
@pytest.mark.parametrize("published", [False, True])
def test_a_sampler_snapshot(
    tmp_path: Path, rank: int, kind: str, setting: str, published: bool, weights_alone: bool
) -> None:
    trainer = make_trainer(publish_folder=tmp_path / "weights", lora={"rank": rank})
    folder = tmp_path / "model"
    if published:
        sent = trainer.save_weights_for_sampler().folder
        assert sent is not None
        folder = sent
    else:
        trainer.save_model(folder)
    message = refusal(trainer, folder, weights_alone=weights_alone)
    assert f"{folder} is a sampler snapshot: an exported {kind}, with no optimizer state" in message
    assert f"start a new run with {setting}{str(folder)!r}" in message


@pytest.mark.parametrize("weights_alone", [False, True])
def test_another_model(full: Path, weights_alone: bool) -> None:
    message = refusal(make_trainer("qwen3"), full, weights_alone=weights_alone)
    assert "it is of another model" in message
    assert f"made from {model_folder('llama')!r} (LlamaForCausalLM)" in message
    assert f"{model_folder('qwen3')!r} (Qwen3ForCausalLM)" in message
    assert f"Set model={model_folder('llama')!r}" in message


def sibling(folder: Path) -> Path:
    """The same shapes, other values."""
    model = fresh_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1.01)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("weights_alone", [False, True])
def test_an_adapter_of_another_base(adapter: Path, tmp_path: Path, weights_alone: bool) -> None:
    config = Config(model=str(sibling(tmp_path / "sibling")), lora={"rank": 4})
    trainer = TorchTrainer(config, total_steps=None, weights_format="tensors")
    message = refusal(trainer, adapter, weights_alone=weights_alone)
    assert "another model" in message
    assert "the shapes are the same, but not the values" in message


def test_a_full_model_from_another_start(full: Path, tmp_path: Path) -> None:
    """The KL of a resumed run refers to where it began; a new start has all weights from the checkpoint."""
    config = Config(model=str(sibling(tmp_path / "sibling")))
    trainer = TorchTrainer(config, total_steps=None, weights_format="tensors")
    assert "not the values that training began from" in refusal(trainer, full)
    trainer.load_state(full)


@pytest.mark.parametrize("weights_alone", [False, True])
@pytest.mark.parametrize(
    ("lora", "parts"),
    [
        ({"rank": 8}, ("of an adapter of LoRA rank 4 (alpha 32, on all-linear)", "adapter of LoRA rank 8")),
        ({"rank": 4, "alpha": 8}, ("(alpha 32, on all-linear)", "(alpha 8, on all-linear)")),
        ({"rank": 4, "targets": ["q_proj", "v_proj"]}, ("on all-linear)", "on q_proj, v_proj)")),
        ({}, ("of an adapter of LoRA rank 4", "this run trains a full model")),
    ],
)
def test_another_adapter(adapter: Path, lora: dict[str, Any], parts: tuple[str, str], weights_alone: bool) -> None:
    message = refusal(make_trainer(lora=lora), adapter, weights_alone=weights_alone)
    assert all(part in message for part in parts)
    assert "Set lora.rank=4, lora.alpha=32 and lora.targets=all-linear" in message


def test_a_full_model_for_an_adapter(full: Path) -> None:
    message = refusal(make_trainer(lora={"rank": 4}), full)
    assert "it is of a full model, and this run trains an adapter of LoRA rank 4" in message
    assert "Set lora.rank=0" in message


def test_a_kl_to_other_weights(tmp_path: Path) -> None:
    """Of a run that began from another's weights: those are needed again, and first."""
    settings: dict[str, Any] = {"loss": {"kl_beta": 0.1}}
    first = saved(tmp_path / "first", **settings)
    run = make_trainer(**settings)
    run.load_state(first)
    run.save_state(tmp_path / "state")

    resumed = make_trainer(**settings)
    message = refusal(resumed, tmp_path / "state")
    assert "the weights that it began from, which its KL refers to" in message
    assert "Set lora.warm_start or checkpoint.init_from as it was" in message
    make_trainer(loss={"kl_beta": 0}).load_state_with_optimizer(tmp_path / "state")
    resumed.load_state(first)
    resumed.load_state_with_optimizer(tmp_path / "state")


@pytest.mark.parametrize("lora", [{"rank": 4}, {}])
def test_a_kl_to_the_base_model(lora: dict[str, Any], tmp_path: Path) -> None:
    """That is the same for every seed of a fresh adapter; not for one that went on from another's weights."""
    settings: dict[str, Any] = {"loss": {"kl_beta": 0.1}, "lora": lora}
    state = saved(tmp_path / "state", **settings)
    resumed = make_trainer(**settings, seed=5)
    resumed.load_state_with_optimizer(state)
    resumed.load_state(state)
    assert "which its KL refers to" in refusal(resumed, state)


def test_another_optimizer(full: Path) -> None:
    pytest.importorskip("bitsandbytes")
    trainer = make_trainer(optimizer={"state_bits": 8})
    message = refusal(trainer, full)
    assert "its optimizer is AdamW in 32 bits, and that of this run AdamW in 8 bits" in message
    trainer.load_state(full)


def test_the_same_adapter_by_other_names(adapter: Path) -> None:
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert make_trainer(lora={"rank": 4, "targets": targets}).load_state_with_optimizer(adapter) == 1


# Not there, not whole


def test_what_is_no_state(tmp_path: Path) -> None:
    trainer = make_trainer()
    assert "found no such folder" in refusal(trainer, tmp_path / "none")
    (tmp_path / "notes.txt").write_text("")
    message = refusal(trainer, tmp_path)
    assert "expected facts.json in it, found ['notes.txt']" in message


FILES = (".metadata", "__0_0.distcp", "facts.json")


def truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x40
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [truncated, flipped, os.remove])
@pytest.mark.parametrize("name", FILES)
def test_damaged_files(full: Path, tmp_path: Path, name: str, damage: Callable[[Path], None]) -> None:
    folder = shutil.copytree(full, tmp_path / "state")
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    damage(folder / name)
    message = refusal(make_trainer(), folder)
    assert str(folder) in message
    assert name in message


@pytest.mark.parametrize("content", ["[]", "{}", '{"files": {}}', '{"files": {}, "format": 1}', "null", "\x00"])
def test_facts_of_another_shape(tmp_path: Path, content: str) -> None:
    (tmp_path / "facts.json").write_text(content)
    assert str(tmp_path) in refusal(make_trainer(), tmp_path)


def test_a_later_format(full: Path, tmp_path: Path) -> None:
    folder = rewritten(full, tmp_path, format=2)
    assert "has format 2, and this version of asyncrl reads 1. Use the version that wrote it" in refusal(
        make_trainer(), folder
    )


# Malice: what it holds is of one who knows the format, checksums and all


def rewritten(state: Path, place: Path, *, index: bytes | None = None, data: bytes | None = None, **facts: Any) -> Path:
    folder = shutil.copytree(state, place / "state")
    if index is not None:
        (folder / ".metadata").write_bytes(index)
    if data is not None:
        (folder / "__0_0.distcp").write_bytes(data)
    content = json.loads((folder / "facts.json").read_text())
    content["files"] = {name: checksum(folder / name) for name in content["files"]}
    (folder / "facts.json").write_text(json.dumps(sealed({**content, **facts})))
    return folder


class Malicious:
    def __init__(self, trap: Path) -> None:
        self.trap = trap

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.trap),)


def test_an_index_that_calls_something(full: Path, tmp_path: Path) -> None:
    payload = pickle.dumps(Malicious(tmp_path / "trap"))
    message = refusal(make_trainer(), rewritten(full, tmp_path, index=payload))
    assert "damaged: .metadata cannot be read: .metadata asks for posix.mkdir, which is no part of an index" in message
    assert not (tmp_path / "trap").exists()
    pickle.loads(payload)
    assert (tmp_path / "trap").exists(), "the trap works"


def index_of(state: Path) -> dcp.Metadata:
    found: dcp.Metadata = pickle.loads((state / ".metadata").read_bytes())
    return found


def test_bytes_in_place_of_a_tensor(full: Path, tmp_path: Path) -> None:
    """The loader of torch.distributed.checkpoint would unpickle them."""
    index = index_of(full)
    name = next(name for name in index.state_dict_metadata if name.startswith("model."))
    place = next(value for key, value in index.storage_data.items() if key.fqn == name)
    index.state_dict_metadata[name] = dcp.BytesStorageMetadata()
    place.offset = 0
    trap = tmp_path / "trap"
    torch.save(Malicious(trap), tmp_path / "payload")
    place.length = (tmp_path / "payload").stat().st_size
    data = (tmp_path / "payload").read_bytes()
    folder = rewritten(full, tmp_path, index=pickle.dumps(index), data=data)
    assert "BytesStorageMetadata, which is no part of an index" in refusal(make_trainer(), folder)
    assert not trap.exists()


def test_a_tensor_that_is_none(full: Path, tmp_path: Path) -> None:
    """Its bytes are read as weights alone."""
    trap = tmp_path / "trap"
    torch.save(Malicious(trap), tmp_path / "payload")
    data = (tmp_path / "payload").read_bytes()
    index = index_of(full)
    for place in index.storage_data.values():
        place.offset, place.length = 0, len(data)
    folder = rewritten(full, tmp_path, index=pickle.dumps(index), data=data)
    assert "its tensors cannot be read" in refusal(make_trainer(), folder)
    assert not trap.exists()


@pytest.mark.parametrize("path", ["../secret", "/etc/passwd", "sub/file"])
def test_files_elsewhere(full: Path, tmp_path: Path, path: str) -> None:
    index = index_of(full)
    for place in index.storage_data.values():
        place.relative_path = path
    folder = rewritten(full, tmp_path, index=pickle.dumps(index))
    assert f"names a file of another folder: {path!r}" in refusal(make_trainer(), folder)


def test_an_index_that_is_something_else(full: Path, tmp_path: Path) -> None:
    folder = rewritten(full, tmp_path, index=pickle.dumps({"a": 1}))
    assert ".metadata holds a dict" in refusal(make_trainer(), folder)


def test_weights_of_other_names(full: Path, tmp_path: Path) -> None:
    index = index_of(full)
    index.state_dict_metadata = {name + "x": entry for name, entry in index.state_dict_metadata.items()}
    folder = rewritten(full, tmp_path, index=pickle.dumps(index))
    assert "its tensors cannot be read: Missing key" in refusal(make_trainer(), folder)
