"""Peak memory of a training step: against vocabulary and tokens, and what checkpointing and 8-bit states save.

    python benchmarks/memory.py [--quick]

Each cell is a process of its own: a first small step makes the optimizer's states, then the peak over one more step is
taken, less what was held before it. On CUDA that is what torch allocated, on Linux the resident set (its high-water
mark is reset before the step). The backbone is so small that the logits are what counts; every token is trained.
- plain: the model's own logits of all tokens, log-softmax, gather. Where that would not fit, what it would take by
  the bytes per logit of the largest cell that was measured, marked ~.
- chunked: this trainer, all tokens in one microbatch.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import structlog
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from asyncrl.config import Config
from asyncrl.training.trainer import TorchTrainer
from asyncrl.types import TrainSequence

VOCABULARIES = (1024, 8192, 32768, 152064)
TOKENS = (1024, 4096, 16384, 65536)
QUICK = 4096 * 32768
PLAIN_LOGITS_MOST = 1 << 29
"""About 6 GB: what is larger is predicted."""
LENGTH = 512
DEEP = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 8, "num_attention_heads": 4}
FLAT = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}


def make_model(folder: str, vocabulary: int, shape: dict[str, int]) -> None:
    config = LlamaConfig(
        vocab_size=vocabulary,
        max_position_embeddings=LENGTH,
        num_key_value_heads=shape["num_attention_heads"],
        tie_word_embeddings=True,
        **shape,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def make_sequences(tokens: int, vocabulary: int) -> list[TrainSequence]:
    rng = random.Random(0)
    return [
        TrainSequence([rng.randrange(vocabulary) for _ in range(LENGTH)], [-1.0] * LENGTH, [1] * LENGTH, 1.0, group)
        for group in range(tokens // LENGTH)
    ]


def chunked(folder: str, tokens: int, settings: dict[str, Any]) -> tuple[Callable[[list[TrainSequence]], None], Any]:
    trainer_settings = {"max_tokens_per_microbatch": tokens, "dtype": "float32", **settings.get("trainer", {})}
    config = Config(model=folder, **{"loss": {"kl_beta": 0.0}, **settings, "trainer": trainer_settings})
    trainer = TorchTrainer(config, total_steps=None, weights_format="tensors")

    def step(sequences: list[TrainSequence]) -> None:
        trainer.forward_backward(sequences)
        trainer.optim_step()

    return step, trainer._optimizer


def plain(folder: str, device: torch.device) -> tuple[Callable[[list[TrainSequence]], None], Any]:
    model = AutoModelForCausalLM.from_pretrained(folder).to(device)
    optimizer = torch.optim.AdamW(model.parameters())

    def step(sequences: list[TrainSequence]) -> None:
        ids = torch.tensor([list(sequence.tokens) for sequence in sequences], device=device)  # [B, T]
        logprobs = model(input_ids=ids).logits[:, :-1].log_softmax(dim=-1)
        loss = -logprobs.gather(2, ids[:, 1:, None]).mean()
        del logprobs
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad()

    return step, optimizer


class Peak:
    """The most memory held between `start` and `bytes`, beyond what was held at the start."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def start(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark is now what is resident
            self._before = self._status("VmRSS")

    def bytes(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated() - self._before
        return self._status("VmHWM") - self._before

    @staticmethod
    def _status(name: str) -> int:
        found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
        assert found is not None
        return int(found[1]) << 10


def measure(way: str, vocabulary: int, tokens: int, settings: dict[str, Any]) -> dict[str, float]:
    """One cell, in this process."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    deep = settings.pop("deep", False)
    with tempfile.TemporaryDirectory() as folder:
        make_model(folder, vocabulary, DEEP if deep else FLAT)
        step, optimizer = plain(folder, device) if way == "plain" else chunked(folder, tokens, settings)
        step(make_sequences(LENGTH, vocabulary))
        sequences, peak = make_sequences(tokens, vocabulary), Peak(device)
        peak.start()
        began = time.perf_counter()
        step(sequences)
        states = [value for state in optimizer.state.values() for value in state.values()]
        return {
            "peak": peak.bytes(),
            "seconds": time.perf_counter() - began,
            "states": sum(value.nbytes for value in states if isinstance(value, torch.Tensor)),
        }


def cell(way: str, vocabulary: int, tokens: int, **settings: Any) -> dict[str, float]:
    """The same in a process of its own, which gives freed memory back at once."""
    arguments = json.dumps([way, vocabulary, tokens, settings])
    done = subprocess.run(
        [sys.executable, __file__, "--cell", arguments],
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=1800,
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def mebibytes(count: float) -> str:
    return f"{count / 2**20:,.0f}"


def table_of_logits(most: int) -> None:
    print("MiB at the peak of a step, plain / chunked\n")
    print("| vocabulary | " + " | ".join(f"{tokens:,} tokens" for tokens in TOKENS) + " |\n|" + "---|" * 5)
    per_logit = 0.0
    for vocabulary in VOCABULARIES:
        cells = []
        for tokens in TOKENS:
            logits = vocabulary * tokens
            if logits > most:
                cells.append("")
                continue
            if logits <= PLAIN_LOGITS_MOST:
                found = cell("plain", vocabulary, tokens)["peak"]
                per_logit, first = found / logits, mebibytes(found)
            else:
                first = f"~{mebibytes(per_logit * logits)}"
            cells.append(f"{first} / {mebibytes(cell('chunked', vocabulary, tokens)['peak'])}")
        print(f"| {vocabulary:,} | " + " | ".join(cells) + " |", flush=True)


def table_of_settings() -> None:
    print("\n8 layers, hidden size 128, vocabulary 8,192, 16,384 tokens\n")
    print("| setting | peak of a step, MiB | optimizer states, MiB | step, s |\n|---|---|---|---|")
    rows: dict[str, dict[str, Any]] = {
        "as it is": {},
        "trainer.gradient_checkpointing": {"trainer": {"gradient_checkpointing": True}},
        "optimizer.state_bits = 8": {"optimizer": {"state_bits": 8}},
    }
    for name, settings in rows.items():
        found = cell("chunked", 8192, 16384, deep=True, **settings)
        print(f"| {name} | {mebibytes(found['peak'])} | {found['states'] / 2**20:.1f} | {found['seconds']:.1f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="leave out the cells that take more than some seconds")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cell is not None:
        print(json.dumps(measure(*json.loads(options.cell))))
        return
    table_of_logits(QUICK if options.quick else max(VOCABULARIES) * max(TOKENS))
    table_of_settings()


if __name__ == "__main__":
    main()
