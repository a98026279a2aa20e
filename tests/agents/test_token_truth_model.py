"""What is trained is what was sampled, by a real model: the trainer gives the log-probs of the sampler."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from asyncrl.agents.chat import Chat
from asyncrl.agents.policy import Policy, PolicyContext
from asyncrl.config import ChatConfig, Config
from asyncrl.sampling.transformers import TransformersSampler
from asyncrl.testing.models import tiny_model
from asyncrl.testing.templates import Style, styled_tokenizer
from asyncrl.training.trainer import TorchTrainer
from asyncrl.types import (
    Completion,
    SampleRequest,
    SamplingParams,
    TrainSequence,
)
from tests.agents.token_truth import (
    VARIANTS,
    Line,
    look,
    segments_of,
    variants,
    written,
)

TOLERANCE = 1e-3


def chatty_tokenizer(style: Style) -> Any:
    """Whole calls are single tokens of it, so that a random model makes some."""
    said = [written(style, Line(calls=[("look", x)])) for x in range(60)]
    thoughts = [f"<think>\n{x}\n</think>\n\n" for x in range(20)]
    return styled_tokenizer(style, words=[*said, *thoughts])


def stops_of(tokenizer: Any) -> tuple[int, ...]:
    """Two letters of three end a turn, too: a random model would hardly ever find the end otherwise."""
    return (tokenizer.eos_token_id, *(index for index in range(256) if index % 3))


class CountingSampler(TransformersSampler):
    drawn_tokens = 0

    async def generate(self, request: SampleRequest) -> Completion:
        completion = await super().generate(request)
        self.drawn_tokens += len(completion.tokens)
        return completion


async def play_for_real(chat: Chat, turns: int) -> None:
    last = chat.turns + turns
    while chat.turns < last and chat.finish_reason in (None, "stop"):
        await chat.step("And?" if chat.finish_reason == "stop" else None)


@variants
async def test_the_trainer_gives_the_log_probs_that_were_sampled(variant: str, tmp_path: Path) -> None:
    """Chats over two versions of the weights, with tools, forks and rendered histories; each token at its version."""
    style, kwargs = VARIANTS[variant]
    tokenizer = chatty_tokenizer(style)
    folder = str(tiny_model(tmp_path, tokenizer=tokenizer, kind="qwen3", hidden=32, layers=1, max_seq_len=8192))
    config = Config(model=folder, lora={"rank": 0}, trainer={"device": "cpu"}, optimizer={"learning_rate": 0.03})
    trainers = [TorchTrainer(config, total_steps=None, weights_format="tensors") for _ in range(2)]
    async with CountingSampler(folder, device="cpu", torch_threads=1, context_tokens=8192) as sampler:
        context = PolicyContext(
            sampler,
            params=SamplingParams(max_tokens=40, stop_token_ids=stops_of(tokenizer)),
            max_seq_len=8192,
            load_tokenizer=lambda: tokenizer,
            chat=ChatConfig(template=kwargs),
        )
        chats = [
            Policy(context, number).chat("Go on.", tools=[look], max_turns=20, history=history)
            for number, history in enumerate(cast(Any, (None, None, "render")))
        ]
        for chat in chats:
            await play_for_real(chat, turns=3)
        twin = chats[1].fork()
        samples = [sample for chat in chats for sample in segments_of(chat.sample(1.0))]
        trainers[1].forward_backward(
            [TrainSequence(s.tokens, s.logprobs, s.loss_mask, (-1.0) ** i, 0) for i, s in enumerate(samples)]
        )
        trainers[1].optim_step()
        await sampler.publish(trainers[1].save_weights_for_sampler())
        for chat in (*chats, twin):
            await play_for_real(chat, turns=3)
    samples = [sample for chat in chats for sample in segments_of(chat.sample(1.0))]
    assert sum(sum(sample.loss_mask) for sample in samples) == sampler.drawn_tokens
    assert sum(chat.tool_calls for chat in chats) > 0
    assert len(samples) > len(chats)
    scores = [trainer.forward([sample.tokens for sample in samples]) for trainer in trainers]
    found = {0: 0.0, 1: 0.0}
    moved = 0.0
    for index, sample in enumerate(samples):
        assert sample.versions is not None
        for at in (at for at, masked in enumerate(sample.loss_mask) if masked):
            old_and_new = [score[index][at - 1] for score in scores]
            version = sample.versions[at]
            found[version] = max(found[version], abs(sample.logprobs[at] - old_and_new[version]))
            moved = max(moved, abs(old_and_new[0] - old_and_new[1]))
    assert moved > 100 * TOLERANCE, "the step was too small to tell the versions apart"
    assert max(found.values()) < TOLERANCE
