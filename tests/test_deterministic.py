"""`Config.deterministic`: the same seed gives the same weights bit by bit, however long its rollouts take."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import asyncrl
from asyncrl.agents.policy import Policy, PolicyContext
from asyncrl.config import Config
from asyncrl.errors import ConfigError
from asyncrl.rollout.queue import GroupOrder
from asyncrl.sampling.transformers import TransformersSampler
from asyncrl.testing.models import tiny_model
from asyncrl.types import Completion, Group, SampleRequest, SamplingParams
from tests.durability.agent import HELD_OUT, ROWS, SETTINGS, make_model, rollout

PARAMS = SamplingParams(max_tokens=16)
LORA = {"lora": {"rank": 4}, "optimizer": {"learning_rate": 2e-2}, "data": {"epochs": 1}}


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("agent") / "model")


@dataclass(frozen=True)
class Trained:
    result: asyncrl.TrainResult
    weights: dict[str, torch.Tensor]

    @property
    def measured(self) -> list[object]:
        return [evaluated.reward for evaluated in self.result.evaluations]


def train(model: Path, run_dir: Path, **settings: Any) -> Trained:
    config = Config(**SETTINGS | {"model": str(model), "run_dir": run_dir} | settings)
    result = asyncrl.train(rollout, dataset=ROWS, config=config, evaluation=HELD_OUT, view="quiet")
    (file,) = (run_dir / "model").glob("*.safetensors")
    return Trained(result, load_file(file))


def same(one: Trained, other: Trained) -> bool:
    assert one.weights.keys() == other.weights.keys()
    return all(torch.equal(tensor, other.weights[name]) for name, tensor in one.weights.items())


class TestARun:
    def test_has_the_same_bits_again_and_others_for_another_seed(self, agent: Path, tmp_path: Path) -> None:
        first, again = train(agent, tmp_path / "first"), train(agent, tmp_path / "again")
        assert same(first, again)
        assert (first.result.ledger, first.measured) == (again.result.ledger, again.measured)
        assert len(first.measured) >= 3, "before, beside and after the training"
        assert 0 < first.result.ledger["filtered"] < 2 * len(ROWS), "and which groups are filtered is drawn too"
        assert not same(first, train(agent, tmp_path / "other", seed=8))

    def test_has_the_same_bits_with_an_adapter(self, agent: Path, tmp_path: Path) -> None:
        first, again = (train(agent, tmp_path / name, **LORA) for name in ("first", "again"))
        assert any(tensor.any() for name, tensor in first.weights.items() if "lora_B" in name), "it was trained"
        assert same(first, again)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"staleness": {"max_staleness": 1}}, "max_staleness is 1: .* Set staleness.max_staleness=0"),
        ({"sampler": {"kind": "vllm"}}, "vLLM rounds differently"),
        ({"sampler": {"urls": ["http://localhost:1"]}}, "vLLM rounds differently"),
        ({"sampler": {"replicas": 2}}, "leave sampler.urls and sampler.replicas out"),
        ({"signal_patience_groups": 9}, "signal_patience_groups looks at groups in the order in which they end"),
    ],
)
def test_what_depends_on_time_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Config(**{"model": "m", "deterministic": True, "staleness": {"max_staleness": 0}} | settings)


class TestTheSeedOfARequest:
    async def seeds(self, asked: Sequence[list[int]], *, session: str = "0.1.2.0", seed: int = 3) -> list[int | None]:
        """Those that the sampler is sent for these contexts."""
        seen: list[int | None] = []

        class Listener(TransformersSampler):
            def __init__(self) -> None: ...

            async def generate(self, request: SampleRequest) -> Completion:
                seen.append(request.params.seed)
                return Completion([1], [0.0], [0], "stop")

        context = PolicyContext(Listener(), params=PARAMS, max_seq_len=99, load_tokenizer=lambda: None, seed=seed)
        policy = Policy(context, session)
        for ids in asked:
            await policy.generate(ids)
        return seen

    async def test_does_not_depend_on_what_else_is_under_way(self) -> None:
        first, second, third = [5, 1], [5, 1, 7], [5, 2]
        one = dict(zip("abc", await self.seeds([first, second, third]), strict=True))
        other = dict(zip("cab", await self.seeds([third, first, second]), strict=True))
        assert one == other
        assert None not in one.values()

    async def test_is_another_for_everything_that_is_drawn(self) -> None:
        """Also where the same is asked twice, as a tree search does."""
        found = await self.seeds([[5], [5], [5, 5], [6]])
        found += await self.seeds([[5]], session="0.1.2.1") + await self.seeds([[5]], seed=4)
        assert len(set(found)) == 6


class TestTheEmbeddedSampler:
    async def test_gives_a_request_the_same_bits_whatever_came_before_or_is_beside_it(self, tmp_path: Path) -> None:
        model = tiny_model(tmp_path / "model", kind="qwen3", hidden=128, layers=3)  # large enough to round otherwise
        draw = random.Random(0)
        prompt = [draw.randrange(200) for _ in range(37)]
        others = [[draw.randrange(200) for _ in range(draw.randrange(3, 90))] for _ in range(8)]

        def request(ids: list[int], seed: int = 5, session: str = "") -> SampleRequest:
            return SampleRequest(ids, SamplingParams(max_tokens=24, seed=seed), session)

        async with TransformersSampler(str(model), device="cpu", torch_threads=1, deterministic=True) as sampler:
            alone = await sampler.generate(request(prompt))
            beside = await asyncio.gather(*(sampler.generate(request(ids)) for ids in [*others, prompt]))
            twins = await asyncio.gather(*(sampler.generate(request(prompt, seed)) for seed in (3, 4, 5)))
            await sampler.generate(request(prompt[:20], session="s"))
            resumed = await sampler.generate(request(prompt, session="s"))
        for found in (beside[-1], twins[-1], resumed):
            assert (found.tokens, found.logprobs) == (alone.tokens, alone.logprobs)

    async def test_draws_nothing_twice_after_a_resume(self, agent: Path) -> None:
        """Without seeds of their own requests are told apart by their rollouts, which a resumed run does not repeat."""
        drawn = []
        for session in ("0.1.0.0", "0.9.0.0", "0.1.0.0"):
            async with TransformersSampler(str(agent), device="cpu", torch_threads=1, seed=7) as sampler:
                drawn.append((await sampler.generate(SampleRequest([1, 2], PARAMS, session))).tokens)
        assert drawn[0] != drawn[1]
        assert drawn[0] == drawn[2]


def test_groups_in_order_wait_for_the_unfinished_one_before_them() -> None:
    order = GroupOrder(batch_groups=2, bound=0, in_order=True)
    for sequence in range(4):
        order.admitted(sequence, version=0)
    order.finished(group(1))
    order.finished(group(2))
    assert order.take() is None
    order.gone(0)  # it was filtered
    assert [taken.sequence for taken in iter(order.take, None)] == [1, 2]
    order.finished(group(3))
    assert order.take() == group(3)


def group(sequence: int) -> Group:
    return Group(sequence, row=sequence, epoch=0, version=0, runs=[], advantages=[], admitted_at=0.0, finished_at=0.0)
