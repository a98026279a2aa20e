"""The runs in which clients are made to hang: small, with everything that waits, and limits of a few seconds.

    RUNS["vllm-lora"](shared, folder)     by the name of a run; whether nothing of it was lost

Two on servers that the run starts, one of which is killed on the way. Two on servers of somebody else (here: of another
thread), which forget what they hold and are away for a while. `stub_vllm.py` plays the servers. Two with the embedded
sampler and a real trainer, one of them resumed; and an evaluation.
"""

from __future__ import annotations

import asyncio
import importlib
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import psutil

import asyncrl
import asyncrl.sampling.vllm
import asyncrl.training.thread
from asyncrl.result import TrainResult
from asyncrl.sampling.launch import Launch, environment, pick_ports
from asyncrl.testing.fakes import CountingTrainer
from asyncrl.testing.models import tiny_model
from asyncrl.types import Probe, RolloutSample, Weights
from tests.sampling.stub_vllm import StubVllm

MODEL, TRAINED = "model", "trained"
"""What `prepare` leaves in the folder that all runs share: a model, and a run that can be resumed."""
STAND_IN_SOCKET = "stubs"
"""In that folder: where a process asks for a stub (see `hang_hunt_clients.py`)."""
STEPS = 6
AWAY_S, BACK_S = 0.3, 3.0
STALL_S = 9.0
LIMITS = {
    "checkpointing.LEAST_S": 0.0,
    "engine.LOAD_LIMIT_S": 1.0,
    "interrupt.LEFTOVER_LIMIT_S": 1.0,
    "sampling.connect.ANSWER_TIMEOUT_S": 2.5,
    "sampling.endpoint.METRICS_TIMEOUT_S": 1.0,
    "sampling.endpoint.RESUME_TIMEOUT_S": 0.5,
    "sampling.live.ANSWER_TIMEOUT_S": 2.5,
    "sampling.replica.EXIT_NOTICE_S": 2.0,
    "sampling.server.GRACE_S": 0.2,
    "sampling.server.KILL_S": 1.0,
    "sampling.server.POLL_S": 0.02,
    "sampling.supervisor.ANSWER_S": 0.5,
    "sampling.supervisor.EXIT_NOTICE_S": 1.0,
    "sampling.supervisor.POLL_S": 0.1,
    "sampling.supervisor.WATCH_EVERY_S": 0.1,
    "sampling.vitals.LONGEST_DELAY_S": 0.1,
    "sampling.vllm.EXIT_NOTICE_S": 1.0,
    "sampling.vllm.LOAD_PATIENCE_S": 0.5,
    "sampling.vllm.STUCK_SHARE": 0.6,
    "storage.ledger_file.DISK_LIMIT_S": 3.0,
    "storage.samples.DISK_LIMIT_S": 3.0,
    "training_run.LOAD_LIMIT_S": STALL_S,
    "run.LOAD_LIMIT_S": STALL_S,
}
"""Those of real runs are minutes and hours."""
SETTINGS: dict[str, Any] = {
    "max_seq_len": 64,
    "completions_per_prompt": 2,
    "prompt_groups_per_step": 2,
    "max_steps": STEPS,
    "stall_timeout_s": STALL_S,
    "stop_timeout_s": 3.0,
    "sampling": {"max_tokens": 3},
    "log_rollouts": 0,
    "rollout": {"timeout_s": 7.0, "retries": 1, "error_budget": 5},
    "staleness": {"max_staleness": 1},
    "concurrency": {"initial_window": 4, "max_window": 4},
    "trainer": {"device": "cpu"},
    "loss": {"kl_beta": 0.0},
    "publish": {"timeout_s": 5.0},
    "checkpoint": {"interval": 1, "timeout_s": 4.0},
    "evaluation": {"interval": 2},
}
SAMPLER: dict[str, Any] = {"request_timeout_s": 5.0, "start_timeout_s": 5.0, "outage_timeout_s": 3.0}
LORA = {"rank": 4}
ROWS = [{"row": row} for row in range(40)]
STAND_IN = """
import os, socket, sys
parent = socket.socket(socket.AF_UNIX)
parent.connect(sys.argv[1])
parent.sendall(f"{sys.argv[3]} {os.environ['VLLM_API_KEY']}\\n".encode())
parent.recv(1)
"""
"""Asks for a stub at a port, and lives as long as it does: Python starts in a moment where it imports nothing."""


