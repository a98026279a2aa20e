"""Tokens/s of one training step (forward, backward, clip, AdamW): this trainer, and what it could have been.

    python benchmarks/trainer_step.py [--threads 1] [--repeats 7]

Against it, on the same model, loss and sequences, from Python lists to updated weights:
- padded: the loop that one writes first, a right-padded batch through the model's own forward;
- TRL: the `GRPOTrainer` of `trl`, its log-probs, loss, backward and optimizer; left out where it is not installed.
The gradient norms of all must agree. The median of interleaved repeats is shown, so that a busy machine hits all
alike. "in torch" is the part of this trainer's time that is spent inside torch's operators, by torch's profiler.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from asyncrl.config import Config
from asyncrl.testing.models import tiny_tokenizer
from asyncrl.training.trainer import TorchTrainer
from asyncrl.types import TrainSequence

VOCABULARY = 128
LEARNING_RATE = 1e-5
NORM_TOLERANCE = 0.02
PROFILED_STEPS = 5

Sequences = list[TrainSequence]


def alone(lengths: list[int], rng: random.Random) -> Sequences:
    """Sequences that share nothing: four fifths prompt, one fifth completion."""
    return [sequence(draw(length * 4 // 5, rng), length - length * 4 // 5, rng, index)
            for index, length in enumerate(lengths)]  # fmt: skip


def groups(count: int, members: int, prompt: int, completion: int, rng: random.Random) -> Sequences:
    prompts = [draw(prompt, rng) for _ in range(count)]
    return [sequence(prompts[group], completion, rng, group) for group in range(count) for _ in range(members)]


def draw(count: int, rng: random.Random) -> list[int]:
    return [rng.randrange(VOCABULARY) for _ in range(count)]


def sequence(prompt: list[int], completion: int, rng: random.Random, group: int) -> TrainSequence:
    tokens = prompt + draw(completion, rng)
    mask = [0] * len(prompt) + [1] * completion
    return TrainSequence(tokens, [-4.85] * len(tokens), mask, rng.gauss(0, 1), group)


def cases(rng: random.Random) -> dict[str, Sequences]:
    tail = [min(int(rng.lognormvariate(4.4, 0.7)) + 5, 500) for _ in range(32)]
    return {
        "equal, 64 x 30": alone([30] * 64, rng),
        "mixed, 64 x 10..50": alone([rng.randint(10, 50) for _ in range(64)], rng),
        "long tail, 32 x ~100": alone(tail, rng),
        "8 groups of 8 x (24 + 6)": groups(8, 8, 24, 6, rng),
    }


class Contender(Protocol):
    def step(self, sequences: Sequences) -> float:
        """Train once on `sequences`; the gradient norm before clipping."""


class Ours:
    def __init__(self, folder: str) -> None:
        config = Config(
            model=folder,
            loss={"kl_beta": 0.0, "tis_cap": None},
            optimizer={"learning_rate": LEARNING_RATE},
            trainer={"device": "cpu"},
        )
        self._trainer = TorchTrainer(config, total_steps=None, weights_format="tensors")

    def step(self, sequences: Sequences) -> float:
        self._trainer.forward_backward(sequences)
        return float(self._trainer.optim_step().metrics["grad_norm"])


class Padded:
    """The plain loop: pad, forward, gather, backward, clip, step."""

    def __init__(self, folder: str) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(folder)
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=LEARNING_RATE)

    def step(self, sequences: Sequences) -> float:
        longest = max(len(sequence.tokens) for sequence in sequences)
        ids = torch.zeros(len(sequences), longest, dtype=torch.long)  # [B, T]
        mask = torch.zeros(len(sequences), longest)  # [B, T]
        for row, sequence in enumerate(sequences):
            ids[row, : len(sequence.tokens)] = torch.tensor(sequence.tokens)
            mask[row, : len(sequence.tokens)] = torch.tensor(sequence.loss_mask, dtype=torch.float32)
        advantages = torch.tensor([sequence.advantage for sequence in sequences])
        logits = self._model(input_ids=ids).logits[:, :-1]
        logprobs = logits.log_softmax(dim=-1).gather(2, ids[:, 1:, None]).squeeze(2)
        ratio = (logprobs - logprobs.detach()).exp()
        loss = -(ratio * advantages[:, None] * mask[:, 1:]).sum() / mask[:, 1:].sum()
        torch.autograd.backward(loss)
        norm = torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return float(norm)


class Trl:
    """TRL's trainer from the prepared batch on; generation and rewards, which come before it, are not timed."""

    def __init__(self, folder: str, rows: int) -> None:
        from datasets import Dataset
        from trl import GRPOConfig, GRPOTrainer
        from trl.trainer.utils import pad

        class Given(GRPOTrainer):  # type: ignore[misc]
            def _prepare_inputs(self, generation_batch: Any) -> Any:
                return generation_batch  # is drawn and scored already

        settings = GRPOConfig(
            output_dir=f"{folder}/trl",
            use_cpu=True,
            bf16=False,
            beta=0.0,
            loss_type="bnpo",  # the mean over loss tokens, as here
            learning_rate=LEARNING_RATE,
            per_device_train_batch_size=rows,
            gradient_checkpointing=False,
            report_to="none",
        )
        self._pad = pad
        self._trainer = Given(
            model=AutoModelForCausalLM.from_pretrained(folder),
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=settings,
            train_dataset=Dataset.from_list([{"prompt": "a"}] * rows),
            processing_class=tiny_tokenizer(),
        )
        self._trainer.create_optimizer_and_scheduler(num_training_steps=1000)
        self._trainer.model, self._trainer.optimizer = self._trainer.accelerator.prepare(
            self._trainer.model, self._trainer.optimizer
        )
        self._trainer.current_gradient_accumulation_steps = 1

    def step(self, sequences: Sequences) -> float:
        trainer, optimizer = self._trainer, self._trainer.optimizer
        trainer.training_step(trainer.model, self._batch(sequences), None)
        norm = trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), trainer.args.max_grad_norm)
        optimizer.step()
        trainer.model.zero_grad()
        return float(norm)

    def _batch(self, sequences: Sequences) -> dict[str, torch.Tensor]:
        prompts = [[token for token, drawn in zip(s.tokens, s.loss_mask, strict=True) if not drawn] for s in sequences]
        drawn = [list(s.tokens[len(prompt) :]) for s, prompt in zip(sequences, prompts, strict=True)]
        return {
            "prompt_ids": self._padded(prompts, "left"),
            "prompt_mask": self._padded([[1] * len(row) for row in prompts], "left"),
            "completion_ids": self._padded(drawn, "right"),
            "completion_mask": self._padded([[1] * len(row) for row in drawn], "right"),
            "advantages": torch.tensor([sequence.advantage for sequence in sequences]),
        }

    def _padded(self, rows: list[list[int]], side: str) -> torch.Tensor:
        padded: torch.Tensor = self._pad([torch.tensor(row) for row in rows], padding_value=0, padding_side=side)
        return padded


