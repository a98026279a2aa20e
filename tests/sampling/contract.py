"""What every sampler must do. One suite for the real ones and for the fakes.

    @pytest.mark.parametrize("check", CHECKS)
    async def test_contract(subject: Subject, check: Check) -> None:
        await check(subject)

The checks may share one subject: each one starts from whatever version the last one left live.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import pytest

from asyncrl.errors import SamplerRequestError
from asyncrl.types import Completion, Load, Sampler, SampleRequest, SamplingParams, Weights

TOLERANCE = 1e-3
"""Of a log-prob in float32, sampler against truth."""
LIMIT_S = 60.0
"""Of every wait below. Nothing here takes a second on an idle machine."""


@dataclass(frozen=True)
class Subject:
    """A sampler that runs, and the truth about the weights it is given."""

    sampler: Sampler
    prompt: Sequence[int]
    """Long enough to fill several blocks of a prefix cache."""
    vocab_size: int
    context_tokens: int
    weights: Callable[[int], Weights]
    """New weights under this version, unlike those of any other version."""
    truth: Callable[[Sequence[int], int, float], list[float]]
    """(tokens, version, temperature) -> log-probs [N - 1] of tokens[1:]."""
    next_token: Callable[[Sequence[int], int], list[float]]
    """(tokens, version) -> log-probs [V] of what may follow, at temperature 1."""
    keeps_versions: bool
    """Whether the version before the newest can still be sampled from."""


Check = Callable[[Subject], Awaitable[None]]


async def draw(
    subject: Subject, prompt: Sequence[int], *, version: int | None = None, session: str = "", **params: object
) -> Completion:
    settings = SamplingParams(**{"max_tokens": 12, **params})  # type: ignore[arg-type]
    request = SampleRequest(prompt, settings, session=session, version=version)
    return await asyncio.wait_for(subject.sampler.generate(request), LIMIT_S)


def error(
    subject: Subject, prompt: Sequence[int], completion: Completion, version: int, temperature: float = 1.0
) -> float:
    """The largest difference between the log-probs of a completion and the truth about `version`."""
    truth = subject.truth([*prompt, *completion.tokens], version, temperature)[len(prompt) - 1 :]
    return max(abs(a - b) for a, b in zip(completion.logprobs, truth, strict=True))


async def publish_next(subject: Subject) -> int:
    version = subject.sampler.version + 1
    await asyncio.wait_for(subject.sampler.publish(subject.weights(version)), LIMIT_S)
    return version


async def until(subject: Subject, reached: Callable[[Load], bool], *tasks: asyncio.Task[Completion]) -> Load:
    """Ask for the load until `reached` says yes. None of `tasks` may end before."""
    async with asyncio.timeout(LIMIT_S):
        while True:
            load = await subject.sampler.load()
            if reached(load):
                return load
            for task in tasks:
                assert not task.done(), f"ended early: {task}"
            await asyncio.sleep(0.01)


async def until_running(subject: Subject, *tasks: asyncio.Task[Completion]) -> None:
    """Wait until the requests of `tasks`, and no others, are in the engine."""
    await until(subject, lambda load: load.running + load.waiting == len(tasks), *tasks)


async def completion_has_one_entry_per_token(subject: Subject) -> None:
    completion = await draw(subject, subject.prompt)
    assert len(completion.tokens) == len(completion.logprobs) == len(completion.versions) == 12
    assert completion.finish_reason == "length"
    assert all(0 <= token < subject.vocab_size for token in completion.tokens)
    assert all(math.isfinite(logprob) and logprob <= 0 for logprob in completion.logprobs)
    assert set(completion.versions) == {subject.sampler.version}


async def stop_token_ends_and_is_kept(subject: Subject) -> None:
    free = await draw(subject, subject.prompt, temperature=0.0)
    stop = free.tokens[5]
    stopped = await draw(subject, subject.prompt, temperature=0.0, stop_token_ids=(stop,))
    assert stopped.finish_reason == "stop"
    assert list(stopped.tokens) == list(free.tokens[: list(free.tokens).index(stop) + 1])


async def greedy_takes_the_likeliest(subject: Subject) -> None:
    completion = await draw(subject, subject.prompt, temperature=0.0, max_tokens=1)
    every = subject.next_token(subject.prompt, subject.sampler.version)
    assert list(completion.tokens) == [every.index(max(every))]


async def seed_reproduces(subject: Subject) -> None:
    first, again, other = [await draw(subject, subject.prompt, seed=seed) for seed in (7, 7, 8)]
    assert list(first.tokens) == list(again.tokens) != list(other.tokens)


async def logprobs_are_those_of_the_behaviour_policy(subject: Subject) -> None:
    for temperature in (1.0, 0.5, 2.0):
        completion = await draw(subject, subject.prompt, temperature=temperature)
        assert error(subject, subject.prompt, completion, subject.sampler.version, temperature) < TOLERANCE


async def logprobs_are_those_of_the_truncated_policy(subject: Subject) -> None:
    """With top-k 2 the two likeliest tokens share all the probability."""
    completion = await draw(subject, subject.prompt, top_k=2, max_tokens=4)
    prefix = [*subject.prompt]
    for token, logprob in zip(completion.tokens, completion.logprobs, strict=True):
        every = subject.next_token(prefix, subject.sampler.version)
        kept = math.log(sum(math.exp(top) for top in sorted(every)[-2:]))
        assert abs(logprob - (every[token] - kept)) < TOLERANCE
        prefix.append(token)


async def score_is_at_temperature_one(subject: Subject) -> None:
    completion = await draw(subject, subject.prompt, temperature=0.5)
    tokens, version = [*subject.prompt, *completion.tokens], subject.sampler.version
    scores = await subject.sampler.score(tokens, version)
    truth = subject.truth(tokens, version, 1.0)
    assert len(scores) == len(tokens) - 1
    assert max(abs(a - b) for a, b in zip(scores, truth, strict=True)) < TOLERANCE


async def score_of_the_last_tokens(subject: Subject) -> None:
    """The answer of a session that has spoken before, and the same without one; then its last token alone."""
    completion = await draw(subject, subject.prompt, session="scored")
    tokens, version = [*subject.prompt, *completion.tokens], subject.sampler.version
    truth = subject.truth(tokens, version, 1.0)
    for start in (len(subject.prompt), len(tokens) - 1):
        for session in ("scored", None):
            scores = await subject.sampler.score(tokens, version, start=start, session=session)
            assert len(scores) == len(tokens) - start
            assert max(abs(a - b) for a, b in zip(scores, truth[start - 1 :], strict=True)) < TOLERANCE


async def a_session_goes_on_where_it_ended(subject: Subject) -> None:
    """Four turns and a fork, under new weights from the third turn on."""
    history, version = [*subject.prompt], subject.sampler.version
    for turn in range(4):
        if turn == 2:
            version = await publish_next(subject)
        for prompt in (history[:-20], history):
            completion = await draw(subject, prompt, session="goes on")
            assert set(completion.versions) == {version}
            assert error(subject, prompt, completion, version) < TOLERANCE
        history += [*completion.tokens, *subject.prompt[: 5 + turn]]


async def requests_do_not_mix(subject: Subject) -> None:
    prompts = [[*subject.prompt[index:], *subject.prompt[:index]] for index in range(8)]
    drawn = await asyncio.gather(
        *(
            draw(subject, prompt, session=str(index), max_tokens=3 + index, temperature=0.5 + index / 5)
            for index, prompt in enumerate(prompts)
        )
    )
    for index, (prompt, completion) in enumerate(zip(prompts, drawn, strict=True)):
        assert len(completion.tokens) == 3 + index
        assert error(subject, prompt, completion, subject.sampler.version, 0.5 + index / 5) < TOLERANCE


async def cancelling_frees_the_place(subject: Subject) -> None:
    longest = subject.context_tokens - len(subject.prompt)
    task = asyncio.create_task(draw(subject, subject.prompt, max_tokens=longest))
    await until_running(subject, task)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until_running(subject)
    assert len((await draw(subject, subject.prompt)).tokens) == 12


async def load_counts_what_was_drawn(subject: Subject) -> None:
    before = await subject.sampler.load()
    await draw(subject, subject.prompt)
    after = await until(subject, lambda load: load.generated_tokens >= before.generated_tokens + 12)
    assert after.generated_tokens == before.generated_tokens + 12
    assert after.kv_use is None or 0 <= after.kv_use <= 1


async def prompt_that_does_not_fit_is_refused(subject: Subject) -> None:
    tokens = [subject.prompt[0]] * subject.context_tokens
    with pytest.raises(SamplerRequestError, match=str(subject.context_tokens)) as caught:
        await draw(subject, tokens)
    assert not caught.value.recoverable
    completion = await draw(subject, tokens[:-3])
    assert (len(completion.tokens), completion.finish_reason) == (3, "length")


async def empty_prompt_is_refused(subject: Subject) -> None:
    with pytest.raises(SamplerRequestError) as caught:
        await draw(subject, [])
    assert not caught.value.recoverable


async def version_that_is_not_live_is_refused(subject: Subject) -> None:
    with pytest.raises(SamplerRequestError, match="version"):
        await draw(subject, subject.prompt, version=subject.sampler.version + 1)
    with pytest.raises(SamplerRequestError, match="version"):
        await subject.sampler.score(subject.prompt, subject.sampler.version + 1)


async def published_weights_are_used(subject: Subject) -> None:
    """Same prompt before and after, so that a stale prefix cache would show."""
    before = await draw(subject, subject.prompt)
    old = subject.sampler.version
    version = await publish_next(subject)
    assert subject.sampler.version == version
    for _ in range(2):
        after = await draw(subject, subject.prompt)
        assert set(after.versions) == {version}
        assert error(subject, subject.prompt, after, version) < TOLERANCE
        assert error(subject, subject.prompt, after, old) > 10 * TOLERANCE
    assert error(subject, subject.prompt, before, old) < TOLERANCE
    scores = await subject.sampler.score(subject.prompt, version)
    truth = subject.truth(subject.prompt, version, 1.0)
    assert max(abs(a - b) for a, b in zip(scores, truth, strict=True)) < TOLERANCE


async def older_version_can_be_pinned(subject: Subject) -> None:
    if not subject.keeps_versions:
        return
    old = await publish_next(subject)
    new = await publish_next(subject)
    drawn = await asyncio.gather(*(draw(subject, subject.prompt, version=version) for version in (old, new, old, None)))
    for completion, version in zip(drawn, (old, new, old, new), strict=True):
        assert set(completion.versions) == {version}
        assert error(subject, subject.prompt, completion, version) < TOLERANCE


async def held_version_outlives_those_that_are_kept(subject: Subject) -> None:
    """As an evaluation needs it. Where one version at a time is live, the sampler says so."""
    with subject.sampler.hold() as held:
        if held is None:
            assert not subject.keeps_versions
            return
        assert held == subject.sampler.version
        for _ in range(8):
            newest = await publish_next(subject)
        drawn = await asyncio.gather(*(draw(subject, subject.prompt, version=version) for version in (held, None)))
        assert [set(completion.versions) for completion in drawn] == [{held}, {newest}]
        assert error(subject, subject.prompt, drawn[0], held) < TOLERANCE


async def every_token_knows_its_version_while_publishing(subject: Subject) -> None:
    """Long completions, and two hot-loads while they are drawn."""
    before = subject.sampler.version
    tasks = [
        asyncio.create_task(draw(subject, subject.prompt, session=str(index), max_tokens=subject.context_tokens // 2))
        for index in range(3)
    ]
    await until_running(subject, *tasks)
    await publish_next(subject)
    newest = await publish_next(subject)
    for completion in await asyncio.gather(*tasks):
        versions = list(completion.versions)
        assert len(versions) == len(completion.tokens)
        assert versions == sorted(versions)
        assert before <= versions[0] <= versions[-1] <= newest
        held = versions.count(versions[0])
        first = Completion(completion.tokens[:held], completion.logprobs[:held], versions[:held], "length")
        assert error(subject, subject.prompt, first, versions[0]) < TOLERANCE


CHECKS: tuple[Check, ...] = (
    completion_has_one_entry_per_token,
    stop_token_ends_and_is_kept,
    greedy_takes_the_likeliest,
    seed_reproduces,
    logprobs_are_those_of_the_behaviour_policy,
    logprobs_are_those_of_the_truncated_policy,
    score_is_at_temperature_one,
    score_of_the_last_tokens,
    a_session_goes_on_where_it_ended,
    requests_do_not_mix,
    cancelling_frees_the_place,
    load_counts_what_was_drawn,
    prompt_that_does_not_fit_is_refused,
    empty_prompt_is_refused,
    version_that_is_not_live_is_refused,
    published_weights_are_used,
    older_version_can_be_pinned,
    held_version_outlives_those_that_are_kept,
    every_token_knows_its_version_while_publishing,
)
