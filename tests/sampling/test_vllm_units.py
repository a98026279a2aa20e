"""The pure parts of the vLLM sampler: requests, answers, metrics, routing, adapters, the command line."""

from __future__ import annotations

import socket
from importlib import metadata
from pathlib import Path
from typing import Any

import aiohttp
import anyio
import anyio.lowlevel
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncrl.config import Config
from asyncrl.ends import evaluated_weights
from asyncrl.errors import SamplerError, SamplerRequestError
from asyncrl.sampling import launch
from asyncrl.sampling.endpoint import Endpoint
from asyncrl.sampling.fleet import Fleet
from asyncrl.sampling.load import EngineLoad, read_metrics, together
from asyncrl.sampling.params import read_completion, read_scores, refusal, sampling_body, scoring_body
from asyncrl.sampling.replica import Replica
from asyncrl.sampling.routing import AdapterShelf, Router
from asyncrl.sampling.vitals import Comeback, Pulse
from asyncrl.sampling.vllm import VllmSampler
from asyncrl.sampling.vllm_key import RequireKey
from asyncrl.types import SampleRequest, SamplingParams, Weights


def answer(**changes: Any) -> dict[str, Any]:
    choice = {
        "token_ids": [5, 6, 7],
        "logprobs": {"content": [{"logprob": -1.0}, {"logprob": -2.0}, {"logprob": -3.0}]},
        "finish_reason": "stop",
        "weight_versions": [{"version": "3", "start": 0, "end": 1}, {"version": "4", "start": 1, "end": 3}],
    }
    return {"choices": [choice | changes]}


def test_request_says_everything_that_a_server_would_fill_in() -> None:
    params = SamplingParams(max_tokens=50, temperature=0.7, top_p=0.9, top_k=3, stop_token_ids=(2,), seed=11)
    body = sampling_body([1, 2], params, max_tokens=40, model="policy-v3", cache_salt="salt-3")
    assert (body["token_ids"], body["model"], body["cache_salt"]) == ([1, 2], "policy-v3", "salt-3")
    drawn = body["sampling_params"]
    assert (drawn["max_tokens"], drawn["logprobs"], drawn["seed"], drawn["stop_token_ids"]) == (40, 0, 11, [2])
    assert (drawn["temperature"], drawn["top_p"], drawn["top_k"]) == (0.7, 0.9, 3)
    assert (drawn["repetition_penalty"], drawn["min_p"]) == (1.0, 0.0)
    plain = sampling_body([1], SamplingParams(4), max_tokens=4, model=None, cache_salt="salt")
    assert "model" not in plain
    assert "seed" not in plain["sampling_params"]
    scoring = scoring_body([1, 2], model=None, cache_salt="salt")["sampling_params"]
    assert (scoring["temperature"], scoring["prompt_logprobs"], scoring["max_tokens"]) == (1.0, 0, 1)


def test_versions_come_from_spans_or_from_the_adapter() -> None:
    full = read_completion(answer(), version=None)
    assert (full.tokens, full.logprobs, full.versions) == ([5, 6, 7], [-1.0, -2.0, -3.0], [3, 4, 4])
    assert read_completion(answer(), version=9).versions == [9, 9, 9]


@pytest.mark.parametrize(
    "spans",
    [
        None,
        [],
        [{"version": "3", "start": 0, "end": 2}],
        [{"version": "3", "start": 1, "end": 3}],
        [{"version": "updating", "start": 0, "end": 3}],
        [{"version": "default", "start": 0, "end": 1}, {"version": "4", "start": 1, "end": 3}],
    ],
)
def test_tokens_of_unknown_weights_are_refused(spans: Any) -> None:
    with pytest.raises(SamplerRequestError, match="did not say which weights"):
        read_completion(answer(weight_versions=spans), version=None)


@pytest.mark.parametrize("reason", ["abort", "error", None])
def test_fragment_is_never_a_sample(reason: str | None) -> None:
    with pytest.raises(SamplerRequestError, match="ended the request early") as caught:
        read_completion(answer(finish_reason=reason), version=3)
    assert caught.value.recoverable


