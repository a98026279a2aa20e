"""Real environments of `verifiers`, with its interception, its client and `openai`, against the real endpoint."""

from __future__ import annotations

import gc
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal

import anyio
import pytest

import asyncrl
from asyncrl.agents.policy import Policy, PolicyContext
from asyncrl.data import Prompt
from asyncrl.errors import ConfigError, RecoverableRolloutError, RolloutError
from asyncrl.types import Completion, Load, SampleRequest, SamplingParams, Weights

pytest.importorskip("verifiers.v1")
pytest.importorskip("openai")

END = "<|im_end|>"
LOCAL = {"runtime": {"type": "subprocess"}}
ADD = '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 1}}\n</tool_call>'


class Speaker:
    """A sampler that answers what was last said."""

    wants: Literal["tensors", "files"] = "tensors"
    version = 3

    def __init__(self, tokenizer: Any, answer: Callable[[str], str]) -> None:
        self.drawn: list[tuple[list[int], list[int]]] = []
        self.delay_s = 0.005
        self.asked = anyio.Event()
        self._tokenizer = tokenizer
        self._answer = answer

    async def __aenter__(self) -> Speaker:
        return self

    async def __aexit__(self, *exc: object) -> None: ...

    async def generate(self, request: SampleRequest) -> Completion:
        asked = self._tokenizer.decode(request.token_ids)
        self.asked.set()
        await anyio.sleep(self.delay_s)
        tokens = self._tokenizer.encode(self._answer(asked) + END)
        self.drawn.append((list(request.token_ids), tokens))
        return Completion(tokens, [-0.5] * len(tokens), [self.version] * len(tokens), "stop")

    async def score(self, token_ids: Any, version: int, *, start: int = 1, session: Any = None) -> list[float]:
        return [0.0] * (len(token_ids) - start)

    async def publish(self, weights: Weights) -> None: ...

    async def load(self) -> Load:
        return Load(0, 0)


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    """The environment with this taskset."""
    import verifiers.v1 as vf

    monkeypatch.syspath_prepend(Path(__file__).parent / "plugins")
    return lambda taskset, **config: vf.load_environment(vf.resolve_env_config({"taskset": {"id": taskset}, **config}))


@pytest.fixture
def play(tokenizer: Any) -> Any:
    """Open a rollout function of verifiers; gives a function that plays one row, and the sampler."""
    from asyncrl.agents.endpoint.server import Endpoint

    @asynccontextmanager
    async def opened(make_rollout: Any, answer: Callable[[str], str]) -> AsyncIterator[Any]:
        sampler = Speaker(tokenizer, answer)
        params = SamplingParams(max_tokens=256, stop_token_ids=(tokenizer.eos_token_id,))
        async with Endpoint() as endpoint, make_rollout(None) as rollout:
            context = PolicyContext(
                sampler, params=params, max_seq_len=8192, load_tokenizer=lambda: tokenizer, endpoint=endpoint
            )

            async def one(row: dict[str, Any]) -> Any:
                policy = Policy(context, session=row["task"])
                try:
                    return await rollout(Prompt(row, policy=policy, index=row["task"]))
                finally:
                    policy.close()

            yield one, sampler

    return opened


def trained(sample: Any) -> list[int]:
    return [token for token, mask in zip(sample.tokens, sample.loss_mask, strict=True) if mask]


async def test_an_episode_with_a_tool_is_a_rollout_token_for_token(load: Any, play: Any, tokenizer: Any) -> None:
    rows, make_rollout = asyncrl.verifiers_environment(load("asyncrl-sums", agent=LOCAL))
    assert [row["answer"] for row in rows] == ["1", "2", "3", "4"]
    async with play(make_rollout, lambda asked: "3" if "tool_response" in asked else ADD) as (one, sampler):
        sample = await one(rows[2])
    (first, call), (second, answer) = sampler.drawn
    assert sample.tokens == [*second, *answer]
    assert second[: len(first) + len(call)] == [*first, *call]
    assert trained(sample) == [*call, *answer]
    assert sample.versions[-1] == 3
    assert sample.reward == 2.0
    assert sample.info["rewards"] == {"right": 2.0}
    assert sample.info["metrics"] == {"turns": 2.0}
    assert [message["role"] for message in sample.info["messages"]] == [
        "system",
        "user",
        "assistant",
        "tool",
        "assistant",
    ]