def shorten_limits() -> None:
    for name, value in LIMITS.items():
        module, _, limit = f"asyncrl.{name}".rpartition(".")
        assert hasattr(importlib.import_module(module), limit), name
        setattr(importlib.import_module(module), limit, value)


def prepare(shared: Path) -> None:
    tiny_model(shared / MODEL, hidden=32, layers=1, max_seq_len=128)
    config = asyncrl.Config(
        **{**SETTINGS, "stall_timeout_s": 100.0, "max_steps": 2, "evaluation": {}},
        model=str(shared / MODEL),
        run_dir=shared / TRAINED,
        sampler={"kind": "transformers"},
        lora=LORA,
    )
    asyncrl.train(_Rollouts(), dataset=ROWS, config=config, view="plain")


# With the embedded sampler


EMBEDDED = {**SAMPLER, "kind": "transformers"}


def _embedded(shared: Path, folder: Path, **settings: Any) -> bool:
    config = asyncrl.Config(**SETTINGS, model=str(shared / MODEL), run_dir=folder, sampler=EMBEDDED, **settings)
    return _whole(
        asyncrl.train(_Rollouts(), dataset=ROWS, config=config, evaluation=ROWS[:3], resume=True, view="plain")
    )


def _resumed(shared: Path, folder: Path) -> bool:
    shutil.copytree(shared / TRAINED, folder)
    return _embedded(shared, folder, lora=LORA)


def _evaluated(shared: Path, folder: Path) -> bool:
    """An adapter, which has to be published first."""
    adapter = str(shared / TRAINED / "model")
    config = asyncrl.Config(**SETTINGS, model=adapter, run_dir=folder, sampler=EMBEDDED)
    return asyncrl.evaluate(_Rollouts(), dataset=ROWS[:3], config=config).n == 3


def _whole(result: TrainResult) -> bool:
    """Every step was taken, and its weights are in a checkpoint."""
    return result.steps == STEPS and result.checkpoint is not None and result.checkpoint.name.endswith(f"{STEPS}")


# With vLLM


