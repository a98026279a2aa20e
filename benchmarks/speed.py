"""Samples per second of the whole loop, and how much of it is bare torch work.

    python benchmarks/speed.py [--steps 60]

The bare work of one step is measured beside it, on one thread each, as the loop uses them: `generate` of transformers
on a static batch, and forward, backward and AdamW on the same batch without padding. Nothing can be faster than the
slower of the two when both run at once on two cores; the share is that time divided by the time of a step.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from loop import ANSWER_TOKENS, GROUPS, MEMBERS, make_model, prompt_tokens, run_loop, samples_per_s


def bare_seconds(repeats: int = 12) -> tuple[float, float]:
    """Median seconds of (generation, training) of one step, alone on one thread."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        model = AutoModelForCausalLM.from_pretrained(make_model(Path(folder)), dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    prompts = torch.tensor([prompt_tokens(row) for row in range(GROUPS) for _ in range(MEMBERS)])

    def generate() -> None:
        with torch.inference_mode():
            model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                do_sample=True,
                top_k=0,
                max_new_tokens=ANSWER_TOKENS,
                min_new_tokens=ANSWER_TOKENS,
            )

    tokens = torch.cat([prompts, prompts[:, :ANSWER_TOKENS]], dim=1)

    def train() -> None:
        logits = model(tokens).logits[:, -ANSWER_TOKENS - 1 : -1]
        logprobs = logits.log_softmax(-1).gather(-1, tokens[:, -ANSWER_TOKENS:, None])
        (-logprobs.mean()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return _median(generate, repeats), _median(train, repeats)


def _median(work: Callable[[], None], repeats: int) -> float:
    work()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=60)
    steps = parser.parse_args().steps
    generating, training = bare_seconds()
    rate = samples_per_s(run_loop(steps), warm_up=10)
    step = GROUPS * MEMBERS / rate
    slower = max(generating, training)
    print("| samples/s | step, ms | bare generation, ms | bare training, ms | slower side / step | both / step |")
    print("|---|---|---|---|---|---|")
    print(
        f"| {rate:,.0f} | {step * 1e3:.0f} | {generating * 1e3:.0f} | {training * 1e3:.0f} "
        f"| {slower / step:.2f} | {(generating + training) / step:.2f} |"
    )


if __name__ == "__main__":
    main()
