"""A `verifiers` environment that is the user: it answers each guess until one is right. It can have a second seat."""

from __future__ import annotations

from collections.abc import Iterator

import verifiers.v1 as vf

__all__ = ["GuessingEnv", "GuessingTaskset", "LoopHarness"]

from asyncrl_sums import LoopHarness


class GuessingTask(vf.Task[vf.TaskData, vf.State, vf.TaskConfig]):
    pass


class GuessingConfig(vf.EnvConfig):
    player: vf.AgentConfig = vf.AgentConfig()
    rounds: int = 3
    games: int = 1


class GuessingEnv(vf.Env[GuessingConfig]):
    async def run(self, task: vf.Task, agents: vf.Agents) -> None:
        for _ in range(self.config.games):
            async with agents.player.interaction(task) as interaction:
                segment = await interaction.turn()
                for _ in range(self.config.rounds):
                    right = segment.last_reply == task.data.name
                    if right or segment.terminated:
                        break
                    segment = await interaction.turn("No. Guess again.")
            interaction.trace.record_reward("right", float(right))


class GuessingTaskset(vf.Taskset[GuessingTask, vf.TasksetConfig]):
    INFINITE = True

    def load(self) -> Iterator[GuessingTask]:
        number = 0
        while True:
            yield GuessingTask(vf.TaskData(prompt="Guess.", name=str(number)), self.config.task)
            number += 1
