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
    from asyncrl.agents.environments.gymnasium import GymnasiumEnvironment
    from asyncrl.agents.environments.text import Step, environment_rollout
    from asyncrl.agents.environments.verifiers import verifiers_environment
    from asyncrl.agents.mcp import mcp_tools
    from asyncrl.agents.sandbox import run_python
    from asyncrl.agents.tools import Tool, tool
    from asyncrl.config import Config
    from asyncrl.data import Prompt
    from asyncrl.errors import AsyncRLError, RecoverableRolloutError
    from asyncrl.result import TrainResult
    from asyncrl.rollout.estimate import EvalResult
    from asyncrl.run import evaluate, train, train_async
    from asyncrl.types import Completion, Rollout, RolloutRun, RolloutSample
    from asyncrl.workers import offload

__version__ = "0.1.0"

_HOME = {
    "AsyncRLError": "asyncrl.errors",
    "Completion": "asyncrl.types",
    "Config": "asyncrl.config",
    "EvalResult": "asyncrl.rollout.estimate",
    "GymnasiumEnvironment": "asyncrl.agents.environments.gymnasium",
    "Prompt": "asyncrl.data",
    "RecoverableRolloutError": "asyncrl.errors",
    "Rollout": "asyncrl.types",
    "RolloutRun": "asyncrl.types",
    "RolloutSample": "asyncrl.types",
    "Step": "asyncrl.agents.environments.text",
    "Tool": "asyncrl.agents.tools",
    "TrainResult": "asyncrl.result",
    "environment_rollout": "asyncrl.agents.environments.text",
    "evaluate": "asyncrl.run",
    "mcp_tools": "asyncrl.agents.mcp",
    "offload": "asyncrl.workers",
    "run_python": "asyncrl.agents.sandbox",
    "tool": "asyncrl.agents.tools",
    "train": "asyncrl.run",
    "train_async": "asyncrl.run",
    "verifiers_environment": "asyncrl.agents.environments.verifiers",
}

__all__ = [
    "AsyncRLError",
    "Completion",
    "Config",
    "EvalResult",
    "GymnasiumEnvironment",
    "Prompt",
    "RecoverableRolloutError",
    "Rollout",
    "RolloutRun",
    "RolloutSample",
    "Step",
    "Tool",
    "TrainResult",
    "environment_rollout",
    "evaluate",
    "mcp_tools",
    "offload",
    "run_python",
    "tool",
    "train",
    "train_async",
    "verifiers_environment",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'asyncrl' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