def make_model(folder: str) -> None:
    """1.6 M parameters."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=448,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def medians(steps: dict[str, Callable[[], float]], repeats: int) -> dict[str, float]:
    """Seconds of each, after a warm-up in which their gradient norms are compared."""
    norms = {name: step() for name, step in steps.items()}
    if max(norms.values()) > (1 + NORM_TOLERANCE) * min(norms.values()):
        raise SystemExit(f"the contenders do not train the same: gradient norms {norms}")
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(found) for name, found in seconds.items()}


def part_in_torch(step: Callable[[], float]) -> float:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        start = time.perf_counter()
        for _ in range(PROFILED_STEPS):
            step()
        wall = time.perf_counter() - start
    return sum(event.self_cpu_time_total for event in profile.key_averages()) / 1e6 / wall


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        make_model(folder)
        contenders: dict[str, Contender] = {"asyncrl": Ours(folder), "padded": Padded(folder)}
        if importlib.util.find_spec("trl") is None:
            print("TRL is not installed, and left out: pip install trl\n")
        else:
            contenders["TRL"] = Trl(folder, rows=64)
        others = list(contenders)[1:]
        columns = ["lengths", "tokens", *contenders, *(f"to {name}" for name in others), "in torch"]
        print("tokens/s\n\n| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
        for name, sequences in cases(random.Random(0)).items():
            steps = {who: partial(contender.step, sequences) for who, contender in contenders.items()}
            tokens = sum(len(sequence.tokens) for sequence in sequences)
            found = medians(steps, options.repeats)
            cells = [name, f"{tokens:,}", *(f"{tokens / found[who]:,.0f}" for who in contenders)]
            cells += [f"{found[who] / found['asyncrl']:.2f}" for who in others]
            print("| " + " | ".join([*cells, f"{part_in_torch(steps['asyncrl']):.0%}"]) + " |", flush=True)


if __name__ == "__main__":
    main()
