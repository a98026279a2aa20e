from __future__ import annotations

import asyncio
import functools
import threading
from typing import Any

import numpy as np
import pytest
from structlog.testing import capture_logs

import asyncrl
from asyncrl.data import Prompt
from asyncrl.errors import RolloutContractError
from asyncrl.types import RolloutRun, RolloutSample

END = "<|im_end|>"


class Guess:
    """A number is guessed; every wrong guess costs a little."""

    def __init__(self) -> None:
        self.closed = 0
        self.threads: set[str] = set()
        worlds.append(self)

    def reset(self, prompt: Prompt) -> str:
        self.threads.add(threading.current_thread().name)
        self.secret = prompt["secret"]
        return "Guess."

    def step(self, action: str) -> asyncrl.Step:
        self.threads.add(threading.current_thread().name)
        if not action.isdigit():
            return asyncrl.Step(f"{action!r} is no number.")
        if int(action) == self.secret:
            return asyncrl.Step("Right.", reward=1.0, done=True, info={"found": self.secret})
        return asyncrl.Step("No.", reward=-0.25)

    def close(self) -> None:
        self.closed += 1


class AsyncGuess:
    """The same without threads, and without `close`."""

    def __init__(self) -> None:
        self._guess = Guess()

    async def reset(self, prompt: Prompt) -> str:
        await asyncio.sleep(0)
        return self._guess.reset(prompt)

    async def step(self, action: str) -> asyncrl.Step:
        await asyncio.sleep(0)
        return self._guess.step(action)


worlds: list[Guess] = []


@pytest.fixture(autouse=True)
def _no_worlds() -> None:
    worlds.clear()


def ask(policy: Any, secret: Any = 3) -> Prompt:
    return Prompt({"secret": secret}, policy=policy, index=0)


def said(sample: RolloutSample, role: str) -> list[str]:
    return [message["content"] for message in sample.info["messages"] if message["role"] == role]


@pytest.mark.parametrize("world", [Guess, AsyncGuess])
async def test_an_episode_is_played_to_its_end(speak: Any, world: Any) -> None:
    policy, sampler = speak(f"7{END}", f"<think>\nlower\n</think>\n\n seven {END}", f"3{END}")
    sample = await asyncrl.environment_rollout(world, system="Play.")(ask(policy))
    assert isinstance(sample, RolloutSample)
    assert sample.reward == 0.75
    assert said(sample, "system") == ["Play."]
    assert said(sample, "user") == ["Guess.", "No.", "'seven' is no number."]
    assert sample.info["step_rewards"] == [-0.25, 0.0, 1.0]
    assert sample.info["done"] is True
    assert sample.info["environment"] == {"found": 3}
    assert sample.turn_rewards is None
    drawn = [token for completion in sampler.completions for token in completion.tokens]
    assert [token for token, mask in zip(sample.tokens, sample.loss_mask, strict=True) if mask] == drawn


async def test_methods_that_are_not_async_run_in_threads_and_close_runs_once(speak: Any) -> None:
    policy, _ = speak(f"3{END}")
    await asyncrl.environment_rollout(Guess)(ask(policy))
    (world,) = worlds
    assert world.closed == 1
    assert threading.main_thread().name not in world.threads


async def test_the_reward_at_the_limit_of_turns_is_what_was_earned(speak: Any) -> None:
    policy, sampler = speak(*[f"{guess}{END}" for guess in range(10, 20)])
    sample = await asyncrl.environment_rollout(Guess, max_turns=3)(ask(policy))
    assert len(sampler.requests) == 3
    assert (sample.reward, sample.info["done"], sample.info["finish_reason"]) == (-0.75, False, "stop")


async def test_a_turn_that_was_cut_is_no_action(speak: Any) -> None:
    policy, _ = speak(f"7{END}", "3 or so", f"3{END}", max_tokens=5)
    sample = await asyncrl.environment_rollout(Guess, turn_rewards=True)(ask(policy))
    assert (sample.reward, sample.info["finish_reason"]) == (-0.25, "length")
    assert sample.turn_rewards == [-0.25, 0.0]


async def test_a_turn_that_truncation_takes_away_has_no_reward(speak: Any) -> None:
    policy, _ = speak(f"7{END}", "3 or so", max_tokens=5)
    play = asyncrl.environment_rollout(Guess, turn_rewards=True, on_limit="truncate")
    sample = await play(ask(policy))
    assert (sample.reward, sample.turn_rewards) == (-0.25, [-0.25])


async def test_a_full_context_ends_the_episode(speak: Any, tokenizer: Any) -> None:
    policy, _ = speak(f"7{END}", f"8{END}", f"9{END}", max_seq_len=len(tokenizer.encode("x")) + 60)
    sample = await asyncrl.environment_rollout(Guess, turn_rewards=True)(ask(policy))
    assert sample.info["finish_reason"] == "context"
    assert len(sample.tokens) <= 61
    assert len(sample.turn_rewards) == sample.info["turns"]


async def test_each_turn_gets_the_reward_of_its_step_also_where_history_forks(speak: Any) -> None:
    policy, _ = speak(f"<think>\na\n</think>\n\n7{END}", f"8{END}", f"3{END}")
    run = await asyncrl.environment_rollout(Guess, turn_rewards=True, history="render")(ask(policy))
    assert isinstance(run, RolloutRun)  # the thought is not in the history
    assert [segment.turn_rewards for segment in run.segments] == [[-0.25], [-0.25, 1.0]]


