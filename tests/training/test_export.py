"""Weights on their way out: reloaded by transformers and peft, they give the trainer's log-probs."""

from __future__ import annotations

import errno
import json
import resource
from pathlib import Path

import pytest
import torch
from peft import PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from asyncrl.errors import TrainerError
from asyncrl.training.export import prune
from asyncrl.types import TrainSequence, Weights
from tests.training.cases import fresh_model, make_trainer, plain_logprobs, token_lists, train_sequences, weights

TOKENS = token_lists(5, (40,))[0]


def trained(kind: str, rank: int, publish_folder: Path | None = None, steps: int = 2):  # type: ignore[no-untyped-def]
    trainer = make_trainer(kind, publish_folder, lora={"rank": rank})
    for _ in range(steps):
        trainer.forward_backward(train_sequences(0, (20, 9)))
        trainer.optim_step()
    return trainer


def agree(model: PreTrainedModel, expected: list[float]) -> None:
    torch.testing.assert_close(plain_logprobs(model.eval(), TOKENS), torch.tensor(expected), rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_tensors_of_a_full_fine_tune(kind: str) -> None:
    trainer = trained(kind, 0)
    sent = trainer.save_weights_for_sampler()
    assert (sent.version, sent.adapter, sent.folder) == (2, False, None)
    model = fresh_model(kind)
    assert sent.tensors is not None
    report = model.load_state_dict(dict(sent.tensors), strict=False)
    assert report.unexpected_keys == []
    assert report.missing_keys == (["lm_head.weight"] if kind == "qwen3" else [])  # tied: sent once
    agree(model, trainer.forward([TOKENS])[0])


@pytest.mark.parametrize("rank", [0, 4])
def test_a_full_disk_is_an_error_of_the_disk_and_leaves_nothing(rank: int, tmp_path: Path) -> None:
    """Rust writes the tensors: its error is none of Python's."""
    trainer = make_trainer("llama", lora={"rank": rank})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match="File too large") as error:
            trainer.save_model(tmp_path / "model")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert error.value.errno == errno.EFBIG
    assert list(tmp_path.iterdir()) == []


def test_tensors_of_an_adapter() -> None:
    trainer = trained("llama", 4)
    sent = trainer.save_weights_for_sampler()
    assert sent.adapter
    assert sent.tensors is not None
    other = make_trainer("llama", lora={"rank": 4})
    assert other.policy.adapter is not None
    set_peft_model_state_dict(other.policy.adapter.model, dict(sent.tensors))
    assert other.forward([TOKENS])[0] == pytest.approx(trainer.forward([TOKENS])[0], abs=1e-6)


@pytest.mark.parametrize("rank", [0, 4])
def test_a_snapshot_does_not_follow_the_next_step(rank: int) -> None:
    trainer = trained("llama", rank)
    sent = trainer.save_weights_for_sampler().tensors
    assert sent is not None
    copies = {name: tensor.clone() for name, tensor in sent.items()}
    trainer.forward_backward(train_sequences(1, (20, 9)))
    trainer.optim_step()
    assert all(torch.equal(sent[name], copies[name]) for name in sent)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_files_of_a_full_fine_tune(kind: str, tmp_path: Path) -> None:
    trainer = trained(kind, 0, tmp_path)
    sent = trainer.save_weights_for_sampler()
    assert sent.folder == tmp_path / "policy-v2"
    assert [path.name for path in tmp_path.iterdir()] == ["policy-v2"]  # nothing unfinished is left
    agree(AutoModelForCausalLM.from_pretrained(sent.folder), trainer.forward([TOKENS])[0])


def test_files_of_an_adapter(tmp_path: Path) -> None:
    trainer = trained("llama", 4, tmp_path)
    sent = trainer.save_weights_for_sampler()
    assert sent.adapter
    assert sent.folder is not None
    agree(PeftModel.from_pretrained(fresh_model("llama"), sent.folder), trainer.forward([TOKENS])[0])


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("kind", ["qwen3", "gemma3"])
def test_tied_embeddings(kind: str, rank: int, tmp_path: Path) -> None:
    """One tensor that reads and writes: it trains once, is saved once, and opens tied."""
    trainer = trained(kind, rank, tmp_path)
    causal_lm = trainer.policy.causal_lm
    assert trainer.policy.head.weight is causal_lm.get_input_embeddings().weight
    moved = not torch.equal(trainer.policy.head.weight, fresh_model(kind).get_input_embeddings().weight)
    assert moved == (rank == 0)
    folder = trainer.save_weights_for_sampler().folder
    assert folder is not None
    if rank:
        opened = PeftModel.from_pretrained(fresh_model(kind), folder)
    else:
        opened = AutoModelForCausalLM.from_pretrained(folder)
        names = load_file(folder / "model.safetensors").keys()
        assert [name for name in names if "lm_head" in name or "embed_tokens" in name] == ["model.embed_tokens.weight"]
    assert opened.get_output_embeddings().weight is opened.get_input_embeddings().weight
    agree(opened, trainer.forward([TOKENS])[0])


