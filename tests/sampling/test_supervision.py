"""Replicas that die, hang, stall or come back empty, played by `stub_vllm.py`: real processes, short limits."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import textwrap
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest
from structlog.testing import capture_logs

from asyncrl.config import Config
from asyncrl.errors import SamplerError, SamplerRequestError
from asyncrl.sampling.launch import Launch, environment, pick_ports
from asyncrl.sampling.vllm import VllmSampler
from asyncrl.types import Completion, Load, Probe, SampleRequest, SamplingParams, Weights
from tests.sampling import stub_vllm
from tests.sampling.stub_vllm import POISON, StubVllm

LIMIT_S = 60.0


@pytest.fixture(autouse=True)
def short_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of real servers are tens of seconds."""
    for where, value in {
        "server.POLL_S": 0.02,
        "server.GRACE_S": 0.5,
        "supervisor.WATCH_EVERY_S": 0.05,
        "supervisor.ANSWER_S": 0.3,
        "supervisor.POLL_S": 0.05,
        "vitals.LONGEST_DELAY_S": 0.05,
        "replica.EXIT_NOTICE_S": 1.5,
    }.items():
        monkeypatch.setattr(f"asyncrl.sampling.{where}", value)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the stubs that the sampler starts look into."""

    def plan(config: Config, run_dir: Path, context: int | None, keep: int, key: str) -> list[Launch]:
        program = (sys.executable, stub_vllm.__file__, str(tmp_path))
        return [
            Launch(f"vllm-{index}", port, program, environment(key, on_cpu=True), tmp_path / "logs" / f"{index}.log")
            for index, port in enumerate(pick_ports(0, config.sampler.replicas))
        ]

    monkeypatch.setattr("asyncrl.sampling.vllm.plan", plan)
    return tmp_path


@asynccontextmanager
async def started(
    folder: Path, *, replicas: int = 2, lora: bool = True, keep: int = 3, **settings: Any
) -> AsyncIterator[VllmSampler]:
    sampler = {"kind": "vllm", "replicas": replicas, "start_timeout_s": LIMIT_S, **settings}
    config = Config(model="base", sampler=sampler, lora={"rank": 4 if lora else 0}, publish={"timeout_s": 20})
    async with asyncio.timeout(LIMIT_S), VllmSampler(config, run_dir=folder, keep_versions=keep) as subject:
        yield subject


@asynccontextmanager
async def attached(*stubs: StubVllm, lora: bool, **settings: Any) -> AsyncIterator[tuple[VllmSampler, list[int]]]:
    """A sampler on servers of somebody else, and their ports."""
    ports = [await stub.start(0) for stub in stubs]
    urls = [f"http://127.0.0.1:{port}" for port in ports]
    config = Config(model="base", sampler={"kind": "vllm", "urls": urls, **settings}, lora={"rank": 4 if lora else 0})
    try:
        async with asyncio.timeout(LIMIT_S), VllmSampler(config, run_dir=Path("none"), keep_versions=3) as subject:
            yield subject, ports
    finally:
        for stub in stubs:
            await stub.stop()


def weights(folder: Path, version: int, *, lora: bool = True) -> Weights:
    made = folder / f"v{version}"
    made.mkdir(exist_ok=True)
    logprob = -(version + 1) / 10
    return Weights(version, adapter=lora, folder=made, probe=Probe((1, 2, 3), (logprob, logprob)))


async def draw(
    sampler: VllmSampler, *, tokens: int = 5, session: str = "", version: int | None = None, prompt: int = 7
) -> Completion:
    """One completion, from the weights that it says that it is from."""
    request = SampleRequest([prompt], SamplingParams(tokens), session=session, version=version)
    completion = await sampler.generate(request)
    assert [token - 100 for token in completion.tokens] == list(completion.versions)
    return completion


async def play(sampler: VllmSampler, place: int, **faults: Any) -> None:
    server = sampler.servers[place]
    headers = {"Authorization": f"Bearer {server.launch.env['VLLM_API_KEY']}"}
    async with (
        aiohttp.ClientSession(headers=headers) as http,
        http.post(f"{server.launch.url}/play", json=faults) as ok,
    ):
        assert ok.status == 200


async def until(holds: Callable[[], bool]) -> None:
    while True:
        if holds():
            return
        await asyncio.sleep(0.01)


async def until_load(sampler: VllmSampler, holds: Callable[[Load], bool]) -> None:
    while True:
        if holds(await sampler.load()):
            return
        await asyncio.sleep(0.01)


async def until_up(sampler: VllmSampler, replicas: int) -> None:
    await until_load(sampler, lambda load: load.replicas_up == replicas)


def kill(sampler: VllmSampler, place: int, how: signal.Signals = signal.SIGKILL) -> None:
    os.killpg(sampler.servers[place].pid, how)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP], ids=["killed", "ended", "hangs"])
async def test_what_was_in_flight_is_drawn_on_another_replica(folder: Path, how: signal.Signals) -> None:
    async with started(folder) as sampler:
        await sampler.publish(weights(folder, 1))
        await asyncio.gather(*(draw(sampler, tokens=50, session=f"early{n}") for n in range(20)))
        await until_load(sampler, lambda load: load.generated_tokens == 1000)
        tasks = [asyncio.create_task(draw(sampler, tokens=100, session=f"s{n}")) for n in range(20)]
        await until_load(sampler, lambda load: load.running == 20)
        pids = [server.pid for server in sampler.servers]
        kill(sampler, 0, how)
        assert {completion.versions[0] for completion in await asyncio.gather(*tasks)} == {1}
        await until_up(sampler, 2)
        load = await sampler.load()
        assert (load.replicas_lost, load.running) == (1, 0)
        assert load.generated_tokens >= 3000  # those of the lost server are not forgotten
        assert sampler.servers[0].pid != pids[0]
        assert sampler.servers[1].pid == pids[1]
        sessions = [await draw(sampler, session=f"new{n}") for n in range(4)]  # on both: it serves again
        assert {completion.versions[0] for completion in sessions} == {1}


@pytest.mark.parametrize("fault", ["deaf", "stuck"])
async def test_server_that_lives_but_does_not_serve_is_started_again(folder: Path, fault: str) -> None:
    """Nothing answers; or the HTTP side answers, and no token comes."""
    async with started(folder, request_timeout_s=6) as sampler:
        await play(sampler, 0, **{fault: True})
        drawn = await asyncio.gather(*(draw(sampler, tokens=50) for _ in range(6)))
        assert len(drawn) == 6
        await until_up(sampler, 2)
        assert (await sampler.load()).replicas_lost == 1


async def test_busy_or_idle_server_is_left_alone(folder: Path) -> None:
    async with started(folder, replicas=1, request_timeout_s=2) as sampler:
        await asyncio.sleep(0.7)  # idle for longer than a stuck engine is waited for
        await asyncio.gather(*(draw(sampler, tokens=200, session=str(n)) for n in range(3)))
        assert (await sampler.load()).replicas_lost == 0


async def test_it_comes_back_with_every_adapter_that_is_in_use(folder: Path) -> None:
    async with started(folder, keep=2) as sampler:
        await sampler.publish(weights(folder, 1))
        with sampler.hold() as held:
            for version in (2, 3, 4, 5):
                await sampler.publish(weights(folder, version))
            for place in (0, 1):
                kill(sampler, place)
                await until(lambda: len(sampler._fleet.up) == 1)
                await until_up(sampler, 2)
            for n in range(6):
                for version in (held, 4, 5):
                    assert set((await draw(sampler, session=str(n), version=version)).versions) == {version}
            with pytest.raises(SamplerRequestError, match="version 3 is not live"):
                await draw(sampler, version=3)


async def test_version_whose_files_are_gone_is_given_up(folder: Path) -> None:
    async with started(folder, replicas=1, keep=1) as sampler:
        await sampler.publish(weights(folder, 1))
        with sampler.hold() as held:
            await sampler.publish(weights(folder, 2))
            assert held == 1
            (folder / "v1").rmdir()
            kill(sampler, 0)
            assert set((await draw(sampler)).versions) == {2}
            with pytest.raises(SamplerRequestError, match="version 1 is not live") as caught:
                await draw(sampler, version=1)
            assert caught.value.recoverable
        await sampler.publish(weights(folder, 3))


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
async def test_publications_and_deaths_at_the_same_time(folder: Path, lora: bool) -> None:
    """Versions never go back, whatever dies while the next ones are published."""
    async with started(folder, lora=lora) as sampler:
        done = False

        async def keep_drawing(session: str) -> int:
            count = 0
            while not done:
                before = sampler.version
                completion = await draw(sampler, tokens=3, session=session)
                assert completion.versions[0] >= before
                count += 1
            return count

        tasks = [asyncio.create_task(keep_drawing(str(n))) for n in range(8)]
        for version in range(1, 25):
            await sampler.publish(weights(folder, version, lora=lora))
            assert sampler.version == version
            if version % 4 == 0:
                kill(sampler, version // 4 % 2)
            await asyncio.sleep(0.03)
        await until_up(sampler, 2)
        done = True
        assert min(await asyncio.gather(*tasks)) > 3
        assert (await sampler.load()).replicas_lost >= 3
        scores = await sampler.score([1, 2, 3], 24)  # both replicas, which must agree
        assert scores == [-2.5, -2.5]


async def test_replica_that_cannot_take_a_version_is_lost_and_the_others_go_on(folder: Path) -> None:
    async with started(folder, lora=False) as sampler:
        await play(sampler, 0, refuses=True)
        await sampler.publish(weights(folder, 1, lora=False))
        assert set((await draw(sampler)).versions) == {1}
        await until_up(sampler, 2)
        assert await sampler.score([1, 2, 3], 1) == [-0.2, -0.2]
        for place in (0, 1):
            await play(sampler, place, refuses=True)
        with pytest.raises(SamplerError, match=r"version 2 of the weights could not be made .*HTTP 500: no room"):
            await sampler.publish(weights(folder, 2, lora=False))


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
async def test_publication_waits_where_all_are_down(folder: Path, lora: bool) -> None:
    async with started(folder, replicas=1, lora=lora) as sampler:
        kill(sampler, 0)
        await until(lambda: not sampler._fleet.up)
        await sampler.publish(weights(folder, 1, lora=lora))
        assert await sampler.score([1, 2, 3], 1) == [-0.2, -0.2]


async def test_poison_does_not_go_round_for_ever(folder: Path) -> None:
    async with started(folder) as sampler:
        with pytest.raises(SamplerRequestError, match=r"was with 3 replicas.*may be what ends them.*SIGKILL") as caught:
            await draw(sampler, prompt=POISON)
        assert caught.value.recoverable
        await until_up(sampler, 2)
        assert (await sampler.load()).replicas_lost == 3
        await draw(sampler)


async def test_outage_ends_with_what_died_and_why(folder: Path) -> None:
    async with started(folder, outage_timeout_s=0.5, request_timeout_s=40) as sampler:
        (folder / "slow").touch()
        for place in (0, 1):
            kill(sampler, place)
        tasks = [asyncio.create_task(draw(sampler)) for _ in range(3)]
        publication = asyncio.create_task(sampler.publish(weights(folder, 1)))
        failures = await asyncio.gather(publication, *tasks, return_exceptions=True)
        for failure in failures:
            assert isinstance(failure, SamplerError)
            for said in ("sampler.outage_timeout_s", "vllm-0", "vllm-1", "SIGKILL", str(folder / "logs")):
                assert said in str(failure)
        with pytest.raises(SamplerError, match="outage_timeout_s"):
            await sampler.load()


async def test_crash_loop_does_not_wait_for_the_whole_outage(folder: Path) -> None:
    async with started(folder, outage_timeout_s=600) as sampler:
        (folder / "broken").touch()
        for place in (0, 1):
            kill(sampler, place)
        with pytest.raises(SamplerError, match=r"(?s)died 3 times in a row.*out of memory.*gpu_memory_utilization"):
            await draw(sampler)


async def test_replica_with_other_weights_never_serves(folder: Path) -> None:
    async with started(folder) as sampler:
        await sampler.publish(weights(folder, 1))
        (folder / "wrong").touch()
        kill(sampler, 0)
        await until(lambda: "disagree on version 1" in sampler._fleet.replicas[0].cause)
        assert (await sampler.load()).replicas_up == 1
        (folder / "wrong").unlink()
        await until_up(sampler, 2)


async def test_others_have_no_key_to_our_servers(folder: Path) -> None:
    async with started(folder, replicas=1) as sampler:
        launch = sampler.servers[0].launch
        key = launch.env["VLLM_API_KEY"]
        assert len(key) >= 32
        assert key not in repr(launch)
        for process in family(sampler.servers[0].pid):
            assert key not in " ".join(process.cmdline())


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
async def test_server_that_its_owner_restarted_is_given_the_weights_again(folder: Path, lora: bool) -> None:
    """It answers all the time but for a moment, and has forgotten everything."""
    first, other = StubVllm(), StubVllm()
    async with attached(first, other, lora=lora) as (sampler, ports):
        await sampler.publish(weights(folder, 1, lora=lora))
        await sampler.publish(weights(folder, 2, lora=lora))
        first.adapters.clear()
        first.version, first.label = 0, "default"
        completions = await asyncio.gather(*(draw(sampler, session=str(n)) for n in range(10)))
        assert {completion.versions[0] for completion in completions} == {2}
        await until_up(sampler, 2)
        assert (await sampler.load()).replicas_lost == 1
        assert len(sampler.urls) == len(ports)
        assert await sampler.score([1, 2, 3], 2) == [-0.3, -0.3]
        first.drawn.clear()
        for n in range(4):
            await draw(sampler, session=f"new{n}")
        assert first.drawn


async def test_request_leaves_a_server_of_somebody_else_that_hangs() -> None:
    """Nobody kills that one: its connections stay open, and only we can leave them."""
    first, other = StubVllm(), StubVllm()
    async with attached(first, other, lora=True) as (sampler, _):
        first.deaf = True
        assert len(await asyncio.gather(*(draw(sampler, session=str(n)) for n in range(6)))) == 6
        load = await sampler.load()
        assert (load.replicas_up, load.replicas_lost) == (1, 1)
        first.deaf = False
        await until_up(sampler, 2)


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
async def test_comeback_in_the_middle_of_a_publication(folder: Path, lora: bool) -> None:
    """Whoever comes back while the others load the next version must have it too before it serves."""
    first, other = StubVllm(), StubVllm()
    async with attached(first, other, lora=lora) as (sampler, ports):
        await sampler.publish(weights(folder, 1, lora=lora))
        await other.stop()
        await until_up(sampler, 1)
        first.loading.clear()
        publication = asyncio.create_task(sampler.publish(weights(folder, 2, lora=lora)))
        await other.start(ports[1])
        other.adapters.clear()
        other.version, other.label = 0, "default"
        await until(lambda: other.adapters.get("policy-v1") == 1 if lora else other.label == "0")
        await asyncio.sleep(0.3)  # it is ready, and would serve now if nobody looked
        assert not publication.done()
        first.loading.set()
        await publication
        await until_up(sampler, 2)
        for stub in (first, other):
            assert 2 in stub.adapters.values() if lora else stub.version == 2
        assert await sampler.score([1, 2, 3], 2) == [-0.3, -0.3]


async def test_no_completion_is_ahead_of_the_versions_that_are_live(folder: Path) -> None:
    """One replica has the next weights and goes on drawing, another still loads them."""
    first, other = StubVllm(), StubVllm()
    async with attached(first, other, lora=False) as (sampler, _):
        await sampler.publish(weights(folder, 1, lora=False))
        other.loading.clear()
        first.seconds_per_token = other.seconds_per_token = 0.02
        tasks = [asyncio.create_task(draw(sampler, tokens=20, session=str(n))) for n in range(2)]
        await until_load(sampler, lambda load: load.running == 2)
        publication = asyncio.create_task(sampler.publish(weights(folder, 2, lora=False)))
        await until(lambda: first.drawn == ["2"])
        await asyncio.sleep(0.1)
        assert [sampler.version, publication.done(), *(task.done() for task in tasks)] == [1, False, False, False]
        other.loading.set()
        assert [set((await task).versions) for task in tasks] == [{2}, {2}]
        assert sampler.version == 2


async def test_server_of_somebody_else_that_was_away(folder: Path) -> None:
    first, other = StubVllm(), StubVllm()
    async with attached(first, other, lora=True) as (sampler, ports):
        await sampler.publish(weights(folder, 1))
        await first.stop()
        await until_up(sampler, 1)
        await asyncio.gather(*(draw(sampler, session=str(n)) for n in range(10)))
        await sampler.publish(weights(folder, 2))
        await first.start(ports[0])
        await until_up(sampler, 2)
        assert set(first.adapters) == {"policy-v1", "policy-v2"}


async def test_server_of_somebody_else_has_served_others_before() -> None:
    stub = StubVllm()
    stub.generated = 1000
    async with attached(stub, lora=True, outage_timeout_s=0.2) as (sampler, ports):
        await draw(sampler, tokens=5)
        await until_load(sampler, lambda load: load.generated_tokens == 5)
        await stub.stop()  # the way to it is lost; what it has counted is not
        await until_up(sampler, 0)
        await stub.start(ports[0])
        await until_up(sampler, 1)
        await draw(sampler, tokens=5)
        await until_load(sampler, lambda load: load.generated_tokens == 10)


@pytest.mark.parametrize(
    ("faults", "words"),
    [
        ({"key": "theirs"}, r"cannot be used: /v1/models answered HTTP 401.*into the variable VLLM_API_KEY"),
        ({"models": {"data": [{"id": "qwen3:0.6b", "object": "model"}]}}, r"is no vLLM server.*'qwen3:0.6b'"),
        ({"models": []}, r"is no vLLM server.*answers \[\]"),
    ],
)
async def test_what_is_not_a_server_for_us_is_said_so(faults: dict[str, Any], words: str) -> None:
    stub = StubVllm()
    for name, value in faults.items():
        setattr(stub, name, value)
    with pytest.raises(SamplerError, match=words):
        async with attached(stub, lora=True):
            pass


@pytest.mark.parametrize(("model", "warned"), [("base", False), ("another/base", True)])
async def test_adapters_over_a_model_of_another_name(model: str, warned: bool) -> None:
    stub = StubVllm()
    stub.models = {"data": [{"id": "policy", "root": model, "max_model_len": 256}]}
    with capture_logs() as logs:
        async with attached(stub, lora=True):
            pass
    assert [log["found"] for log in logs if log["event"].startswith("vllm serves a model")] == [model] * warned


async def test_nothing_stays_in_the_folder_for_temporary_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = folder / "tmp"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    async with started(folder, replicas=1) as sampler:
        for how in (signal.SIGKILL, signal.SIGSTOP):  # the guard is killed with it; the server hangs, and is killed
            [made] = scratch.iterdir()
            assert (made / "left").read_text() == "by a stub"
            kill(sampler, 0, how)
            await until_up(sampler, 0)
            await until_up(sampler, 1)
            assert not made.exists()
    assert not list(scratch.iterdir())


async def test_restarted_server_ends_with_an_owner_that_is_killed(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    program = (sys.executable, "-c", "import time; print('started', flush=True); time.sleep(600)")
    log = tmp_path / "vllm-0.log"
    owner_code = f"""
        import asyncio, os, signal
        from pathlib import Path
        from asyncrl.sampling.launch import Launch
        from asyncrl.sampling.server import Server

        async def main():
            server = Server(Launch("vllm-0", {port}, {program!r}, {{}}, Path({str(log)!r})))
            await server.start()
            os.killpg(server.pid, signal.SIGSTOP)
            await server.start()
            await asyncio.sleep(600)

        asyncio.run(main())
    """
    owner = await asyncio.create_subprocess_exec(sys.executable, "-c", textwrap.dedent(owner_code))
    async with asyncio.timeout(LIMIT_S):
        await until(lambda: log.exists() and "started" in log.read_text() and len(family(owner.pid)) == 3)
        processes = family(owner.pid)
        owner.kill()
        await owner.wait()
        await until(lambda: not any(runs(process) for process in processes))


def family(pid: int) -> list[psutil.Process]:
    process = psutil.Process(pid)
    return [process, *(child for child in process.children(recursive=True) if runs(child))]


def runs(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
