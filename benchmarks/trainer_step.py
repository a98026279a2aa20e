"""Tokens/s of one training step (forward, backward, AdamW): this trainer, and what it could have been.

    python benchmarks/trainer_step.py [--threads 1] [--repeats 7]

Against it, on the same model, loss and sequences:
- padded: the loop that one writes first, a right-padded batch through the model's own forward;
- masked: the same packed row with the block-diagonal mask of `transformers` and its sdpa attention.
The median of interleaved repeats is shown, so that a busy machine hits all alike.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from asyncrl.config import Config
from asyncrl.training.trainer import TorchTrainer
from asyncrl.types import TrainSequence

VOCABULARY = 128
LENGTHS: dict[str, Callable[[random.Random], list[int]]] = {
    "equal, 64 x 30": lambda rng: [30] * 64,
    "mixed, 64 x 10..50": lambda rng: [rng.randint(10, 50) for _ in range(64)],
    "long tail, 32 x ~100": lambda rng: [min(int(rng.lognormvariate(4.4, 0.7)) + 5, 500) for _ in range(32)],
}


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


def make_sequences(lengths: list[int], rng: random.Random) -> list[TrainSequence]:
    """Four fifths prompt, one fifth completion."""
    sequences = []
    for length in lengths:
        prompt = length * 4 // 5
        tokens = [rng.randrange(VOCABULARY) for _ in range(length)]
        mask = [0] * prompt + [1] * (length - prompt)
        sequences.append(TrainSequence(tokens, [-4.85] * length, mask, rng.gauss(0, 1), group=0))
    return sequences


class PaddedLoop:
    """The plain loop: pad, forward, gather, backward, clip, step."""

    def __init__(self, folder: str) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(folder)
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=1e-5)

    def step(self, sequences: list[TrainSequence]) -> None:
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
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()


def make_trainer(folder: str, attention: str | None = None) -> TorchTrainer:
    config = Config(model=folder, loss={"kl_beta": 0.0}, trainer={"device": "cpu"})
    trainer = TorchTrainer(config, total_steps=None, weights_format="tensors")
    if attention is not None:
        trainer.policy.causal_lm.set_attn_implementation(attention)
    return trainer


def medians(steps: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats + 1):  # the first is a warm-up
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(found[1:]) for name, found in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        make_model(folder)
        ours, masked, padded = make_trainer(folder), make_trainer(folder, "sdpa"), PaddedLoop(folder)
        print(f"{'tokens/s':24}{'asyncrl':>10}{'padded':>10}{'masked':>10}{'to padded':>12}{'to masked':>12}")
        for name, lengths in LENGTHS.items():
            sequences = make_sequences(lengths(rng), rng)
            tokens = sum(len(sequence.tokens) for sequence in sequences)

            def step(trainer: TorchTrainer, batch: list[TrainSequence] = sequences) -> None:
                trainer.forward_backward(batch)
                trainer.optim_step()

            found = medians(
                {
                    "asyncrl": partial(step, ours),
                    "padded": partial(padded.step, sequences),
                    "masked": partial(step, masked),
                },
                options.repeats,
            )
            rates = [tokens / found[contender] for contender in ("asyncrl", "padded", "masked")]
            print(
                f"{name:24}{rates[0]:10,.0f}{rates[1]:10,.0f}{rates[2]:10,.0f}"
                f"{rates[0] / rates[1]:11.2f}x{rates[0] / rates[2]:11.2f}x"
            )


if __name__ == "__main__":
    main()
