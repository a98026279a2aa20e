"""Tokens per second of the embedded sampler, against what `transformers` offers on the same model.

    python benchmarks/embedded_sampler.py [--only turns] [--skip-library] [--device cpu] [--threads 1] [--cpu-time]

- static: `generate` on one batch that begins and ends together, the bare speed of the model in `transformers`
- library: the continuous batching of `transformers`, sized by hand for this load
- ours: `TransformersSampler.generate`, all requests at once, through the event loop
- ours, 4x: four times as many requests as run at once, with lengths from 1 to twice the mean, each replaced as it ends
- turns: 16 conversations of 20 turns at once, 50 new tokens and 20 drawn in each, with sessions and without; then
  groups of 8 that share their prompt
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.generation import ContinuousBatchingConfig, GenerationConfig

from asyncrl.sampling.transformers import TransformersSampler
from asyncrl.types import SampleRequest, SamplingParams

REPEATS = 5
clock = time.perf_counter


def random_model(folder: Path, hidden: int = 192, layers: int = 4) -> LlamaForCausalLM:
    """By default of about 1.6 M parameters."""
    torch.manual_seed(0)
    heads = max(4, hidden // 64)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=hidden,
        intermediate_size=hidden * 7 // 3,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        max_position_embeddings=2048,
        eos_token_id=None,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    return model


def prompts(count: int, length: int) -> list[list[int]]:
    return torch.randint(0, 512, (count, length), generator=torch.Generator().manual_seed(1)).tolist()


def best(run: Callable[[], float]) -> float:
    """Tokens per second of the best repeat: the machine is shared."""
    run()
    return max(run() for _ in range(REPEATS))


def static(model: LlamaForCausalLM, count: int, length: int, tokens: int) -> float:
    ids = torch.tensor(prompts(count, length), device=model.device)
    # top_k must be spelled out: `generate` draws from the 50 best by default.
    settings = {"do_sample": True, "top_k": 0, "max_new_tokens": tokens, "min_new_tokens": tokens, "pad_token_id": 0}

    def run() -> float:
        began = clock()
        with torch.inference_mode():
            model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
        return count * tokens / (clock() - began)

    return best(run)


def library(model: LlamaForCausalLM, count: int, length: int, tokens: int) -> float:
    generation = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=tokens, eos_token_id=-1, pad_token_id=0)
    sizes = ContinuousBatchingConfig(num_blocks=512, max_batch_tokens=512, page_size=32)

    def run() -> float:
        began = clock()
        model.generate_batch(prompts(count, length), generation, continuous_batching_config=sizes, progress_bar=False)
        return count * tokens / (clock() - began)

    run()
    return max(run() for _ in range(2))


async def ours(folder: str, device: str, count: int, length: int, tokens: int) -> tuple[float, float]:
    lengths = [1 + (i * 2 * tokens) // (4 * count) for i in range(4 * count)]
    order = torch.randperm(4 * count, generator=torch.Generator().manual_seed(2)).tolist()

    async with TransformersSampler(folder, max_running=count, device=device) as sampler:

        async def one(prompt: list[int], limit: int) -> int:
            completion = await sampler.generate(SampleRequest(prompt, SamplingParams(max_tokens=limit)))
            return len(completion.tokens)

        async def burst() -> float:
            began = clock()
            drawn = await asyncio.gather(*(one(prompt, tokens) for prompt in prompts(count, length)))
            return sum(drawn) / (clock() - began)

        async def stream() -> float:
            jobs = iter([(prompt, lengths[i]) for i, prompt in zip(order, prompts(4 * count, length), strict=True)])

            async def worker() -> int:
                return sum([await one(prompt, limit) for prompt, limit in jobs])

            began = clock()
            drawn = await asyncio.gather(*(worker() for _ in range(count)))
            return sum(drawn) / (clock() - began)

        await burst()
        return max([await burst() for _ in range(REPEATS)]), max([await stream() for _ in range(3)])


async def conversations(folder: str, device: str, *, sessions: bool, count: int = 16, turns: int = 20) -> list[float]:
    """Seconds of each turn, which all conversations take together."""
    seconds, texts = [], [[] for _ in range(count)]
    async with TransformersSampler(folder, max_running=count, device=device) as sampler:

        async def turn(index: int, new: list[int]) -> None:
            texts[index] += new
            session = str(index) if sessions else ""
            request = SampleRequest(texts[index], SamplingParams(max_tokens=20), session=session)
            texts[index] += (await sampler.generate(request)).tokens

        new_tokens = iter(prompts(turns * count, 50))
        for _ in range(turns):
            began = clock()
            await asyncio.gather(*(turn(index, next(new_tokens)) for index in range(count)))
            seconds.append(clock() - began)
    return seconds


async def groups(folder: str, device: str, length: int, tokens: int, *, size: int) -> float:
    """Tokens per second of 64 rows, `size` of which have the same prompt."""
    async with TransformersSampler(folder, max_running=64, device=device) as sampler:

        async def burst() -> float:
            began = clock()
            requests = [
                SampleRequest(prompt, SamplingParams(max_tokens=tokens))
                for prompt in prompts(64 // size, length)
                for _ in range(size)
            ]
            await asyncio.gather(*(sampler.generate(request) for request in requests))
            return 64 * tokens / (clock() - began)

        await burst()
        return max([await burst() for _ in range(REPEATS)])


def compare_speed(device: str, *, library_too: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        model = random_model(Path(folder)).to(device)
        print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, tokens/s")
        print(f"{'tokens':>10} {'rows':>5} {'static':>8} {'library':>8} {'ours':>8} {'share':>6} {'ours, 4x':>9}")
        for length, tokens in ((64, 32), (24, 6)):
            for count in (1, 8, 32, 64):
                bare = static(model, count, length, tokens)
                batching = library(model, count, length, tokens) if library_too else float("nan")
                burst, stream = asyncio.run(ours(folder, device, count, length, tokens))
                print(
                    f"{length:>5} in {tokens:<2} {count:>4} {bare:8.0f} {batching:8.0f} {burst:8.0f} "
                    f"{burst / bare:6.2f} {stream:9.0f}",
                    flush=True,
                )


def compare_turns(device: str) -> None:
    shown = (1, 2, 5, 10, 15, 20)
    print(f"\nms per turn {'':>22}" + "".join(f"{turn:>8}" for turn in shown) + f"{'all 20':>9}")
    for hidden, layers in ((64, 2), (192, 4), (512, 8)):
        with tempfile.TemporaryDirectory() as folder:
            random_model(Path(folder), hidden, layers)
            for sessions in (False, True):
                seconds = asyncio.run(conversations(folder, device, sessions=sessions))
                print(
                    f"{hidden:>4} x {layers} {'sessions' if sessions else 'from nothing':>24} "
                    + "".join(f"{1e3 * seconds[turn - 1]:>8.0f}" for turn in shown)
                    + f"{1e3 * sum(seconds):>9.0f}",
                    flush=True,
                )


def compare_groups(device: str) -> None:
    print(f"\n{'tokens':>10} {'64 prompts':>11} {'8 groups of 8':>14}   tokens/s")
    with tempfile.TemporaryDirectory() as folder:
        random_model(Path(folder))
        for length, tokens in ((24, 6), (64, 32), (256, 32)):
            alone, shared = (asyncio.run(groups(folder, device, length, tokens, size=size)) for size in (1, 8))
            print(f"{length:>5} in {tokens:<2} {alone:>11.0f} {shared:>14.0f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch; 1 on a busy machine")
    parser.add_argument("--cpu-time", action="store_true", help="count CPU seconds: for a machine with other work")
    parser.add_argument("--only", choices=("speed", "turns"), help="half of it")
    parser.add_argument("--skip-library", action="store_true", help="leave out transformers' continuous batching")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.cpu_time:
        global clock
        clock = time.process_time
    logging.disable(logging.WARNING)
    print(f"{options.device}, {torch.get_num_threads()} threads")
    if options.only != "turns":
        compare_speed(options.device, library_too=not options.skip_library)
    if options.only != "speed":
        compare_turns(options.device)
        compare_groups(options.device)


if __name__ == "__main__":
    main()