def test_the_gradient_of_a_tied_embedding_has_both_parts() -> None:
    """As autograd has it through the model's own forward."""
    trainer, model = make_trainer("qwen3"), fresh_model("qwen3")
    sequence = TrainSequence(TOKENS, [0.0] * len(TOKENS), [1] * len(TOKENS), 0.0, group=0)
    trainer.forward_backward_custom([sequence], lambda inputs: inputs.logprobs)
    ids = torch.tensor([TOKENS])
    logits = model(input_ids=ids).logits[0, :-1]
    logits.log_softmax(dim=1).gather(1, ids[0, 1:, None]).sum().backward()
    expected = model.get_input_embeddings().weight.grad
    torch.testing.assert_close(
        trainer.policy.causal_lm.get_input_embeddings().weight.grad, expected, rtol=1e-3, atol=1e-3
    )


def test_publishing_a_version_again_replaces_it(tmp_path: Path) -> None:
    trainer = trained("llama", 0, tmp_path)
    first = trainer.save_weights_for_sampler()
    assert first.folder is not None
    (first.folder / "stale").touch()
    second = trainer.save_weights_for_sampler()
    assert second.folder == first.folder
    assert not (first.folder / "stale").exists()


def probe_of(sent: Weights) -> tuple[tuple[int, ...], tuple[float, ...]]:
    assert sent.probe is not None
    return sent.probe.tokens, sent.probe.logprobs


def test_the_probe_speaks_of_these_weights() -> None:
    trainer = trained("llama", 0)
    tokens, logprobs = probe_of(trainer.save_weights_for_sampler())
    assert len(tokens) == len(logprobs) + 1 == 16
    assert len(set(tokens)) == 16
    model = fresh_model("llama")
    model.load_state_dict(weights(trainer))
    expected = plain_logprobs(model, tokens)
    assert logprobs == pytest.approx(expected.tolist(), abs=1e-5)
    trainer.set_probe(TOKENS)
    again = probe_of(trainer.save_weights_for_sampler())
    assert again[0] == tuple(TOKENS)
    assert list(again[1]) == trainer.forward([TOKENS])[0]


def with_tokenizer(folder: Path, kind: str) -> str:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    fresh_model(kind).save_pretrained(folder)
    words = Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="a").save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("rank", [0, 4])
def test_the_saved_model_opens(rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = with_tokenizer(tmp_path / "source", "llama")
    monkeypatch.setattr("tests.training.cases.model_folder", lambda kind: source)
    trainer = trained("llama", rank)
    out = tmp_path / "out"
    trainer.save_model(out)
    opened = (
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(source), out)
        if rank
        else AutoModelForCausalLM.from_pretrained(out)
    )
    agree(opened, trainer.forward([TOKENS])[0])
    assert AutoTokenizer.from_pretrained(out)("b").input_ids == [1]


def test_a_model_is_saved_in_the_dtype_it_came_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh_model("llama").bfloat16().save_pretrained(tmp_path / "source")
    monkeypatch.setattr("tests.training.cases.model_folder", lambda kind: str(tmp_path / "source"))
    trainer = trained("llama", 0, steps=1)
    assert trainer.policy.causal_lm.dtype == torch.float32
    trainer.save_model(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.bfloat16


@pytest.mark.parametrize("rank", [0, 4])
def test_a_model_that_is_not_finite_is_not_saved_over_one_that_is(rank: int, tmp_path: Path) -> None:
    trainer, folder = trained("llama", rank, steps=1), tmp_path / "model"
    trainer.save_model(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with torch.no_grad():
        trainer.policy.trained_parameters()[0][0, 0] = torch.nan
    with pytest.raises(TrainerError, match=r"the model of step 1 was not saved: \S+ is not finite\. Go on from an"):
        trainer.save_model(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    with pytest.raises(TrainerError, match="version 1 was not published: "):
        trainer.save_weights_for_sampler()


def test_only_the_newest_versions_are_kept(tmp_path: Path) -> None:
    for version in range(6):
        (tmp_path / f"policy-v{version}").mkdir()
    (tmp_path / "model").mkdir()
    prune(tmp_path, newest=5, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "policy-v4", "policy-v5"]
