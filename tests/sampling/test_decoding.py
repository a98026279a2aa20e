"""The embedded engine without its thread: drawing, the aligned cache, batches. Everything here is synchronous."""

from __future__ import annotations

import math
from asyncio import Future
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from asyncrl.sampling.embedded.attention import grouped_attention, use_grouped_attention
from asyncrl.sampling.embedded.batch import DecodeBatch, Finished, Ticket
from asyncrl.sampling.embedded.draw import DrawParams, draw, stream_of_seed, uniforms
from asyncrl.sampling.embedded.prefixes import PrefixStore
from asyncrl.sampling.embedded.versions import LiveModel, ModelVersions
from asyncrl.sampling.embedded.worker import Cancel, Settings, Submit, Worker
from asyncrl.types import Completion, SamplingParams

VOCABULARY = 61


@pytest.fixture(autouse=True)
def _inference() -> Any:
    with torch.inference_mode():
        yield


def make(kind: str, seed: int = 0) -> LiveModel:
    torch.manual_seed(seed)
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,  # far from uniform, so that a wrong past shows
    }
    builders: dict[str, Any] = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**shape)),
        "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**shape, head_dim=16, tie_word_embeddings=True)),
        "sliding": lambda: MistralForCausalLM(MistralConfig(**shape, sliding_window=7)),
        "gpt2": lambda: GPT2LMHeadModel(
            GPT2Config(vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=512, initializer_range=0.2)
        ),
    }
    module = builders[kind]().eval()
    use_grouped_attention(module)
    return LiveModel(module, seed, 2, VOCABULARY, torch.device("cpu"), {"logits_to_keep": 1})


def ticket(prompt: list[int], seed: int = 0, session: str = "", **params: Any) -> Ticket:
    sampling = SamplingParams(**{"max_tokens": 8, **params})
    reply = cast("Future[Completion]", None)  # no event loop here
    return Ticket(np.array(prompt), sampling, sampling.max_tokens, stream_of_seed(seed), None, reply, session)


def prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(1000 * seed + length).integers(0, VOCABULARY, length).tolist()


def run(batch: DecodeBatch, limit: int = 500) -> list[Finished]:
    finished: list[Finished] = []
    while batch.running and limit:
        finished += batch.step()
        limit -= 1
    assert limit, "the batch never ended"
    return finished


def reference(model: LiveModel, item: Finished) -> list[float]:
    """Log-probs of a completion by one plain forward, after the request's temperature, top-k and top-p."""
    ids = torch.tensor([*item.ticket.prompt.tolist(), *item.completion.tokens])
    params, drawn = item.ticket.params, len(item.completion.tokens)
    logits = model.module(input_ids=ids[None]).logits[0, -drawn - 1 : -1].double() / (params.temperature or 1.0)
    expected = []
    for scores, token in zip(logits, item.completion.tokens, strict=True):
        ranked = sorted(range(VOCABULARY), key=lambda i: -float(scores[i]))[: params.top_k or None]
        mass = torch.softmax(scores[ranked], 0).tolist()
        kept = [i for n, i in enumerate(ranked) if sum(mass[:n]) < params.top_p]
        expected.append(float(scores[token] - torch.logsumexp(scores[kept], 0)))
    return expected


def agree(model: LiveModel, finished: list[Finished], tolerance: float = 1e-4) -> None:
    for item in finished:
        assert item.completion.logprobs == pytest.approx(reference(model, item), abs=tolerance)


def test_grouped_attention_is_that_of_repeated_keys() -> None:
    random = torch.Generator().manual_seed(0)
    query, key, value = [
        torch.randn(3, heads, *shape, generator=random) for heads, *shape in [(6, 1, 8), (2, 9, 8), (2, 9, 8)]
    ]
    mask = torch.arange(9)[None, None, None] >= torch.tensor([0, 4, 8])[:, None, None, None]  # [3, 1, 1, 9]
    found, _ = grouped_attention(torch.nn.Module(), query, key, value, mask, scaling=0.3)
    scores = (query @ key.repeat_interleave(3, 1).mT * 0.3).masked_fill(~mask, -torch.inf)
    torch.testing.assert_close(found, (scores.softmax(-1) @ value.repeat_interleave(3, 1)).transpose(1, 2))


