"""Servers that die, do not start, or must not outlive their owner."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import aiohttp
import psutil
import pytest

from asyncrl.config import Config
from asyncrl.errors import ModelError, SamplerError
from asyncrl.sampling.launch import Launch
from asyncrl.sampling.server import Server, serve
from asyncrl.sampling.vllm import VllmSampler
from asyncrl.types import SampleRequest, SamplingParams
from tests.sampling.contract import TOLERANCE, error, until
from tests.sampling.truth import CONTEXT, NEEDS_VLLM, PROMPT, Truth

LIMIT_S = 60.0
CLOSED = (
    ("GET", "/server_info"),
    ("GET", "/v1/models"),
    ("POST", "/collective_rpc"),
    ("POST", "/pause"),
    ("POST", "/update_weight_version"),
    ("POST", "/v1/load_lora_adapter"),
    ("POST", "/inference/v1/generate"),
)
Test = TypeVar("Test")


def needs_vllm(test: Test) -> Test:
    for mark in NEEDS_VLLM:
        test = mark(test)
    return test


def family(pid: int) -> list[psutil.Process]:
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


async def until_gone(processes: list[psutil.Process]) -> None:
    """Wait until none runs. A zombie has ended, and waits for its parent only."""
    await until_true(lambda: not any(_runs(process) for process in processes))


async def until_true(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(LIMIT_S):
        while True:
            if holds():
                return
            await asyncio.sleep(0.02)


def _runs(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def launch_of(tmp_path: Path, code: str) -> Launch:
    """A stand-in for a server: a Python program, with a child of its own."""
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(code))
    return Launch("vllm-0", _free_port(), (sys.executable, str(program)), {}, tmp_path / "logs" / "vllm-0.log")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


DEAF = """
    import signal, subprocess, sys, time
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    print("started", flush=True)
    time.sleep(600)
