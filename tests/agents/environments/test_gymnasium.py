from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import pytest

import asyncrl
from asyncrl.data import Prompt
from asyncrl.errors import ConfigError

gymnasium = pytest.importorskip("gymnasium")

END = "<|im_end|>"
MOVES = ("left", "down", "right", "up")


class Echo(gymnasium.Env):  # type: ignore[misc, name-defined]
    """Text in, text out; its number comes from its seed, and a time limit may cut it off."""

    observation_space = gymnasium.spaces.Text(100)
    action_space = gymnasium.spaces.Text(8, charset="abc")

    def __init__(self) -> None:
        self.closed = 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        self.number = int(self.np_random.integers(1_000_000))
        return f"number {self.number}, options {options}", {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        return f"you said {action}", len(action) / 10, action == "abc", False, {}

    def close(self) -> None:
        self.closed += 1


def show(env: Any, place: int, info: Mapping[str, Any]) -> str:
    return f"You are at {place} of {env.unwrapped.desc.size}."


def prompt(policy: Any = None, row: Mapping[str, Any] | None = None, **where: Any) -> Prompt:
    return Prompt(row or {}, policy=policy, **({"index": 0} | where))


def lake(make: Any = None) -> asyncrl.GymnasiumEnvironment:
    make = make or (lambda prompt: gymnasium.make("FrozenLake-v1", is_slippery=False))
    return asyncrl.GymnasiumEnvironment(make, describe=show, actions=MOVES)


def test_actions_are_read_by_name() -> None:
    env = lake()
    assert env.reset(prompt()) == "You are at 0 of 16."
    assert env.step("r\u0131ght").observation == "You are at 1 of 16."  # an i without its dot is one but for its case
    assert env.step("Going up changes nothing; **Right**, then!").observation == "You are at 2 of 16."
    assert env.step("I walk DOWN").observation == "You are at 6 of 16."
    refused = env.step("fly, upright")
    assert refused.observation == "'fly, upright' is no action here. Expected one of left, down, right, up."
    assert (refused.reward, refused.done) == (0.0, False)
    assert env.step("down").observation == "You are at 10 of 16."
    env.step("down")
    end = env.step("right")
    assert (end.reward, end.done, end.info) == (1.0, True, {"truncated": False})
    env.close()


async def test_an_episode_is_a_rollout(speak: Any) -> None:
    policy, _ = speak(*(f"{move}{END}" for move in ("down", "right", "left")))
    sample = await asyncrl.environment_rollout(lake, max_turns=5)(prompt(policy))
    assert sample.info["done"] is True  # in the hole at 5
    assert sample.reward == 0.0
    assert sample.info["turns"] == 2


def test_a_time_limit_ends_it_too() -> None:
    env = lake(lambda prompt: gymnasium.make("FrozenLake-v1", is_slippery=False, max_episode_steps=2))
    env.reset(prompt())
    assert not env.step("up").done
    end = env.step("up")
    assert (end.done, end.info) == (True, {"truncated": True})


def test_a_group_meets_the_same_world() -> None:
    def first(**where: Any) -> str:
        return asyncrl.GymnasiumEnvironment(lambda prompt: Echo()).reset(prompt(**where))

    assert first(rollout_index=0) == first(rollout_index=1)
    worlds = [first(index=0), first(index=1), first(epoch=1), first(evaluation=True), first(seed=1)]
    assert len(set(worlds)) == len(worlds)
    named = {"row": {"seed": 5, "options": {"hard": True}}}
    assert first(**named) == first(**named, index=3, epoch=2)
    assert first(**named).endswith("options {'hard': True}")


def test_texts_go_in_and_out_as_they_are() -> None:
    worlds: list[Echo] = []

    def make(prompt: Prompt) -> Echo:
        worlds.append(Echo())
        return worlds[-1]

    env = asyncrl.GymnasiumEnvironment(make)
    env.reset(prompt())
    assert env.step("ab").observation == "you said ab"
    assert "is no action here. Expected 1 to 8 of the characters abc" in env.step("xyz").observation
    assert env.step("abc").done
    env.reset(prompt())  # another episode is another environment
    env.close()
    assert [world.closed for world in worlds] == [1, 1]


def test_numbers_name_actions_that_have_no_names() -> None:
    env = asyncrl.GymnasiumEnvironment(
        lambda prompt: gymnasium.make("FrozenLake-v1", is_slippery=False), describe=lambda env, place, info: str(place)
    )
    assert env.reset(prompt()) == "0"
    assert env.step("2").observation == "1"
    assert "Expected one of 0, 1, 2, 3" in env.step("4").observation


@pytest.mark.parametrize(
    ("made", "settings", "message"),
    [
        ("FrozenLake-v1", {"actions": MOVES}, "FrozenLake-v1 shows Discrete.16., which is no text. .*describe"),
        ("FrozenLake-v1", {"describe": show, "actions": ("left",)}, "actions names 1 actions, but .* has 4"),
        ("Pendulum-v1", {"describe": show}, "takes actions from Box.*ActionWrapper"),
        (None, {"actions": MOVES}, "Echo takes actions from Text"),
    ],
)
def test_what_cannot_be_played_in_text_is_refused(made: str | None, settings: dict[str, Any], message: str) -> None:
    env = asyncrl.GymnasiumEnvironment(lambda prompt: gymnasium.make(made) if made else Echo(), **settings)
    with pytest.raises(ConfigError, match=message):
        env.reset(prompt())
    env.close()


def test_without_gymnasium_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    with pytest.raises(ConfigError, match=r"pip install 'asyncrl\[gymnasium\]'"):
        lake().reset(prompt())