@pytest.mark.parametrize("changes", [{"logprobs": None}, {"token_ids": [5, 6]}, {"token_ids": [], "logprobs": None}])
def test_tokens_and_logprobs_must_match(changes: dict[str, Any]) -> None:
    with pytest.raises(SamplerRequestError, match="as many of both"):
        read_completion(answer(**changes), version=3)


@pytest.mark.parametrize("said", [None, [], {}, {"choices": []}, {"choices": [{"text": "Hi"}]}])
def test_what_is_no_completion_costs_one_request(said: Any) -> None:
    """A proxy between may answer in vLLM's place, and with status 200."""
    with pytest.raises(SamplerRequestError, match="expected a completion") as caught:
        read_completion(said, version=3)
    assert caught.value.recoverable
    without = {name: part for name, part in answer()["choices"][0].items() if name != "weight_versions"}
    with pytest.raises(SamplerRequestError, match="did not say which weights"):
        read_completion({"choices": [without]}, version=None)


async def test_json_that_breaks_off_costs_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    async def cut(*args: Any, **content: Any) -> tuple[int, str]:
        return 200, '{"choices": [{"token_ids": [1, 2'

    monkeypatch.setattr(Endpoint, "_exchange", cut)
    async with aiohttp.ClientSession() as http:
        with pytest.raises(SamplerRequestError, match=r"JSON that breaks off.*\[1, 2") as caught:
            await Endpoint("http://localhost:1", http).post("/inference/v1/generate", {}, timeout_s=1.0)
    assert caught.value.recoverable


def test_scores_are_those_of_the_prompt_tokens() -> None:
    entries = [None, {"6": {"logprob": -0.5}, "9": {"logprob": -0.1}}, {"7": {"logprob": -1.5}}]
    assert read_scores({"prompt_logprobs": entries}, [5, 6, 7], 1) == [-0.5, -1.5]
    assert read_scores({"prompt_logprobs": entries}, [5, 6, 7], 2) == [-1.5]
    with pytest.raises(SamplerRequestError, match="scored 0 tokens of 3"):
        read_scores({"prompt_logprobs": None}, [5, 6, 7], 1)


@pytest.mark.parametrize(("status", "recoverable"), [(400, False), (404, False), (408, True), (429, True), (503, True)])
def test_status_says_whether_asking_again_helps(status: int, recoverable: bool) -> None:
    error = refusal("vLLM", status, '{"error": {"message": "queue full"}}')
    assert (error.status, error.recoverable) == (status, recoverable)
    assert "queue full" in str(error)
    assert "plain words" in str(refusal("vLLM", status, "plain words"))
    assert "Not Found" in str(refusal("vLLM", status, '{"detail": "Not Found"}'))


