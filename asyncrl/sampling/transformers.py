"""The embedded sampler: any `transformers` causal LM with ordinary attention, in this process, on CPU, CUDA or MPS.

Decoding runs on a thread of its own, by a small continuous batching written for it (`embedded/`): requests join
between steps, a row that ends makes room at once, and the model's own code runs unchanged over an aligned cache.

Why not what `transformers` has? Tokens per CPU second, 1.67 M parameters, one core, `benchmarks/embedded_sampler.py`:

    64 tokens in, 32 out          1       8      32      64 rows
    `generate`, static batch   1104    4345    5809    5969    fast, but all rows begin and end together
    continuous batching          84     636    1333    1309    right, but made for paged attention on GPUs
    this                       1115    4435    6405    6410
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch

from asyncrl.config import Config, LoraConfig
from asyncrl.errors import SamplerError, SamplerRequestError
from asyncrl.sampling.embedded.batch import Ticket
from asyncrl.sampling.embedded.draw import stream_of_seed
from asyncrl.sampling.embedded.versions import LiveModel, ModelVersions, load_base
from asyncrl.sampling.embedded.worker import Cancel, Publish, Reply, Score, Settings, Stop, Submit, Worker
from asyncrl.types import Completion, Load, SampleRequest, Weights

DEFAULT_CONTEXT_TOKENS = 8192
"""Used where a model names a longer limit or none."""


class TransformersSampler:
    """Implements `asyncrl.types.Sampler` without a server.

    Args:
        model: Name on the Hugging Face hub, or a folder.
        lora: Published weights are adapters of this shape; None or rank 0: whole models.
        device: `auto` is CUDA, then MPS, then CPU.
        dtype: Of weights and cache; `auto` is bfloat16 on GPUs that have it, float32 elsewhere.
        max_running: Most rows that are decoded at once. None: 64 on CPU, 256 elsewhere.
        in_flight: What a hot-load of full weights does to requests that follow the newest version.
        version_policy: `per_rollout` keeps several full models side by side; with LoRA versions always are.
        keep_versions: Newest versions that can be asked for; older ones live on while a request uses them.
        context_tokens: Prompt and completion together. None: what the model allows, at most 8192.
        torch_threads: Threads of one torch operation. None leaves torch's own choice.
        prefill_tokens: Padded prompt tokens of one forward; bounds its memory.
        request_timeout_s: How long one request may take.
        seed: Of the requests that bring none.
        deterministic: What a request that brings a seed gets depends on it and the weights alone, bit by bit: one
            request at a time, and no shared prefixes.
    """

    wants: Literal["tensors", "files"] = "tensors"

    def __init__(
        self,
        model: str,
        *,
        lora: LoraConfig | None = None,
        device: str = "auto",
        dtype: str = "auto",
        max_running: int | None = None,
        in_flight: Literal["interrupt", "keep", "drain"] = "keep",
        version_policy: Literal["per_turn", "per_rollout"] = "per_turn",
        keep_versions: int = 1,
        context_tokens: int | None = None,
        torch_threads: int | None = None,
        prefill_tokens: int = 16384,
        request_timeout_s: float = 600.0,
        seed: int = 0,
        deterministic: bool = False,
    ) -> None:
        self._model = model
        self._device = _choose_device(device)
        self._dtype = _choose_dtype(dtype, self._device)
        self._lora_scale = lora.alpha / lora.rank if lora is not None and lora.rank else None
        self._keep_versions = keep_versions
        self._context_limit = context_tokens
        self._request_timeout_s = request_timeout_s
        self._seed = seed
        self._unseeded = 0
        self._settings = Settings(
            max_running=1 if deterministic else max_running or (64 if self._device.type == "cpu" else 256),
            in_flight=in_flight,
            side_by_side=self._lora_scale is not None or version_policy == "per_rollout",
            prefill_tokens=prefill_tokens,
            torch_threads=torch_threads,
            alone=deterministic,
        )
        self._outbox: list[Ticket] = []
        self._open = 0
        self._versions: ModelVersions | None = None

    @classmethod
    def from_config(cls, config: Config, *, torch_threads: int | None = None) -> TransformersSampler:
        """The sampler of a run. It keeps the versions that may still be trained on, where requests are pinned to
        them, and only the newest one elsewhere.
        """
        side_by_side = config.lora.rank > 0 or config.sampler.version_policy == "per_rollout"
        return cls(
            config.model,
            lora=config.lora,
            device=config.trainer.device,
            dtype=config.trainer.dtype,
            max_running=config.sampler.max_running,
            in_flight=config.sampler.in_flight,
            version_policy=config.sampler.version_policy,
            keep_versions=config.staleness.max_staleness + 2 if side_by_side else 1,
            context_tokens=config.max_seq_len,
            torch_threads=torch_threads,
            request_timeout_s=config.sampler.request_timeout_s,
            seed=config.seed,
            deterministic=config.deterministic,
        )

    @property
    def version(self) -> int:
        """The newest weights that are live."""
        return self._versions.newest if self._versions is not None else 0

    async def __aenter__(self) -> TransformersSampler:
        """Load the model and start the thread.

        Raises:
            ModelError: the model cannot be found or used.
        """
        self._loop = asyncio.get_running_loop()
        self._base: LiveModel = await asyncio.to_thread(load_base, self._model, device=self._device, dtype=self._dtype)
        self._context_tokens = self._context_limit or min(_longest(self._base), DEFAULT_CONTEXT_TOKENS)
        self._versions = ModelVersions(self._base, keep=self._keep_versions, lora_scale=self._lora_scale)
        self._worker = Worker(self._versions, self._settings, self._deliver_from_worker)
        self._worker.thread.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        """End the thread; whoever still waits gets a `SamplerError`."""
        self._worker.inbox.put(Stop())
        await asyncio.to_thread(self._worker.thread.join, self._request_timeout_s)
        if self._worker.thread.is_alive():
            raise SamplerError(
                f"the sampler's thread did not end within {self._request_timeout_s:g} s: one decode step takes longer "
                "than that, or the device hangs."
            )

    async def generate(self, request: SampleRequest) -> Completion:
        """Draw one completion. Cancelling this call frees its row at the next decode step.

        Raises:
            SamplerRequestError: the request cannot be served, or took too long.
            SamplerError: the sampler died.
        """
        ticket = self._ticket(request)
        # All requests of one turn of the event loop go to the worker together, so that they share a prefill.
        if not self._outbox:
            self._loop.call_soon(self._flush)
        self._outbox.append(ticket)
        self._open += 1
        try:
            async with asyncio.timeout(self._request_timeout_s):
                return await ticket.reply
        except TimeoutError:
            raise SamplerRequestError(
                f"a request of {len(ticket.prompt)} prompt tokens and at most {ticket.max_tokens} new ones took longer "
                f"than sampler.request_timeout_s={self._request_timeout_s:g}. Raise it, or lower sampling.max_tokens."
            ) from None
        finally:
            self._open -= 1
            if ticket.reply.cancelled():
                self._worker.inbox.put(Cancel(ticket))

    async def score(
        self, token_ids: Sequence[int], version: int, *, start: int = 1, session: str | None = None
    ) -> list[float]:
        """Log-probs [N - start] of `token_ids[start:]` under the weights of `version`, at temperature 1.

        Raises:
            SamplerRequestError: the version is not loaded, or the answer took too long.
        """
        ids = self._checked_ids(token_ids)
        reply: asyncio.Future[list[float]] = self._loop.create_future()
        self._send(Score(ids, start, version, session or "", reply), reply)
        try:
            async with asyncio.timeout(self._request_timeout_s):
                return await reply
        except TimeoutError:
            raise SamplerRequestError(
                f"scoring {len(token_ids)} tokens took longer than sampler.request_timeout_s="
                f"{self._request_timeout_s:g}. Raise it."
            ) from None

    async def publish(self, weights: Weights) -> None:
        """Make `weights` live between two decode steps. The tensors are taken over: nobody may write to them later.

        Waits as long as `in_flight="drain"` needs; the caller sets the limit.

        Raises:
            SamplerError: the tensors are not those of this model.
        """
        assert self._versions is not None, "publish before the sampler was entered"
        model = await asyncio.to_thread(self._versions.prepare, weights)
        done: asyncio.Future[None] = self._loop.create_future()
        self._send(Publish(model, done), done)
        await done

    @contextlib.contextmanager
    def hold(self) -> Iterator[int]:
        """Keep the newest version live while the block lasts. Of full weights that is one more copy in memory."""
        assert self._versions is not None, "hold before the sampler was entered"
        version = self._versions.hold()
        try:
            yield version
        finally:
            self._versions.release(version)

    async def load(self) -> Load:
        """How busy the sampler is, now. Only requests that find no row wait; the others join at the next step."""
        return Load(
            running=self._worker.running,
            waiting=max(0, self._open - self._settings.max_running),
            generated_tokens=self._worker.generated_tokens,
        )

    def _ticket(self, request: SampleRequest) -> Ticket:
        prompt, params = self._checked_ids(request.token_ids), request.params
        room = self._context_tokens - len(prompt)
        if room < 1:
            raise SamplerRequestError(
                f"the prompt has {len(prompt)} tokens and the context {self._context_tokens}, which leaves no room for "
                "an answer. Shorten the prompt, or raise max_seq_len if the model allows.",
                status=400,
                recoverable=False,
            )
        if params.max_tokens < 1:
            raise SamplerRequestError(
                f"max_tokens is {params.max_tokens}; at least 1 token must be drawn.", status=400, recoverable=False
            )
        return Ticket(
            prompt=prompt,
            params=params,
            max_tokens=min(params.max_tokens, room),
            stream=stream_of_seed(self._next_seed(request.session) if params.seed is None else params.seed),
            version=request.version,
            reply=self._loop.create_future(),
            session=request.session,
        )

    def _next_seed(self, session: str) -> int:
        """Made of the session too: a run that is resumed counts from 0 again, and must not draw the same once more."""
        self._unseeded += 1
        return random.Random(f"{self._seed}/{session}/{self._unseeded}").getrandbits(63)

    def _checked_ids(self, token_ids: Sequence[int]) -> np.ndarray:
        ids = np.asarray(token_ids, dtype=np.int64)
        if not len(ids) or ids.min() < 0 or ids.max() >= self._base.vocabulary:
            found = f"ids from {ids.min()} to {ids.max()}" if len(ids) else "no tokens"
            raise SamplerRequestError(
                f"found {found} in the prompt; expected at least one token id in [0, {self._base.vocabulary}). "
                "Does the tokenizer belong to this model?",
                status=400,
                recoverable=False,
            )
        return ids

    def _flush(self) -> None:
        tickets = [ticket for ticket in self._outbox if not ticket.reply.cancelled()]
        self._outbox.clear()
        self._send(Submit(tickets), *(ticket.reply for ticket in tickets))

    def _send(self, command: Submit | Publish | Score, *replies: asyncio.Future[Any]) -> None:
        self._worker.inbox.put(command)
        # Looked at after the put: the worker sets it before it empties its inbox for the last time.
        if self._worker.failure is not None:
            _deliver([Reply(reply, error=self._worker.failure) for reply in replies])

    def _deliver_from_worker(self, replies: list[Reply]) -> None:
        """Called on the worker's thread. A loop that is closed has nobody left to tell."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(_deliver, replies)


def _deliver(replies: Sequence[Reply]) -> None:
    for reply in replies:
        if reply.future.done():
            continue
        if reply.error is not None:
            reply.future.set_exception(reply.error)
        else:
            reply.future.set_result(reply.result)


def _longest(base: LiveModel) -> int:
    text = base.module.config.get_text_config(decoder=True)  # type: ignore[operator, union-attr]
    return getattr(text, "max_position_embeddings", None) or DEFAULT_CONTEXT_TOKENS


def _choose_device(name: str) -> torch.device:
    if name != "auto":
        return torch.device(name)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def _choose_dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":  # as the trainer: older GPUs only emulate bfloat16
        bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if bfloat16 else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