class TestDraw:
    def params(self, rows: int, **tensors: Any) -> DrawParams:
        return DrawParams(torch.ones(rows, 1), **{"greedy": None, "top_k": None, "top_p": None, **tensors})

    def test_uniforms_are_those_of_splitmix64(self) -> None:
        """First outputs of the reference implementation for the state 1234567."""
        out = [6457827717110365317, 3203168211198807973, 9817491932198370423]
        streams = np.full(3, 1234567, dtype=np.uint64)
        assert uniforms(streams, np.arange(3)).tolist() == [(value >> 11) * 2.0**-53 for value in out]

    def test_frequencies_follow_the_distribution(self) -> None:
        """Chi-square over 8 tokens: 7 degrees of freedom, 24.3 is the 0.999 quantile."""
        probabilities = torch.tensor([0.3, 0.2, 0.2, 0.1, 0.1, 0.05, 0.04, 0.01])
        count = 20_000
        uniform = uniforms(np.full(count, stream_of_seed(5)), np.arange(count))
        drawn = draw(probabilities.log().expand(count, -1), self.params(count), uniform)
        seen = torch.bincount(drawn.tokens, minlength=8)
        assert float(((seen - count * probabilities) ** 2 / (count * probabilities)).sum()) < 24.3

    def test_a_token_of_no_mass_is_never_drawn(self) -> None:
        logits = torch.tensor([[-math.inf, 0.0, -math.inf, 0.0, -math.inf]]).repeat(2, 1)
        drawn = draw(logits, self.params(2), np.array([0.0, 1 - 2.0**-53]))
        assert drawn.tokens.tolist() == [1, 3]
        assert drawn.logprobs.tolist() == pytest.approx([math.log(0.5)] * 2)

    @pytest.mark.parametrize(
        ("top_k", "top_p", "kept"),
        [(2, 1.0, [0, 2]), (5, 0.45, [0, 2]), (5, 0.4, [0]), (2, 0.6, [0, 2]), (1, 0.1, [0])],
    )
    def test_top_k_comes_before_top_p(self, top_k: int, top_p: float, kept: list[int]) -> None:
        """0.4, 0.1, 0.3, 0.1, 0.1: the two best are 4/7 and 3/7 of what top_k=2 leaves."""
        probabilities = torch.tensor([0.4, 0.1, 0.3, 0.1, 0.1])
        count = 400
        limits = {"top_k": torch.full((count, 1), top_k), "top_p": torch.full((count, 1), top_p)}
        uniform = (np.arange(count) + 0.5) / count
        drawn = draw(probabilities.log().expand(count, -1), self.params(count, **limits), uniform)
        assert sorted(set(drawn.tokens.tolist())) == kept
        expected = (probabilities / probabilities[kept].sum()).log()
        torch.testing.assert_close(drawn.logprobs, expected[drawn.tokens])

    def test_a_greedy_row_takes_the_best(self) -> None:
        logits = torch.tensor([[0.0, 1.0, 0.5]]).repeat(2, 1)
        drawn = draw(logits, self.params(2, greedy=torch.tensor([True, False])), np.array([0.0, 0.0]))
        assert drawn.tokens.tolist() == [1, 0]


