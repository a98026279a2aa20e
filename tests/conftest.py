"""A tiny model and short runs, shared by the tests of the whole engine."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import pytest

from asyncrl.agents.sandbox import SandboxError, run_python
from asyncrl.config import Config
from asyncrl.testing.models import tiny_model

# Before torch is loaded: threads that spin for a core which a server of the tests holds make a test ten times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")

THREADS_END_S = 30.0
SMALL: dict[str, Any] = {
    "max_seq_len": 64,
    "completions_per_prompt": 4,
    "prompt_groups_per_step": 4,
    "sampling": {"max_tokens": 4},
    "sampler": {"kind": "transformers"},
    "trainer": {"device": "cpu"},
    "loss": {"kl_beta": 0.0},
    "optimizer": {"learning_rate": 3e-3},
}
"""Settings of a run whose step takes some ten milliseconds."""

MakeConfig = Callable[..., Config]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random model: one token per byte, a chat template.

    Its output head is 8 times that of a new model: hidden states have a fixed norm, so an adapter, which leaves the
    head alone, could not make any token likely otherwise.
    """
    import torch
    from transformers import AutoModelForCausalLM

    folder = tiny_model(tmp_path_factory.mktemp("model") / "tiny")
    network = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        network.get_output_embeddings().weight.mul_(8)
    network.save_pretrained(folder)
    return folder


@pytest.fixture
def make_config(model: Path, tmp_path: Path) -> MakeConfig:
    """`Config(**settings)` for a small run on the tiny model, into `tmp_path / "run"`."""
    return lambda **settings: Config(**({"model": str(model), "run_dir": tmp_path / "run", **SMALL} | settings))


def engine_threads() -> list[str]:
    """Names of the engine's threads that are alive."""
    named = ("asyncrl", "rollout-log")
    idle = "asyncrl offload, idle"  # waits for the next call of anybody, and ends by itself
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(named) and thread.name != idle]


@pytest.fixture
def no_thread_left() -> Any:
    """After the test, the threads of the engine must end."""
    before = engine_threads()
    yield
    deadline = time.monotonic() + THREADS_END_S
    while len(left := engine_threads()) > len(before) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(left) <= len(before), f"left behind: {left}"


@pytest.fixture(scope="session")
def walls() -> None:
    """Skips where this system cannot build the sandbox: another than Linux, or a container that forbids Landlock."""
    try:
        anyio.run(run_python, "")
    except SandboxError as error:
        pytest.skip(str(error))