class _Trainer(CountingTrainer):
    """Says what the stubs say, and writes weights as files."""

    def __init__(self, config: asyncrl.Config, *, publish_folder: Path, **settings: Any) -> None:
        super().__init__(step_s=lambda: 0.03, save_s=lambda: 0.02)
        self._adapter = config.lora.rank > 0
        self._folder = publish_folder

    async def forward(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        return [[_logprob(self.step)] * (len(tokens) - 1) for tokens in sequences]

    async def save_weights_for_sampler(self) -> Weights:
        folder = self._folder / f"v{self.step}"
        folder.mkdir(parents=True, exist_ok=True)
        probe = Probe((1, 2, 3), (_logprob(self.step),) * 2)
        return Weights(self.step, adapter=self._adapter, folder=folder, probe=probe)


def _logprob(version: int) -> float:
    return -(version + 1) / 10


class _Sampler(asyncrl.sampling.vllm.VllmSampler):
    """Can be found."""

    last: _Sampler

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        _Sampler.last = self

    @property
    def whole(self) -> bool:
        return len(self._fleet.up) == len(self._fleet.replicas)


def _vllm(shared: Path, folder: Path, faults: dict[int, Callable[[], None]], *, lora: bool, **sampler: Any) -> bool:
    """`faults`: what is done in the n-th rollout."""
    asyncrl.training.thread.ThreadedTrainer = _Trainer  # type: ignore[misc, assignment]
    asyncrl.sampling.vllm.VllmSampler = _Sampler  # type: ignore[misc]
    config = asyncrl.Config(
        **SETTINGS,
        model=str(shared / MODEL),
        run_dir=folder,
        sampler={**SAMPLER, **sampler, "kind": "vllm"},
        lora=LORA if lora else {},
        save_model=False,
    )
    return _whole(asyncrl.train(_Rollouts(faults), dataset=ROWS, config=config, evaluation=ROWS[:3], view="plain"))


def _ours(shared: Path, folder: Path, *, lora: bool, replicas: int) -> bool:
    """On servers that the run starts; the first is killed."""

    def plan(config: asyncrl.Config, run_dir: Path, context: int | None, keep: int, key: str) -> list[Launch]:
        command = (sys.executable, "-I", "-S", "-c", STAND_IN, str(shared / STAND_IN_SOCKET))
        return [
            Launch(f"vllm-{index}", port, command, environment(key, on_cpu=True), folder / "logs" / f"{index}.log")
            for index, port in enumerate(pick_ports(0, replicas))
        ]

    def kill() -> None:
        os.killpg(_Sampler.last.servers[0].pid, signal.SIGKILL)

    asyncrl.sampling.vllm.plan = plan
    return _vllm(shared, folder, {6: kill}, lora=lora, replicas=replicas)


def _theirs(shared: Path, folder: Path, *, lora: bool) -> bool:
    """On servers of somebody else, which an earlier run has used. One forgets all, and one is away for a moment."""
    stubs = (StubVllm(), StubVllm())
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="stubs", daemon=True).start()

    def on_their_loop(act: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(act, loop).result(BACK_S)

    async def start() -> list[int]:
        return [await stub.start(0) for stub in stubs]

    ports = on_their_loop(start())

    def forget() -> None:
        stubs[0].adapters.clear()
        stubs[0].version, stubs[0].label = 0, "default"

    async def be_away() -> None:
        await stubs[1].stop()
        await asyncio.sleep(AWAY_S)
        forget()
        await stubs[1].start(ports[1])

    for stub in stubs:
        if lora:
            stub.adapters["policy-v3"] = 3
        else:
            stub.version, stub.label = 3, "3"
    faults = {6: forget, 14: lambda: asyncio.run_coroutine_threadsafe(be_away(), loop)}
    return _vllm(shared, folder, faults, lora=lora, urls=[f"http://127.0.0.1:{port}" for port in ports])  # type: ignore[arg-type]


RUNS: dict[str, Callable[[Path, Path], bool]] = {
    "vllm-lora": lambda shared, folder: _ours(shared, folder, lora=True, replicas=2),
    "vllm-full": lambda shared, folder: _ours(shared, folder, lora=False, replicas=1),
    "vllm-lora-theirs": lambda shared, folder: _theirs(shared, folder, lora=True),
    "vllm-full-theirs": lambda shared, folder: _theirs(shared, folder, lora=False),
    "embedded": _embedded,
    "embedded-resumed": _resumed,
    "embedded-evaluation": _evaluated,
}
"""From the folder that all share, and that of the run."""


# Rollouts


class _Rollouts:
    """Two turns, and the second one is scored. The reward is chance."""

    def __init__(self, faults: dict[int, Callable[[], None]] | None = None) -> None:
        self._faults = faults or {}
        self._begun = 0

    async def __call__(self, prompt: asyncrl.Prompt) -> RolloutSample:
        if not prompt.evaluation:
            self._begun += 1
            if fault := self._faults.get(self._begun):
                fault()
                await _until_whole()
        drawn = await prompt.policy.generate([prompt.index + 20, 1])
        context = [prompt.index + 20, 1, *drawn.tokens]
        await prompt.policy.score(context, 2)
        return RolloutSample.from_completion([prompt.index + 20, 1], drawn, prompt.rng.random())


async def _until_whole() -> None:
    """The fault is noticed, and what was lost is back; if it takes too long, so be it."""
    began = time.monotonic()
    losses = _Sampler.last._fleet.losses
    while time.monotonic() - began < BACK_S and _Sampler.last._fleet.losses == losses:  # noqa: ASYNC110 - there is no event
        await asyncio.sleep(0.01)
    while time.monotonic() - began < BACK_S and not _Sampler.last.whole:  # noqa: ASYNC110 - likewise
        await asyncio.sleep(0.01)


def left_behind(mark: str) -> list[str]:
    """Processes whose environment has `mark`, by their command lines."""
    found = []
    for process in psutil.process_iter():
        try:
            if mark in process.environ().values() and process.pid != os.getpid():
                found.append(" ".join(process.cmdline())[:200])
        except psutil.Error:
            continue
    return found