class TestBatch:
    @pytest.mark.parametrize("kind", ["llama", "qwen3", "sliding", "gpt2"])
    def test_logprobs_are_those_of_a_plain_forward(self, kind: str) -> None:
        """Ragged prompts that join at different moments, on four kinds of attention and positions."""
        model = make(kind)
        batch = DecodeBatch(model, PrefixStore(0), max_rows=16, prefill_tokens=64)
        finished = batch.join([ticket(prompt(n), seed=n, max_tokens=n) for n in (1, 5, 23, 2)])
        for late in (40, 3, 90, 11):
            for _ in range(4):
                finished += batch.step()
            finished += batch.join([ticket(prompt(late), seed=late, max_tokens=20), ticket(prompt(9), seed=late + 1)])
        finished += run(batch)
        assert len(finished) == 12
        agree(model, finished)

    def test_logprobs_are_those_after_temperature_top_k_and_top_p(self) -> None:
        model = make("llama")
        batch = DecodeBatch(model, PrefixStore(0), max_rows=16, prefill_tokens=1000)
        settings = [{"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.7}, {"temperature": 2.0, "top_k": 20, "top_p": 0.9}]
        finished = batch.join([ticket(prompt(5 + i), seed=i, **more) for i, more in enumerate(settings)]) + run(batch)
        agree(model, finished)

    def test_greedy_is_that_of_generate(self) -> None:
        model = make("qwen3")
        batch = DecodeBatch(model, PrefixStore(0), max_rows=4, prefill_tokens=1000)
        finished = batch.join([ticket(prompt(n), temperature=0, max_tokens=12) for n in (17, 2)])
        for n in (30, 5):
            batch.step()
            finished += batch.join([ticket(prompt(n), temperature=0, max_tokens=12)])
        for item in finished + run(batch):
            ids = torch.from_numpy(item.ticket.prompt)[None]
            expected = model.module.generate(  # type: ignore[operator]
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=12,
                pad_token_id=0,
                eos_token_id=-1,
            )
            assert list(item.completion.tokens) == expected[0, ids.shape[1] :].tolist()

    def test_a_seeded_request_is_the_same_alone_and_in_company(self) -> None:
        model = make("llama")
        alone = DecodeBatch(model, PrefixStore(0), max_rows=8, prefill_tokens=1000)
        expected = (alone.join([ticket(prompt(9), seed=42, max_tokens=20)]) + run(alone))[0].completion.tokens
        batch = DecodeBatch(model, PrefixStore(0), max_rows=8, prefill_tokens=1000)
        batch.join([ticket(prompt(n), seed=n, top_p=0.8, max_tokens=30) for n in (3, 33)])
        batch.step()
        mine = ticket(prompt(9), seed=42, max_tokens=20)
        batch.join([ticket(prompt(2), temperature=0), mine])
        assert [item.completion.tokens for item in run(batch) if item.ticket is mine] == [expected]

    def test_a_stop_token_ends_and_belongs_to_the_completion(self) -> None:
        """Rows with different numbers of stop tokens, one of which hits."""
        model = make("llama")
        free = DecodeBatch(model, PrefixStore(0), max_rows=4, prefill_tokens=1000)
        drawn = (free.join([ticket(prompt(4), seed=3, max_tokens=20)]) + run(free))[0].completion
        first = drawn.tokens.index(drawn.tokens[7])
        absent = next(token for token in range(VOCABULARY) if token not in drawn.tokens)
        batch = DecodeBatch(model, PrefixStore(0), max_rows=4, prefill_tokens=1000)
        mine = ticket(prompt(4), seed=3, max_tokens=20, stop_token_ids=(absent, drawn.tokens[7]))
        finished = batch.join([ticket(prompt(4), seed=3, max_tokens=20, stop_token_ids=(absent,)), mine]) + run(batch)
        found = {item.ticket is mine: item.completion for item in finished}
        assert (found[True].tokens, found[True].finish_reason) == (drawn.tokens[: first + 1], "stop")
        assert (found[False].tokens, found[False].finish_reason) == (drawn.tokens, "length")

    def test_rows_that_leave_make_room_and_disturb_nobody(self) -> None:
        model = make("llama")
        batch = DecodeBatch(model, PrefixStore(0), max_rows=8, prefill_tokens=1000)
        rows = [ticket(prompt(3 + i), seed=i, max_tokens=15) for i in range(8)]
        batch.join(rows)
        batch.step()
        for gone in (rows[7], rows[0], rows[3]):  # whatever rows they have
            batch.leave(gone)
        finished = batch.step()
        assert len(batch.tickets) == batch.running == 5
        finished += batch.join([ticket(prompt(4), seed=100 + i) for i in range(3)]) + run(batch)
        assert len(finished) == 8
        agree(model, finished)

    def test_columns_are_used_again(self) -> None:
        """A long life of short rows needs no more columns than the rows that live at once."""
        model = make("llama")
        batch = DecodeBatch(model, PrefixStore(0), max_rows=2, prefill_tokens=1000)
        finished = batch.join([ticket(prompt(5), max_tokens=9)])
        for i in range(60):
            for _ in range(4):
                finished += batch.step()
            finished += batch.join([ticket(prompt(5), seed=i, max_tokens=9)])
        assert batch.cursor < 128
        agree(model, finished[-5:])

    @pytest.mark.parametrize("recompute", [False, True])
    def test_a_swap_is_recorded_token_by_token(self, recompute: bool) -> None:
        """`keep`: the past stays that of the old weights; `interrupt`: it becomes that of the new ones."""
        old, new = make("llama", 0), make("llama", 1)
        batch = DecodeBatch(old, PrefixStore(0), max_rows=4, prefill_tokens=16)
        batch.join([ticket(prompt(6), seed=1, max_tokens=10), ticket(prompt(3), seed=2, max_tokens=9)])
        batch.step()
        batch.step()
        batch.swap(new, recompute=recompute)
        for item in run(batch):
            drawn = len(item.completion.tokens)
            assert item.completion.versions == [0] * 3 + [1] * (drawn - 3)
            under_old, under_new = reference(old, item), reference(new, item)
            assert item.completion.logprobs[:3] == pytest.approx(under_old[:3], abs=1e-4)
            if recompute:
                assert item.completion.logprobs[3:] == pytest.approx(under_new[3:], abs=1e-4)
            else:
                mixed = mixture(old, new, item, 3)
                assert item.completion.logprobs[3:] == pytest.approx(mixed, abs=1e-4)
                assert item.completion.logprobs[3:] != pytest.approx(under_new[3:], abs=1e-3)


def mixture(old: LiveModel, new: LiveModel, item: Finished, drawn_before: int) -> list[float]:
    """Log-probs under `new` over keys and values of `old` for all that was fed before the swap."""
    from transformers import DynamicCache

    ids = torch.tensor([*item.ticket.prompt.tolist(), *item.completion.tokens])[None]
    fed, cache = len(item.ticket.prompt) + drawn_before - 1, DynamicCache()
    old.module(input_ids=ids[:, :fed], past_key_values=cache, use_cache=True)
    logits = new.module(input_ids=ids[:, fed:], past_key_values=cache, use_cache=True).logits[0, :-1]
    return logits.log_softmax(-1).gather(-1, ids[0, fed + 1 :, None])[:, 0].tolist()


class TestWorker:
    """Without its thread: turns are taken by hand."""

    def worker(self, **options: Any) -> Worker:
        options = {"max_running": 2, "in_flight": "keep", "side_by_side": False, **options}
        versions = ModelVersions(make("llama"), keep=1, lora_scale=None)
        return Worker(versions, Settings(**options, prefill_tokens=1000, torch_threads=1), lambda replies: None)

    def test_cancelling_frees_the_row_at_the_next_step(self) -> None:
        worker, rows = self.worker(), [ticket(prompt(5), max_tokens=100) for _ in range(4)]
        worker.inbox.put(Submit(rows))
        worker.turn()
        assert [row.batch is not None for row in rows] == [True, True, False, False]
        for gone in (rows[0], rows[2]):  # one that runs, one that waits
            worker.inbox.put(Cancel(gone))
        worker.turn()
        assert worker.running == 2
        assert rows[3].row >= 0 > rows[0].row
        assert rows[2].batch is None

    def test_few_requests_wait_a_little_for_company(self) -> None:
        """One request among 16 rows joins after four held steps, or as soon as it has company enough."""
        worker = self.worker(max_running=32)
        worker.inbox.put(Submit([ticket(prompt(3), max_tokens=100) for _ in range(16)]))
        worker.turn()
        worker.inbox.put(Submit([ticket(prompt(3), max_tokens=100)]))
        counts = []
        for _ in range(5):
            worker.turn()
            counts.append(worker.running)
        worker.inbox.put(Submit([ticket(prompt(3), max_tokens=100) for _ in range(3)]))
        worker.turn()
        assert [*counts, worker.running] == [16, 16, 16, 16, 17, 20]


EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("join"), st.integers(1, 40), st.integers(1, 12)),
        st.tuples(st.just("step"), st.integers(1, 9), st.just(0)),
        st.tuples(st.just("cancel"), st.integers(0, 30), st.just(0)),
        st.tuples(st.just("swap"), st.just(0), st.just(0)),
    ),
    max_size=30,
)
MODELS = [make("llama", seed) for seed in range(2)]