METRICS = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
vllm:num_requests_running{engine="0",model_name="/a b"} 3.0
vllm:num_requests_running{engine="1",model_name="/a b"} 2.0
vllm:num_requests_waiting{engine="0",model_name="/a b"} 9.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="/a b",reason="capacity"} 4.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="/a b",reason="deferred"} 5.0
vllm:kv_cache_usage_perc{engine="0",model_name="/a b"} 0.25
vllm:kv_cache_usage_perc{engine="1",model_name="/a b"} 0.5
vllm:num_preemptions_total{engine="0",model_name="/a b"} 7.0
vllm:num_preemptions_created{engine="0",model_name="/a b"} 1.79e+09
vllm:generation_tokens_total{engine="0",model_name="/a b"} 1.234567e+06
"""


def test_a_page_for_browsers_is_told_in_one_line() -> None:
    page = "<!DOCTYPE HTML>\n<html><body>\n<h1>Error</h1>\n<p>File  not found.</p></body></html>"
    assert str(refusal("vLLM at u: /v1/models", 404, page)).endswith("answered HTTP 404: Error File not found.")


def test_servers_of_somebody_else_are_given_the_model_that_is_evaluated(tmp_path: Path) -> None:
    sampler = VllmSampler(Config(model="m"), run_dir=tmp_path, keep_versions=1)

    def weights(model: str, *urls: str, adapter: Path | None = None) -> Weights | None:
        return evaluated_weights(Config(model=model, sampler={"urls": urls}), adapter, sampler)

    folder = str(tmp_path)
    assert weights(folder, "http://u") == Weights(version=1, adapter=False, folder=tmp_path)
    assert weights(folder) is None  # what asyncrl starts holds it already
    assert weights("on/the-hub", "http://u") is None
    assert weights(folder, "http://u", adapter=tmp_path) == Weights(version=1, adapter=True, folder=tmp_path)


def test_load_from_metrics() -> None:
    load = read_metrics(METRICS)
    assert load == EngineLoad(running=5, waiting=4, kv_use=0.5, preemptions=7, generated_tokens=1_234_567)
    assert together([load, EngineLoad(running=1, kv_use=0.75)]) == EngineLoad(6, 4, 0.75, 7, 1_234_567)
    with pytest.raises(ValueError, match="num_requests_running"):
        read_metrics("python_gc_objects_collected_total 1.0\n")


def test_session_stays_and_others_go_where_there_is_room() -> None:
    router = Router(3)
    homes = [router.begin(f"s{index}") for index in range(3)]
    assert sorted(homes) == [0, 1, 2]
    router.end(homes[1])
    assert router.begin("new") == homes[1]
    assert router.begin("s0") == homes[0]
    assert router.in_flight[homes[0]] == 2


def test_sequential_requests_without_session_use_every_replica() -> None:
    router = Router(2)
    used = []
    for _ in range(4):
        used.append(router.begin(""))
        router.end(used[-1])
    assert used == [0, 1, 0, 1]


def test_sessions_of_a_lost_replica_move_and_stay_where_they_went() -> None:
    router = Router(2)
    homes = [router.begin(session) for session in ("a", "b")]
    assert sorted(homes) == [0, 1]
    router.take_out(homes[0])
    assert router.begin("a") == homes[1]
    router.put_in(homes[0])
    assert router.begin("a") == homes[1]
    assert router.begin("c") == homes[0]
    assert router.in_flight[homes[0]] == 2  # what was in flight there is still given back there


def test_pulse_of_a_replica() -> None:
    busy, later = EngineLoad(running=2, generated_tokens=10), EngineLoad(running=2, generated_tokens=11)
    pulse = Pulse(0.0, stuck_s=100.0)
    pulse.answered(busy, 10.0, requests=2)
    pulse.answered(busy, 100.0, requests=2)
    assert pulse.verdict(109.0) is None
    pulse.answered(busy, 110.0, requests=2)
    assert pulse.verdict(110.0) == "its engine has drawn no token for 100 s, though requests are with it"
    pulse.answered(later, 111.0, requests=2)
    for _ in range(2):  # one that is answered makes good for those that were not
        pulse.silent()
        pulse.silent()
        assert pulse.verdict(140.0) is None
        pulse.answered(later, 140.0, requests=0)
    for _ in range(3):
        pulse.silent()
    assert pulse.verdict(140.0) == "it has not answered for 30 s"
    for second in range(141, 400, 20):
        pulse.answered(later, float(second), requests=0)  # idle: nothing should move
        assert pulse.verdict(second + 10.0) is None
    pulse.refused()
    assert pulse.verdict(401.0) is None
    pulse.answered(later, 402.0, requests=0)
    pulse.refused()
    assert pulse.verdict(402.0) is None
    pulse.refused()
    assert pulse.verdict(402.0) == "it takes no connections"


def test_comeback_waits_longer_after_each_death_without_an_answer() -> None:
    comeback = Comeback()
    delays = []
    for served in (True, False, False, False, False, True, False):
        comeback.lost(served=served)
        delays.append(comeback.delay_s)
    assert delays == [0.0, 1.0, 2.0, 4.0, 8.0, 0.0, 1.0]
    for _ in range(20):
        comeback.lost(served=False)
    assert (comeback.delay_s, comeback.hopeless) == (60.0, True)


async def test_the_key_opens_every_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["path"])

    async def send(message: Any) -> None:
        seen.append(message.get("status") or message.get("code"))

    async def ask(path: str, header: bytes | None = None, kind: str = "http") -> Any:
        headers = [(b"authorization", header)] if header is not None else []
        await RequireKey(app)({"type": kind, "path": path, "headers": headers}, None, send)  # type: ignore[arg-type]
        answers = [answer for answer in seen if answer is not None]
        seen.clear()
        return answers[0]

    assert await ask("/collective_rpc", b"Bearer secret") == "/collective_rpc"
    for wrong in (None, b"", b"Bearer ", b"Bearer secre", b"secret", b"Bearer s\xe9cret"):
        assert await ask("/collective_rpc", wrong) == 401
    assert await ask("/metrics") == "/metrics"
    assert await ask("/health/..") == 401
    assert await ask("/v1/realtime", kind="websocket") == 1008


@given(st.lists(st.integers(0, 30), max_size=200), st.integers(1, 5))
def test_routing_is_balanced_and_sticky(sessions: list[int], replicas: int) -> None:
    router, homes = Router(replicas), dict[int, int]()
    for session in sessions:
        home = router.begin(str(session))
        assert homes.setdefault(session, home) == home
    assert sum(router.in_flight) == len(sessions)
    assert max(homes.values(), default=0) < replicas


def test_newest_adapters_stay_and_used_ones_too() -> None:
    shelf = AdapterShelf(keep=2)
    assert 0 in shelf
    assert not shelf.has_adapter(0)
    shelf.add(1)
    shelf.begin(1)
    for version in (2, 3, 4):
        shelf.add(version)
    assert shelf.newest == 4
    assert shelf.take_drained() == [2]
    assert [version for version in range(5) if version in shelf] == [0, 1, 3, 4]
    shelf.end(1)
    assert shelf.take_drained() == [1]
    assert 1 not in shelf


def test_first_adapter_may_be_version_zero() -> None:
    shelf = AdapterShelf(keep=1)
    shelf.add(0)
    assert shelf.has_adapter(0)
    shelf.add(1)
    assert shelf.take_drained() == [0]
    assert 0 not in shelf


def command(on_cpu: bool, **settings: Any) -> list[str]:
    config = Config(model="some/model", **settings)
    return list(launch.command(config, on_cpu=on_cpu, context_tokens=4096, keep_versions=4))


def value(words: list[str], flag: str) -> str:
    return words[words.index(flag) + 1]


def test_command_on_a_cpu() -> None:
    words = command(True, sampler={"kind": "vllm", "kv_cache_bytes": 1 << 20, "extra_args": ["--foo", "1"]})
    assert value(words, "--model") == "some/model"
    assert value(words, "--dtype") == "float32"
    assert value(words, "--kv-cache-memory-bytes") == str(1 << 20)
    assert value(words, "--max-model-len") == "4096"
    assert value(words, "--logprobs-mode") == "processed_logprobs"
    assert value(words, "--host") == "127.0.0.1"
    assert "--enable-lora" not in words
    assert words[-2:] == ["--foo", "1"]


def test_command_on_a_gpu() -> None:
    words = command(False, sampler={"kind": "vllm", "max_running": 32}, lora={"rank": 12}, max_seq_len=999)
    assert words[1:5] == ["-m", "vllm.entrypoints.cli.main", "serve", "some/model"]
    assert value(words, "--dtype") == "bfloat16"
    assert value(words, "--gpu-memory-utilization") == "0.45"
    assert (value(words, "--max-model-len"), value(words, "--max-num-seqs")) == ("999", "32")
    assert (value(words, "--max-lora-rank"), value(words, "--max-loras")) == ("16", "5")
    assert "--enforce-eager" not in words


def test_no_two_replicas_draw_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM draws what has no seed of its own from one generator; nor do runs of a sweep share a stream."""
    monkeypatch.setattr(launch, "installed_for_cpu", lambda: True)
    seeds = []
    for seed in (0, 1, 2**32 - 1):
        config = Config(model="some/model", seed=seed, sampler={"kind": "vllm", "replicas": 3})
        seeds += [int(value(list(each.command), "--seed")) for each in launch.plan(config, tmp_path, 4096, 2, "key")]
    assert len(set(seeds)) == 9
    assert all(0 <= seed < 2**32 for seed in seeds)