async def test_rollouts_at_once_do_not_mix_and_share_one_client(load: Any, play: Any, tokenizer: Any) -> None:
    """A client for each rollout would stay open until the run ends, with a connection pool of its own."""
    from verifiers.v1.clients import EvalClient

    rows, make_rollout = asyncrl.verifiers_environment(load("asyncrl-sums", agent=LOCAL))
    samples: dict[int, Any] = {}

    async def keep(row: dict[str, Any]) -> None:
        samples[row["task"]] = await one(row)

    def answer(asked: str) -> str:
        return str(int(asked.rsplit("+1?", 1)[0][-1]) + 1)

    async with play(make_rollout, answer) as (one, _):
        async with anyio.create_task_group() as group:
            for row in rows:
                group.start_soon(keep, row)
        clients = [thing for thing in gc.get_objects() if type(thing) is EvalClient and not thing.client.is_closed]
        assert len({id(client.client) for client in clients}) == 1
    assert {place: tokenizer.decode(trained(sample)) for place, sample in samples.items()} == {
        place: f"{place + 1}{END}" for place in range(4)
    }
    assert {sample.reward for sample in samples.values()} == {2.0}


async def test_an_environment_that_is_the_user_goes_on_turn_by_turn(load: Any, play: Any) -> None:
    env = load("asyncrl-guessing", player=LOCAL)
    rows, make_rollout = asyncrl.verifiers_environment(env, env.taskset.take(5))
    assert len(rows) == 5
    async with play(make_rollout, lambda asked: str(asked.count("Guess"))) as (one, sampler):
        sample = await one(rows[2])
        assert sample.reward == 1.0
        assert sample.tokens == [*sampler.drawn[1][0], *sampler.drawn[1][1]]
        missed = await one(rows[0])
    assert missed.reward == 0.0
    assert len(sampler.drawn) == 2 + 4


async def test_failures_say_what_verifiers_says(load: Any, play: Any) -> None:
    rows, make_rollout = asyncrl.verifiers_environment(load("asyncrl-sums", agent=LOCAL))
    async with play(make_rollout, lambda asked: "raise") as (one, _):
        with pytest.raises(RolloutError, match=r"asyncrl-sums failed: TaskError: .*this reward is broken") as caught:
            await one(rows[0])
    assert not isinstance(caught.value, RecoverableRolloutError)

    def lost(asked: str) -> str:
        raise asyncrl.RecoverableRolloutError("the sampler is away")

    async with play(make_rollout, lost) as (one, _):
        with pytest.raises(RecoverableRolloutError, match="asyncrl-sums failed: ProviderError"):
            await one(rows[0])


async def test_a_rollout_that_is_cancelled_ends_its_episode(load: Any, play: Any) -> None:
    rows, make_rollout = asyncrl.verifiers_environment(load("asyncrl-sums", agent=LOCAL))
    async with play(make_rollout, lambda asked: "1") as (one, sampler):
        sampler.delay_s = 600
        async with anyio.create_task_group() as group:
            group.start_soon(one, rows[0])
            await sampler.asked.wait()
            group.cancel_scope.cancel()
        sampler.delay_s = 0
        assert (await one(rows[0])).reward == 2.0


async def test_two_games_in_one_episode_are_refused(load: Any, play: Any) -> None:
    env = load("asyncrl-guessing", player=LOCAL, games=2)
    rows, make_rollout = asyncrl.verifiers_environment(env, env.taskset.take(1))
    async with play(make_rollout, lambda asked: "0") as (one, _):
        with pytest.raises(RolloutError, match="the policy played 2 times in one episode of asyncrl-guessing"):
            await one(rows[0])


def test_what_cannot_be_trained_is_refused(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"never end.*taskset\.take"):
        asyncrl.verifiers_environment(load("asyncrl-guessing", player=LOCAL))
    other = {"client": {"type": "eval", "base_url": "http://127.0.0.1:1/v1", "api_key_var": "NONE"}, "model": "other"}
    with pytest.raises(ConfigError, match="would play 0 seats"):
        asyncrl.verifiers_environment(load("asyncrl-sums", agent={**LOCAL, **other}))
    with pytest.raises(ConfigError, match="'agent' has retries of its own"):
        asyncrl.verifiers_environment(load("asyncrl-sums", agent={**LOCAL, "retries": {"max_retries": 2}}))
    monkeypatch.setitem(__import__("sys").modules, "verifiers.v1", None)
    with pytest.raises(ConfigError, match=r"pip install 'asyncrl\[verifiers\]'"):
        asyncrl.verifiers_environment(None)
