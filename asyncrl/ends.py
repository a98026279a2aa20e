"""The two ends of a run: which sampler, on which device, with how many threads, and the sampler opened."""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Literal

from asyncrl.agents.endpoint import Endpoint
from asyncrl.agents.policy import PolicyContext
from asyncrl.config import Config
from asyncrl.installation import auto_sampler, inspect_installation
from asyncrl.model_facts import ModelFacts, load_tokenizer
from asyncrl.saved_adapter import SETTINGS, WEIGHTS, read_adapter
from asyncrl.types import Sampler, SamplingParams, Weights

CANARY_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.25}


def choose_sampler(config: Config) -> tuple[Literal["vllm", "transformers"], str]:
    """Which sampler `config` uses on this machine, and why."""
    if config.sampler.urls:
        return "vllm", "sampler.urls are given"
    if config.sampler.kind != "auto":
        return config.sampler.kind, "sampler.kind says so"
    if config.deterministic:
        return "transformers", "deterministic"
    if device_type(config) != "cuda":
        return "transformers", "the model is trained on no CUDA device, and the embedded sampler needs no server"
    return auto_sampler(inspect_installation())


def canary_tolerance(config: Config) -> float | None:
    """The largest difference of log-probs that the canary forgives; None switches it off."""
    if not config.publish.canary:
        return None
    if config.publish.canary_tolerance is not None:
        return config.publish.canary_tolerance
    dtype = config.trainer.dtype
    if dtype == "auto":
        dtype = "bfloat16" if device_type(config) == "cuda" else "float32"
    return CANARY_TOLERANCE[dtype]


def device_type(config: Config) -> str:
    if config.trainer.device != "auto":
        return config.trainer.device
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def torch_threads(config: Config) -> int:
    """Threads of torch for either end: on a CPU the sampler and the trainer work at the same time, half the cores each.

    More than that is not merely useless: threads that spin for a core that another holds slow a step 20 times.
    One where every bit counts: sums are cut by threads, and machines differ in their cores.
    """
    if config.deterministic:
        return 1
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return max(1, cores // 2)


@asynccontextmanager
async def open_sampler(config: Config, facts: ModelFacts, run_dir: Path) -> AsyncIterator[Sampler]:
    kind, _ = choose_sampler(config)
    sampler: Sampler
    if kind == "vllm":
        from asyncrl.sampling.vllm import VllmSampler

        sampler = VllmSampler(
            config,
            run_dir=run_dir,
            context_tokens=facts.max_seq_len,
            keep_versions=config.staleness.max_staleness + 2 + bool(config.evaluation.interval),  # one is evaluated
        )
    else:
        from asyncrl.sampling.transformers import TransformersSampler

        sampler = TransformersSampler.from_config(config, torch_threads=torch_threads(config))
    with _exact_kernels(config):
        async with sampler:
            yield sampler


@contextmanager
def _exact_kernels(config: Config) -> Iterator[None]:
    """Where every bit counts, none of the kernels that sum in another order each time; torch names those that have no
    other. On a CPU a single thread is enough.
    """
    if not config.deterministic or device_type(config) == "cpu":
        yield
        return
    import torch

    before = torch.are_deterministic_algorithms_enabled()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read by cuBLAS at its first call
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@asynccontextmanager
async def open_policy(config: Config, facts: ModelFacts, sampler: Sampler) -> AsyncIterator[PolicyContext]:
    """What the rollouts of a run share, their endpoint open as long as the block."""
    sampling = config.sampling
    params = SamplingParams(
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        stop_token_ids=facts.stop_token_ids,
    )
    async with Endpoint(config.endpoint) as endpoint:
        yield PolicyContext(
            sampler,
            params=params,
            max_seq_len=facts.max_seq_len,
            load_tokenizer=lambda: load_tokenizer(config.model),
            chat=config.chat,
            endpoint=endpoint,
            seed=config.seed if config.deterministic else None,
        )


def split_adapter(config: Config) -> tuple[Config, Path | None]:
    """`config` with the base model where its model is the folder of an adapter; and the adapter to lay over it.

    Raises:
        ConfigError: the adapter is one that the samplers cannot reproduce.
    """
    folder = Path(config.model)
    if not (folder / SETTINGS).is_file():
        return config, config.lora.warm_start
    saved = read_adapter(folder)
    lora = config.lora.model_copy(update={"rank": saved.rank, "alpha": saved.alpha})
    return config.model_copy(update={"model": saved.base, "lora": lora}), folder


def evaluated_weights(config: Config, adapter: Path | None, sampler: Sampler) -> Weights | None:
    """What is laid over the model that the sampler was opened with: a saved adapter; or the whole of `config.model`,
    where the servers of somebody else were started with whatever they were started with."""
    if adapter is None:
        elsewhere = config.sampler.urls and Path(config.model).is_dir()
        return Weights(version=1, adapter=False, folder=Path(config.model)) if elsewhere else None
    if sampler.wants == "files":
        return Weights(version=1, adapter=True, folder=adapter)
    from safetensors.torch import load_file

    return Weights(version=1, adapter=True, tensors=load_file(adapter / WEIGHTS))