def test_rank_that_vllm_does_not_serve() -> None:
    with pytest.raises(SamplerError, match=r"lora\.rank is 1000.*512"):
        command(False, lora={"rank": 1000})


def test_replicas_take_the_last_gpus_first() -> None:
    assert launch.spread_over_gpus(2, ["0", "1", "2"], ()) == [
        {"CUDA_VISIBLE_DEVICES": "2"},
        {"CUDA_VISIBLE_DEVICES": "1"},
    ]
    assert launch.spread_over_gpus(1, ["0"], ()) == [{}]
    assert launch.spread_over_gpus(1, ["0", "1"], ("--tensor-parallel-size", "2")) == [{}]


def test_missing_vllm_is_said_with_the_command_that_mends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(launch.metadata, "version", missing)
    with pytest.raises(SamplerError, match=r"not installed.*pip install 'asyncrl\[vllm\]'"):
        launch.installed_for_cpu()


def test_ports_are_free_and_differ(tmp_path: Path) -> None:
    ports = launch.pick_ports(0, 3)
    assert len(set(ports)) == 3
    for port in ports:
        with socket.create_server(("127.0.0.1", port)):
            pass


LOG = """\
(EngineCore pid=2) ERROR 11-21 00:50:52 [core.py:1] torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB
(APIServer pid=1)   File "x.py", line 1
(EngineCore pid=2) WARNING 11-21 00:50:53 [utils.py:9] Low limits can cause errors like OSError: [Errno 24] Too many
RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}
"""


