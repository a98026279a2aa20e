"""FrozenLake: the model sees a lake as letters and says where to go, one move a turn, until it is across or in a hole.

    pip install 'asyncrl[gymnasium]'
    python examples/frozen_lake.py

Every row is another lake. The environment is FrozenLake-v1 of gymnasium as it is, without slipping.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium
from gymnasium.envs.toy_text.frozen_lake import generate_random_map

import asyncrl
from asyncrl.config import ChatConfig, LoraConfig, OptimizerConfig, SamplerConfig, SamplingConfig

MOVES = ("left", "down", "right", "up")  # in the order of FrozenLake's actions 0 to 3
RULES = (
    "You are P on a frozen lake and want to reach G. F is ice that bears you, H is a hole: do not step there. "
    "S is where you began. Answer with your next move and nothing else: left, down, right or up."
)


def make_lake(prompt: asyncrl.Prompt) -> gymnasium.Env[Any, Any]:
    return gymnasium.make("FrozenLake-v1", desc=prompt["lake"], is_slippery=False)


def picture(env: gymnasium.Env[Any, Any], place: int, info: Mapping[str, Any]) -> str:
    """The lake as rows of letters, with P where the player is."""
    lake = env.unwrapped.desc.astype(str)
    lake.flat[place] = "P"
    return "\n".join(" ".join(row) for row in lake)


rollout = asyncrl.environment_rollout(
    lambda: asyncrl.GymnasiumEnvironment(make_lake, describe=picture, actions=MOVES),
    system=RULES,
    max_turns=10,
)
"""One episode. The reward is FrozenLake's own: 1 for the goal, otherwise 0."""


def lakes(count: int, first_seed: int) -> list[dict[str, Any]]:
    """Rows with random lakes of 4 x 4 that can all be crossed."""
    return [{"lake": generate_random_map(4, p=0.7, seed=first_seed + index)} for index in range(count)]


def main(argv: Sequence[str] | None = None) -> asyncrl.TrainResult:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen/Qwen3-0.6B", help="a chat model of the hub, or a folder")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--prompts", type=int, default=16, help="lakes of one step")
    parser.add_argument("--rollouts", type=int, default=8, help="rollouts on one lake")
    parser.add_argument("--max-tokens", type=int, default=16, help="longest turn")
    parser.add_argument("--eval-lakes", type=int, default=64, help="new lakes, tried before and after; 0 for none")
    parser.add_argument("--lora-rank", type=int, default=16, help="0 trains the full model")
    parser.add_argument("--sampler", choices=("auto", "vllm", "transformers"), default="auto")
    parser.add_argument("--out", help="run folder")
    options = parser.parse_args(argv)
    config = asyncrl.Config(
        model=options.model,
        run_dir=options.out,
        max_steps=options.steps,
        prompt_groups_per_step=options.prompts,
        completions_per_prompt=options.rollouts,
        sampling=SamplingConfig(max_tokens=options.max_tokens),
        chat=ChatConfig(template={"enable_thinking": False}),
        lora=LoraConfig(rank=options.lora_rank),
        optimizer=OptimizerConfig(learning_rate=5e-5 if options.lora_rank else 2e-6, warmup_steps=5),
        sampler=SamplerConfig(kind=options.sampler),
    )
    return asyncrl.train(
        rollout,
        dataset=lakes(4 * options.steps * options.prompts, first_seed=1_000_000),
        config=config,
        evaluation=lakes(options.eval_lakes, first_seed=0) or None,
    )


if __name__ == "__main__":
    main()