@settings(max_examples=30, deadline=None, derandomize=True)
@given(events=EVENTS)
def test_any_schedule_keeps_every_row_right(events: list[tuple[str, int, int]]) -> None:
    """Joins, cancels and swaps (with recomputation) in any order: who was not cancelled ends, with exact log-probs."""
    batch, version = DecodeBatch(MODELS[0], PrefixStore(0), max_rows=64, prefill_tokens=50), 0
    open_tickets: list[Ticket] = []
    finished: list[Finished] = []
    for n, (what, first, second) in enumerate(events):
        if what == "join":
            open_tickets.append(ticket(prompt(first, n), seed=n, max_tokens=second))
            finished += batch.join(open_tickets[-1:])
        elif what == "step" and batch.running:
            for _ in range(first):
                finished += batch.step() if batch.running else []
        elif what == "cancel":
            running = [row for row in batch.tickets if row is not None]
            if running:
                gone = running[first % len(running)]
                batch.leave(gone)
                open_tickets.remove(gone)
        elif what == "swap":
            version = 1 - version
            batch.swap(MODELS[version], recompute=True)
    finished += run(batch)
    assert {id(item.ticket) for item in finished} == {id(row) for row in open_tickets}
    for item in finished:
        completion = item.completion
        assert len(completion.tokens) == len(completion.logprobs) == len(completion.versions) == item.ticket.max_tokens
        under = [reference(model, item) for model in MODELS]
        expected = [under[v][i] for i, v in enumerate(completion.versions)]
        assert completion.logprobs == pytest.approx(expected, abs=2e-4)