def test_root_error_is_that_of_the_engine() -> None:
    error = launch.root_error(LOG)
    assert error is not None
    assert error.startswith("torch.OutOfMemoryError: CUDA out of memory")
    assert "gpu_memory_utilization" in launch.likely_cause(error)
    assert launch.root_error("all is well\n") is None
    assert launch.likely_cause("ModuleNotFoundError: No module named 'vllm'").startswith("vLLM is not installed")
    assert "sampler.port" in launch.likely_cause("OSError: [Errno 98] Address already in use")
    assert (
        launch.root_error("usage: [x]\nentry.py: error: unrecognized arguments: --no\n")
        == "unrecognized arguments: --no"
    )


@pytest.mark.parametrize(
    "said",
    [
        "ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization`",
        "ValueError: (4.38 GiB KV cache is needed, which is larger than the available KV cache memory (0.25 GiB)",
    ],
)
def test_a_cache_that_is_too_small_is_to_be_raised(said: str) -> None:
    assert "or raise sampler.gpu_memory_utilization (GPU) or sampler.kv_cache_bytes (CPU)" in launch.likely_cause(said)


class StandInEndpoint:
    """Takes two turns of the loop to load weights; answers with the version that is loaded."""

    name = "stand-in"
    version = 0

    async def load_weights(self, version: int, folder: str, in_flight: str) -> None:
        await anyio.lowlevel.checkpoint()
        self.version = version

    async def post(self, path: str, body: object, timeout_s: float | None) -> dict[str, Any]:
        return answer(weight_versions=[{"version": str(self.version), "start": 0, "end": 3}])


async def test_requests_at_the_gate_wait_out_hot_loads_that_follow_each_other(tmp_path: Path) -> None:
    """A request that one hot-load lets go may find the next one under way: it must wait again, not fail."""
    sampler = VllmSampler(Config(model="none"), run_dir=tmp_path, keep_versions=2)
    sampler._fleet = Fleet([Replica(StandInEndpoint())])  # type: ignore[arg-type]
    sampler._live = sampler._live_weights()
    sampler._context = 64
    drawn: list[int] = []

    async def publish() -> None:
        for version in range(1, 6):
            await sampler._live.publish(version, tmp_path)

    async def draw() -> None:
        await anyio.lowlevel.checkpoint()
        completion = await sampler.generate(SampleRequest([1, 2], SamplingParams(4)))
        drawn.append(completion.versions[0])

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(publish)
        for _ in range(4):
            tasks.start_soon(draw)
    assert drawn == [5] * 4
