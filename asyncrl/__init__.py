"""asyncrl: reinforcement learning of language models on asynchronous rollouts.

    import asyncrl

    async def rollout(prompt: asyncrl.Prompt) -> asyncrl.RolloutSample: ...

    asyncrl.train(rollout, dataset="train.jsonl", config=asyncrl.Config(model="Qwen/Qwen3-0.6B"))

Names are imported when they are first used: `import asyncrl` is quick and loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from asyncrl.agents.tools import Tool, tool
    from asyncrl.config import Config
    from asyncrl.data import Prompt
    from asyncrl.errors import AsyncRLError, RecoverableRolloutError
    from asyncrl.result import TrainResult
    from asyncrl.rollout.evaluation import EvalResult
    from asyncrl.run import evaluate, train, train_async
    from asyncrl.types import Completion, Rollout, RolloutRun, RolloutSample
    from asyncrl.workers import offload

__version__ = "0.1.0"

_HOME = {
    "AsyncRLError": "asyncrl.errors",
    "Completion": "asyncrl.types",
    "Config": "asyncrl.config",
    "EvalResult": "asyncrl.rollout.evaluation",
    "Prompt": "asyncrl.data",
    "RecoverableRolloutError": "asyncrl.errors",
    "Rollout": "asyncrl.types",
    "RolloutRun": "asyncrl.types",
    "RolloutSample": "asyncrl.types",
    "Tool": "asyncrl.agents.tools",
    "TrainResult": "asyncrl.result",
    "evaluate": "asyncrl.run",
    "offload": "asyncrl.workers",
    "tool": "asyncrl.agents.tools",
    "train": "asyncrl.run",
    "train_async": "asyncrl.run",
}

__all__ = [
    "AsyncRLError",
    "Completion",
    "Config",
    "EvalResult",
    "Prompt",
    "RecoverableRolloutError",
    "Rollout",
    "RolloutRun",
    "RolloutSample",
    "Tool",
    "TrainResult",
    "evaluate",
    "offload",
    "tool",
    "train",
    "train_async",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'asyncrl' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
