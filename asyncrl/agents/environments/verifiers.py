"""A `verifiers` environment as dataset rows and a rollout function. `pip install 'asyncrl[verifiers]'`

    env = vf.load_environment(vf.resolve_env_config({"taskset": {"id": "my-tasks"}}))
    rows, rollout = asyncrl.verifiers_environment(env)
    asyncrl.train(rollout, dataset=rows, config=config)

An episode runs as verifiers runs it: harness, tools, limits and rewards are the environment's. Only its model calls go
to the policy, through the OpenAI-compatible endpoint, which keeps their tokens as they are drawn.
"""

from __future__ import annotations

import copy
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any

from asyncrl.errors import ConfigError, RecoverableRolloutError, RolloutError
from asyncrl.types import Rollout

if TYPE_CHECKING:
    import verifiers.v1 as vf
    from verifiers.v1.interception import Interception

    from asyncrl.agents.policy import Policy
    from asyncrl.data import Prompt
    from asyncrl.rollout.factory import RolloutSetup

RolloutFactory = Callable[["RolloutSetup"], AbstractAsyncContextManager[Callable[["Prompt"], Awaitable[Rollout]]]]

OUTAGES = {"HarnessError", "InterceptionError", "ProviderError", "SandboxError", "ToolsetError", "TunnelError"}
"""Errors of verifiers that drawing the rollout again may mend. The others are the environment's own."""


def verifiers_environment(
    env: vf.Env[Any], tasks: Iterable[vf.Task] | None = None
) -> tuple[list[dict[str, Any]], RolloutFactory]:
    """Rows to train on (or to hold out: filter and split them as you like) and the rollout function for them.

    The reward is that of the environment's trace: its weighted sum. A rollout whose episode failed is drawn again
    where that can help.

    Args:
        env: The environment. The policy plays its one seat that has no client of its own.
        tasks: Some of its tasks, such as `env.taskset.take(1000)`; all of them if left out.

    Raises:
        ConfigError: verifiers is not installed, the tasks never end, or there is not one seat for the policy.
    """
    verifiers = _verifiers()
    if tasks is None and not env.taskset.bounded:
        raise ConfigError(
            "the tasks of this verifiers environment never end. Say how many there shall be: "
            "verifiers_environment(env, env.taskset.take(1000))."
        )
    _check_seats(verifiers, env)
    known = list(env.taskset if tasks is None else tasks)
    rows = [
        {"task": place, **task.data.model_dump(mode="json", exclude_defaults=True)} for place, task in enumerate(known)
    ]

    @asynccontextmanager
    async def make_rollout(setup: RolloutSetup) -> AsyncIterator[Callable[[Prompt], Awaitable[Rollout]]]:
        async with env.serving():
            # verifiers has no other place for a key that is not in the environment of this process.
            env._interception = keys = _Keys(env._interception)
            yield _Player(verifiers, env, known, keys).rollout

    return rows, make_rollout


class _Player:
    """Plays episodes of the environment with the policy in its seat."""

    def __init__(self, verifiers: Any, env: vf.Env[Any], tasks: Sequence[vf.Task], keys: _Keys) -> None:
        self._verifiers = verifiers
        self._env = env
        self._tasks = tasks
        self._keys = keys

    async def rollout(self, prompt: Prompt) -> Rollout:
        """Raises RecoverableRolloutError or RolloutError: the episode failed; what verifiers says about it."""
        policy = prompt.policy
        seated: list[vf.Trace] = []

        def seat(trace: vf.Trace) -> None:
            if trace.agent.config.client == context.client:
                self._keys.of_trace[trace.id] = policy.openai_api_key
                seated.append(trace)

        context = self._context(policy)
        try:
            episode = await self._env.run_episode(self._tasks[prompt["task"]], context, on_trace=seat)
        finally:
            for trace in seated:
                del self._keys.of_trace[trace.id]
        if not episode.ok:
            raise _failure(episode)
        if len(seated) != 1:
            raise RolloutError(
                f"the policy played {len(seated)} times in one episode of {episode.env.id}. Expected once: a rollout "
                "has one reward, and each of these has its own."
            )
        return policy.captured_run(seated[0].reward, **_about(seated[0]))

    def _context(self, policy: Policy) -> vf.ModelContext:
        """No sampling settings: the endpoint draws as the trainer expects."""
        client = self._verifiers.EvalClientConfig(base_url=policy.openai_base_url, api_key_var="ASYNCRL_API_KEY")
        return self._verifiers.ModelContext(model="policy", client=client)


class _Keys:
    """An interception of verifiers that gives the model calls of a trace the key of their rollout.

    verifiers takes keys from environment variables, and makes and keeps a client for each; so all rollouts share one
    client configuration, and the client is given the key once it is made.
    """

    def __init__(self, inner: Interception) -> None:
        self._inner = inner
        self.of_trace: dict[str, str] = {}

    @asynccontextmanager
    async def acquire(self, session: Any) -> AsyncIterator[Any]:
        async with self._inner.acquire(session) as slot:
            key = self.of_trace.get(session.trace.id)
            if key is not None:
                session.client = copy.copy(session.client)  # connections are shared
                session.client.api_key = key
            yield slot


def _failure(episode: vf.Episode) -> RolloutError:
    errors = [*episode.errors, *(error for trace in episode.traces for error in trace.errors)]
    if not errors:
        return RecoverableRolloutError(f"an episode of the verifiers environment {episode.env.id} did not end well.")
    last = errors[-1]
    kind = RecoverableRolloutError if last.type in OUTAGES else RolloutError
    error = kind(f"an episode of the verifiers environment {episode.env.id} failed: {last.type}: {last.message}")
    if last.traceback:
        error.add_note(last.traceback)
    return error


def _about(trace: vf.Trace) -> dict[str, Any]:
    """For the rollout log."""
    return {
        "verifiers_trace": trace.id,
        "rewards": {name: reward.value for name, reward in trace.rewards.items() if reward is not None},
        "metrics": dict(trace.metrics),
        "stop_condition": trace.stop_condition,
    }


def _check_seats(verifiers: Any, env: vf.Env[Any]) -> None:
    agents = import_module("verifiers.v1.configs.agent").agent_config_fields(env.config)
    played = [name for name, agent in agents.items() if agent.client is None]
    if len(played) != 1:
        raise ConfigError(
            f"the policy would play {len(played)} seats of this verifiers environment: {', '.join(played) or 'none'}. "
            "Expected one. Give every other seat a `client` (and a `model`) of its own, and that one none."
        )
    if agents[played[0]].retries != verifiers.RetryConfig():
        raise ConfigError(
            f"the seat {played[0]!r} has retries of its own, whose failed attempts would be trained too. Leave them "
            "out: asyncrl draws a failed rollout again (rollout.retries)."
        )


def _verifiers() -> Any:
    try:
        return import_module("verifiers.v1")
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("verifiers"):
            raise
        found = "has no verifiers.v1" if error.name == "verifiers.v1" else "is not installed"
        raise ConfigError(f"verifiers {found}. Run: pip install 'asyncrl[verifiers]'") from None