async def test_a_call_of_a_tool_is_answered_before_the_world_sees_an_action(speak: Any) -> None:
    call = '<tool_call>\n{"name": "peek", "arguments": {}}\n</tool_call>'
    policy, _ = speak(f"{call}{END}", f"3{END}")
    sample = await asyncrl.environment_rollout(Guess, turn_rewards=True)(ask(policy))
    assert said(sample, "tool") == ["Error: there is no tool 'peek'. There is: none."]
    assert sample.turn_rewards == [0.0, 1.0]


async def test_an_action_is_found_in_what_was_said(speak: Any) -> None:
    policy, _ = speak(f"I think it is\nguess: 3{END}")
    sample = await asyncrl.environment_rollout(Guess, action=lambda text: text.split("guess:")[-1].strip())(ask(policy))
    assert sample.reward == 1.0


@pytest.mark.parametrize("sync", [True, False])
async def test_a_world_that_hangs_is_named(speak: Any, sync: bool) -> None:
    let_go = threading.Event()

    class Endless(Guess):
        def step(self, action: str) -> asyncrl.Step:
            let_go.wait(60)
            return asyncrl.Step("")

    class AsyncEndless(AsyncGuess):
        async def step(self, action: str) -> asyncrl.Step:
            await asyncio.sleep(60)
            return asyncrl.Step("")

    policy, _ = speak(f"3{END}")
    world = Endless if sync else AsyncEndless
    try:
        with pytest.raises(TimeoutError, match=rf"^{world.__name__}\.step took longer than 0\.05 s .step_timeout_s"):
            await asyncrl.environment_rollout(world, step_timeout_s=0.05)(ask(policy))
    finally:
        let_go.set()
    assert [world.closed for world in worlds] == [int(sync)]


async def test_a_world_that_is_made_too_late_is_closed(speak: Any) -> None:
    let_go, closed = threading.Event(), threading.Event()

    class Late(Guess):
        def __init__(self) -> None:
            super().__init__()
            let_go.wait(30)

        def close(self) -> None:
            closed.set()

    policy, _ = speak()
    with pytest.raises(TimeoutError, match=r"^Late took longer than"):
        await asyncrl.environment_rollout(Late, step_timeout_s=0.05)(ask(policy))
    let_go.set()
    assert await asyncio.to_thread(closed.wait, 10)


async def test_what_a_world_raises_comes_through_and_it_is_closed(speak: Any) -> None:
    class Broken(Guess):
        def step(self, action: str) -> asyncrl.Step:
            raise KeyError("lost")

    policy, _ = speak(f"3{END}")
    with pytest.raises(KeyError, match="lost"):
        await asyncrl.environment_rollout(Broken)(ask(policy))
    assert worlds[0].closed == 1


async def test_what_is_no_step_and_no_text_is_refused(speak: Any) -> None:
    class Bare(Guess):
        def step(self, action: str) -> Any:
            return "No.", 0.0, False

    class Numbers(Guess):
        def reset(self, prompt: Prompt) -> Any:
            return 3

    policy, _ = speak(f"3{END}")
    with pytest.raises(RolloutContractError, match=r"Bare\.step returned a tuple\. Expected asyncrl\.Step"):
        await asyncrl.environment_rollout(Bare)(ask(policy))
    with pytest.raises(RolloutContractError, match=r"Numbers\.reset is a int\. Expected text"):
        await asyncrl.environment_rollout(Numbers)(ask(policy))


@pytest.mark.parametrize("fields", [{"reward": None}, {"reward": "1.0"}, {"info": None}, {"info": [1]}], ids=str)
def test_a_step_that_is_none_is_refused_where_it_is_made(fields: dict[str, Any]) -> None:
    (name,) = fields
    with pytest.raises(RolloutContractError, match=rf"the {name} of a Step is .* Expected a"):
        asyncrl.Step("No.", **fields)


async def test_rewards_may_be_numbers_of_any_kind(speak: Any) -> None:
    class Numpy(Guess):
        def step(self, action: str) -> asyncrl.Step:
            return asyncrl.Step("Right.", reward=np.float32(0.5), done=True)

    policy, _ = speak(f"3{END}")
    assert (await asyncrl.environment_rollout(Numpy)(ask(policy))).reward == 0.5


def test_an_object_in_place_of_its_class_is_refused_at_once() -> None:
    with pytest.raises(RolloutContractError, match=r"environment_rollout was given .*Guess.* Expected the class"):
        asyncrl.environment_rollout(Guess())  # type: ignore[arg-type]


async def test_methods_need_no_name_of_their_own(speak: Any) -> None:
    class Partial(Guess):
        def __init__(self) -> None:
            super().__init__()
            self.step = functools.partial(super().step)  # type: ignore[method-assign]

    policy, _ = speak(f"3{END}")
    assert (await asyncrl.environment_rollout(Partial)(ask(policy))).reward == 1.0


async def test_the_first_failure_counts_where_closing_fails_too(speak: Any) -> None:
    """A step that timed out has the rollout drawn again, also when the world it leaves behind cannot be closed."""

    class Lost(Guess):
        def step(self, action: str) -> asyncrl.Step:
            raise ConnectionError("lost")

        def close(self) -> None:
            raise RuntimeError("not open")

    policy, _ = speak(f"3{END}")
    with capture_logs() as logs, pytest.raises(ConnectionError, match="lost"):
        await asyncrl.environment_rollout(Lost)(ask(policy))
    assert [(entry["name"], entry["error"]) for entry in logs] == [("Lost", "RuntimeError: not open")]
