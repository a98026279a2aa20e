"""How busy vLLM servers are, from the text of their `/metrics`. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

RUNNING = "vllm:num_requests_running"
WAITING = "vllm:num_requests_waiting_by_reason"
KV_USE = "vllm:kv_cache_usage_perc"
PREEMPTIONS = "vllm:num_preemptions_total"
GENERATED = "vllm:generation_tokens_total"


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """One server, or several together."""

    running: int = 0
    waiting: int = 0
    """For room in the KV cache or in the batch; requests that wait for a LoRA slot are not counted."""
    kv_use: float = 0.0
    """0 to 1, of the fullest server."""
    preemptions: int = 0
    generated_tokens: int = 0

    def since(self, begin: EngineLoad) -> EngineLoad:
        """The same, its counters without what they said at the beginning."""
        return replace(
            self,
            preemptions=max(0, self.preemptions - begin.preemptions),
            generated_tokens=max(0, self.generated_tokens - begin.generated_tokens),
        )


def read_metrics(text: str) -> EngineLoad:
    """The load of one server. A metric with several label sets (data-parallel engines) is summed; KV use is the most.

    Raises `ValueError` when the text has none of vLLM's gauges.
    """
    sums: dict[str, float] = {}
    fullest = 0.0
    for line in text.splitlines():
        if not line.startswith("vllm:"):
            continue
        series, _, value = line.rpartition(" ")
        name, _, labels = series.partition("{")
        if name == KV_USE:
            fullest = max(fullest, float(value))
        elif name in (RUNNING, PREEMPTIONS, GENERATED) or (name == WAITING and 'reason="capacity"' in labels):
            sums[name] = sums.get(name, 0.0) + float(value)
    if RUNNING not in sums:
        raise ValueError(f"no {RUNNING} in the metrics: expected those of a vLLM server with its stats switched on")
    return EngineLoad(
        running=round(sums[RUNNING]),
        waiting=round(sums.get(WAITING, 0)),
        kv_use=fullest,
        preemptions=round(sums.get(PREEMPTIONS, 0)),
        generated_tokens=round(sums.get(GENERATED, 0)),
    )


def together(loads: Iterable[EngineLoad]) -> EngineLoad:
    """Sums over servers; KV use is that of the fullest."""
    every = list(loads)
    return EngineLoad(
        running=sum(load.running for load in every),
        waiting=sum(load.waiting for load in every),
        kv_use=max((load.kv_use for load in every), default=0.0),
        preemptions=sum(load.preemptions for load in every),
        generated_tokens=sum(load.generated_tokens for load in every),
    )