"""
OBEDIENT = DEAF.replace("signal.SIG_IGN", "signal.SIG_DFL")


async def until_log_says(launch: Launch, text: str) -> None:
    await until_true(lambda: launch.log.exists() and text in launch.log.read_text())


@pytest.mark.parametrize("code", [OBEDIENT, DEAF], ids=["obedient", "deaf"])
async def test_stop_ends_the_whole_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    monkeypatch.setattr("asyncrl.sampling.server.GRACE_S", 0.3)
    server = Server(launch_of(tmp_path, code))
    await server.start()
    await until_log_says(server.launch, "started")
    processes = family(server.pid)
    assert len(processes) == 3  # guard, server, its worker
    await server.stop()
    await until_gone(processes)


async def test_cancelled_start_leaves_no_process(tmp_path: Path) -> None:
    launch = launch_of(tmp_path, OBEDIENT)

    async def start() -> None:
        async with serve([launch], timeout_s=LIMIT_S):
            raise AssertionError("it never becomes ready")

    task = asyncio.create_task(start())
    await until_log_says(launch, "started")
    guard = next(child for child in psutil.Process().children() if launch.command[1] in child.cmdline())
    processes = family(guard.pid)
    assert len(processes) == 3
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until_gone(processes)


async def test_owner_that_is_killed_leaves_no_process(tmp_path: Path) -> None:
    launch = launch_of(tmp_path, OBEDIENT)
    owner_code = f"""
        import asyncio
        from pathlib import Path
        from asyncrl.sampling.launch import Launch
        from asyncrl.sampling.server import serve

        async def main():
            launch = Launch("vllm-0", {launch.port}, {launch.command!r}, {{}}, Path({str(launch.log)!r}))
            async with serve([launch], 60):
                pass

        asyncio.run(main())
    """
    owner = await asyncio.create_subprocess_exec(
        sys.executable, "-c", textwrap.dedent(owner_code), stdout=asyncio.subprocess.DEVNULL
    )
    await until_log_says(launch, "started")
    processes = family(owner.pid)
    assert len(processes) == 4
    owner.kill()
    await owner.wait()
    await until_gone(processes)


async def test_server_that_ends_while_it_starts_is_named_with_its_log(tmp_path: Path) -> None:
    launch = launch_of(tmp_path, "raise MemoryError('torch.OutOfMemoryError: CUDA out of memory')")
    with pytest.raises(SamplerError, match=r"(?s)vllm-0 at http.*exit code 1.*Out of memory.*gpu_memory.*Traceback"):
        async with serve([launch], timeout_s=LIMIT_S):
            pass


async def test_server_that_is_never_ready(tmp_path: Path) -> None:
    launch = launch_of(tmp_path, "import time; print('loading', flush=True); time.sleep(600)")
    with pytest.raises(SamplerError, match=r"not ready after sampler\.start_timeout_s=1 s"):
        async with serve([launch], timeout_s=1):
            pass


@needs_vllm
async def test_port_that_is_taken_names_who_has_it(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        tmp_path.joinpath("config.json").write_text("{}")
        sampler = VllmSampler(
            Config(model=str(tmp_path), sampler={"kind": "vllm", "port": port}), run_dir=tmp_path, keep_versions=1
        )
        who = f"process {os.getpid()}" if sys.platform == "linux" else ""
        with pytest.raises(SamplerError, match=rf"(?s)port {port}.*{who}.*sampler\.port"):
            await sampler.__aenter__()


@needs_vllm
async def test_model_folder_that_does_not_exist(tmp_path: Path) -> None:
    config = Config(model=str(tmp_path / "nothing"), sampler={"kind": "vllm"})
    with pytest.raises(ModelError, match="does not exist"):
        await VllmSampler(config, run_dir=tmp_path, keep_versions=1).__aenter__()


async def test_url_where_nobody_answers(tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{_free_port()}"
    config = Config(model="any", sampler={"kind": "vllm", "urls": [url]})
    with pytest.raises(SamplerError, match=rf"{url} cannot be used: no connection for /v1/models: [^:]+\. Check"):
        await VllmSampler(config, run_dir=tmp_path, keep_versions=1).__aenter__()


@needs_vllm
async def test_model_without_weights_is_said_so(tmp_path: Path) -> None:
    truth = Truth(tmp_path, kind="llama", tied=False, lora=False)
    truth.base.joinpath("model.safetensors").unlink()
    config = Config(model=str(truth.base), sampler={"kind": "vllm"})
    with pytest.raises(
        SamplerError, match=r"(?s)vllm-0.*ended with exit code 1: .*weights.*The model cannot be opened"
    ):
        await VllmSampler(config, run_dir=tmp_path, keep_versions=1).__aenter__()


@needs_vllm
async def test_servers_that_die_and_hang_while_they_draw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two replicas: of one the engine is killed, the other stops in the middle of everything. Nothing is lost."""
    monkeypatch.setattr("asyncrl.sampling.supervisor.ANSWER_S", 2.0)
    truth = Truth(tmp_path, kind="llama", tied=False, lora=True)
    sampling = {"kind": "vllm", "replicas": 2}
    config = Config(model=str(truth.base), max_seq_len=CONTEXT, sampler=sampling, lora={"rank": 4})
    async with VllmSampler(config, run_dir=tmp_path, keep_versions=2) as sampler:
        mine = truth.subject(sampler)
        for version in (1, 2):
            await sampler.publish(truth.weights(version))
        requests = [SampleRequest(PROMPT, SamplingParams(400), session=str(n), version=1 + n % 2) for n in range(50)]
        tasks = [asyncio.create_task(sampler.generate(request)) for request in requests]
        await until(mine, lambda load: load.running == 50, *tasks)
        processes = [family(server.pid) for server in sampler.servers]
        engine = next(process for process in processes[0] if "EngineCore" in " ".join(process.cmdline()))
        engine.kill()
        await until(mine, lambda load: load.replicas_lost == 1)
        os.killpg(sampler.servers[1].pid, signal.SIGSTOP)
        for n, completion in enumerate(await asyncio.gather(*tasks)):  # sampler.request_timeout_s is their limit
            assert set(completion.versions) == {1 + n % 2}
            assert error(mine, PROMPT, completion, 1 + n % 2) < TOLERANCE
        await until(mine, lambda load: load.replicas_up == 2)
        assert (await sampler.load()).replicas_lost == 2
        scores = await sampler.score(PROMPT, 2)  # of both replicas, which must agree
        assert max(abs(a - b) for a, b in zip(scores, truth.logprobs(PROMPT, 2), strict=True)) < TOLERANCE
        await until_gone([process for group in processes for process in group])
        await check_locks(sampler)


async def check_locks(sampler: VllmSampler) -> None:
    """Whoever has no key can look at the health, and at nothing else."""
    server = sampler.servers[0]
    key = server.launch.env["VLLM_API_KEY"]
    async with aiohttp.ClientSession(server.launch.url) as http:
        for method, path in CLOSED:
            async with http.request(method, path) as answer:
                assert answer.status == 401, path
        async with http.get("/health") as answer:
            assert answer.status == 200
        async with http.get("/server_info", headers={"Authorization": f"Bearer {key}"}) as answer:
            assert answer.status == 200
    assert key not in server.launch.log.read_text()
