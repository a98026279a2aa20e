"""Sessions go on over what they have seen: the same numbers as from nothing, at the price of what is new."""

from __future__ import annotations

from asyncio import Future
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncrl.sampling.embedded import prefixes
from asyncrl.sampling.embedded.batch import DecodeBatch, Finished
from asyncrl.sampling.embedded.columns import ColumnCache
from asyncrl.sampling.embedded.prefixes import Past, PrefixStore
from asyncrl.sampling.embedded.versions import LiveModel, ModelVersions
from asyncrl.sampling.embedded.worker import Publish, Settings, Submit, Worker
from tests.sampling.test_decoding import agree, make, prompt, reference, run, ticket

EXACT = 1e-5
"""Of a log-prob over kept keys against one from nothing, float32."""
LIMIT = 2**20


@pytest.fixture(autouse=True)
def _inference() -> Any:
    with torch.inference_mode():
        yield


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of each prefill, padding included."""
    sizes: list[int] = []
    forward = LiveModel.last_logits

    def spy(self: LiveModel, ids: torch.Tensor, **options: Any) -> torch.Tensor:
        if ids.shape[1] > 1:
            sizes.append(ids.numel())
        return forward(self, ids, **options)

    monkeypatch.setattr(LiveModel, "last_logits", spy)
    return sizes


def batch_of(model: LiveModel, store: PrefixStore | None = None, *, prefill_tokens: int = 1000) -> DecodeBatch:
    return DecodeBatch(model, store or PrefixStore(LIMIT), max_rows=16, prefill_tokens=prefill_tokens)


def history(item: Finished) -> list[int]:
    return [*item.ticket.prompt.tolist(), *item.completion.tokens]


def from_nothing(model: LiveModel, item: Finished, seed: int) -> list[float]:
    batch, old = batch_of(model), item.ticket
    again = ticket(old.prompt.tolist(), seed=seed, max_tokens=old.max_tokens)
    (fresh,) = batch.join([again]) + run(batch)
    assert fresh.completion.tokens == item.completion.tokens
    return list(fresh.completion.logprobs)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "sliding", "gpt2"])
def test_a_conversation_computes_what_is_new_and_draws_what_it_would_from_nothing(
    kind: str, computed: list[int]
) -> None:
    """Three sessions of different lengths, four turns, on four kinds of attention and positions."""
    model = make(kind)
    batch = batch_of(model)
    seen = {name: prompt(length) for name, length in (("a", 5), ("b", 30), ("c", 90))}
    for turn in range(4):
        del computed[:]
        rows = [ticket(seen[name], seed=turn, session=name, max_tokens=6 + turn) for name in seen]
        finished = batch.join(rows) + run(batch)
        assert len(finished) == 3
        if turn:
            assert computed == [3 * (turn + 1)]  # the last token drawn, and `turn` new ones, of each
        for item in finished:
            assert item.completion.logprobs == pytest.approx(from_nothing(model, item, turn), abs=EXACT)
            seen[item.ticket.session] = [*history(item), *prompt(turn + 1, seed=turn)]
        agree(model, finished)


def test_what_differs_is_computed_again(computed: list[int]) -> None:
    """A history that was rewritten in the middle, one that was cut, and the same prompt once more."""
    model, store = make("llama"), PrefixStore(LIMIT)
    batch = batch_of(model, store)
    text = prompt(40)
    batch.join([ticket(text, session="a", max_tokens=4)])
    run(batch)
    for changed, new in ([*text[:25], *prompt(9, seed=1)], 9), (text[:18], 1), (text, 1):
        del computed[:]
        item = ticket(changed, seed=1, session="a", max_tokens=4)
        finished = batch.join([item]) + run(batch)
        assert computed == ([new] if new > 1 else [])
        agree(model, finished)


def test_rows_with_much_that_is_new_do_not_make_the_others_compute_theirs_again(computed: list[int]) -> None:
    model = make("llama")
    batch = batch_of(model)
    batch.join([ticket(prompt(150, i), seed=i, session=str(i), max_tokens=2) for i in range(3)])
    (*known,) = (history(item) for item in run(batch))
    del computed[:]
    rows = [ticket([*text, 1, 2], session=str(i), max_tokens=3) for i, text in enumerate(known)]
    finished = batch.join([*rows, ticket(prompt(149, 9), max_tokens=3)]) + run(batch)
    assert sum(computed) < 149 + 3 * 150
    assert computed[0] == 149
    agree(model, finished)


def test_equal_prompts_are_computed_once(computed: list[int]) -> None:
    """Two groups of four and another request; each draws its own."""
    model = make("qwen3")
    batch = batch_of(model)
    rows = [ticket(prompt(length), seed=i, session=str(i), max_tokens=9) for i in range(4) for length in (20, 30)]
    finished = batch.join([*rows, ticket(prompt(25), max_tokens=9)]) + run(batch)
    assert computed == [3 * 30]
    assert len({tuple(item.completion.tokens) for item in finished}) == 9
    agree(model, finished)


@pytest.mark.parametrize("recompute", [False, True])
def test_what_two_models_computed_is_not_kept(recompute: bool, computed: list[int]) -> None:
    """Unless a swap computed it again: then it is all of the new weights."""
    old, new, store = make("llama", 0), make("llama", 1), PrefixStore(LIMIT)
    batch = batch_of(old, store)
    batch.join([ticket(prompt(30), session="a", max_tokens=4)])
    batch.step()
    batch.swap(new, recompute=recompute)
    (item,) = run(batch)
    assert bool(store.kept_bytes) == recompute
    del computed[:]
    finished = batch.join([ticket([*history(item), 1], session="a", max_tokens=4)]) + run(batch)
    assert computed == [2 if recompute else 35]
    agree(new, finished)


def test_a_swap_computes_again_what_was_recalled() -> None:
    old, new = make("llama", 0), make("llama", 1)
    batch = batch_of(old)
    batch.join([ticket(prompt(30), session="a", max_tokens=4)])
    (item,) = run(batch)
    batch.join([ticket([*history(item), 1], session="a", max_tokens=4)])
    batch.swap(new, recompute=True)
    (item,) = run(batch)
    assert item.completion.logprobs[:1] == pytest.approx(reference(old, item)[:1], abs=1e-4)
    assert item.completion.logprobs[1:] == pytest.approx(reference(new, item)[1:], abs=1e-4)


def test_another_model_finds_nothing(computed: list[int]) -> None:
    """Not even under the same version number."""
    models, store = [make("llama", 0), make("llama", 0)], PrefixStore(LIMIT)
    assert models[0].version == models[1].version
    for model in models:
        batch = batch_of(model, store)
        agree(model, batch.join([ticket(prompt(30), session="a", max_tokens=4)]) + run(batch))
    assert computed == [30, 30]


EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("turn"), st.integers(0, 3), st.integers(1, 9)),
        st.tuples(st.just("fork"), st.integers(0, 3), st.integers(1, 30)),
        st.tuples(st.just("step"), st.integers(1, 6), st.just(0)),
        st.tuples(st.just("swap"), st.just(0), st.booleans()),
    ),
    max_size=30,
)
MODELS = [make("llama", seed) for seed in range(2)]


@settings(max_examples=30, deadline=None, derandomize=True)
@given(events=EVENTS, limit=st.sampled_from([0, 40_000, LIMIT]))
def test_any_schedule_of_sessions_keeps_every_log_prob_right(events: list[tuple[str, int, int]], limit: int) -> None:
    """Sessions that go on, fork and overlap, under swaps of both kinds, with a store that is large, small or none."""
    with torch.inference_mode():
        store, version = PrefixStore(limit), 0
        batch = batch_of(MODELS[0], store, prefill_tokens=60)
        texts = {str(i): prompt(3 + 9 * i) for i in range(4)}
        mixed, finished = set(), []
        for n, (what, first, second) in enumerate(events):
            done: list[Finished] = []
            if what in ("turn", "fork"):
                name = str(first)
                text = [*texts[name], *prompt(second, n)] if what == "turn" else texts[name][:second]
                done = batch.join([ticket(text, seed=n, session=name, max_tokens=5)])
            elif what == "step":
                for _ in range(first):
                    done += batch.step() if batch.running else []
            else:
                version = 1 - version
                batch.swap(MODELS[version], recompute=bool(second))
                mixed |= {row for row in batch.tickets if row is not None and not second}
            texts |= {item.ticket.session: history(item)[:400] for item in done}
            finished += done
            assert store.kept_bytes <= limit
        finished += run(batch)
        for item in finished:
            if item.ticket not in mixed:
                under = [reference(model, item) for model in MODELS]
                expected = [under[v][i] for i, v in enumerate(item.completion.versions)]
                assert item.completion.logprobs == pytest.approx(expected, abs=1e-4)


def test_published_weights_free_what_the_old_ones_saw() -> None:
    versions = ModelVersions(make("llama", 0), keep=1, lora_scale=None)
    settings = Settings(max_running=4, in_flight="keep", side_by_side=False, prefill_tokens=1000, torch_threads=1)
    worker = Worker(versions, settings, lambda replies: None)
    worker.inbox.put(Submit([ticket(prompt(9), session="a", max_tokens=1)]))
    worker.turn()
    assert worker.prefixes.kept_bytes
    worker.inbox.put(Publish(make("llama", 1), cast("Future[None]", None)))
    worker.turn()
    assert versions.newest == 1
    assert not worker.prefixes.kept_bytes


class TestScore:
    @pytest.mark.parametrize("kind", ["llama", "sliding", "gpt2"])
    def test_over_kept_keys_it_is_what_it_is_from_nothing(self, kind: str) -> None:
        model, store = make(kind), PrefixStore(LIMIT)
        batch = batch_of(model, store)
        batch.join([ticket(prompt(30), session="a", max_tokens=6)])
        (item,) = run(batch)
        ids = np.array([*history(item), *prompt(7)])
        for start in (36, 40, 12, 1):
            states, seen = store.find(model, "a", ids[:start])
            assert seen == min(35, start - 1)
            cache = ColumnCache.of_row(states, seen, len(ids)) if seen else None
            found = model.logprobs(torch.from_numpy(ids), start, cache, seen)
            torch.testing.assert_close(found, model.logprobs(torch.from_numpy(ids), start), atol=EXACT, rtol=0)


class TestStore:
    MODEL = make("llama")

    def past(self, *tokens: int) -> Past:
        """Of 32 bytes a token."""
        states = torch.zeros(1, len(tokens), 4)
        return Past(np.array(tokens), [(states, states), None])

    def seen(self, store: PrefixStore, session: str, *tokens: int) -> int:
        return store.find(self.MODEL, session, np.array(tokens))[1]

    def test_the_longest_common_beginning_is_found_but_never_all(self) -> None:
        store = PrefixStore(LIMIT)
        for tokens in (1, 2, 3, 4), (1, 5, 6):
            store.keep(self.MODEL, "a", self.past(*tokens))
        cases = {(1, 2, 3, 9): 3, (1, 2, 3, 4, 5): 4, (1, 2, 3, 4): 3, (1, 5, 6, 7): 3, (1, 9): 1, (7, 8): 0, (1,): 0}
        assert {tokens: self.seen(store, "a", *tokens) for tokens in cases} == cases
        assert self.seen(store, "b", 1, 2, 3) == 0

    def test_what_goes_on_takes_the_place_of_what_it_goes_on_from(self) -> None:
        store = PrefixStore(LIMIT)
        for tokens in (1, 2), (1, 2, 3), (1, 9):
            store.keep(self.MODEL, "a", self.past(*tokens))
        assert store.kept_bytes == 5 * 32

    def test_a_session_that_forks_without_end_keeps_a_few_branches(self) -> None:
        store = PrefixStore(LIMIT)
        for branch in range(50):
            store.keep(self.MODEL, "a", self.past(1, 2, branch))
        assert store.kept_bytes == 4 * 3 * 32
        assert self.seen(store, "a", 1, 2, 49, 3) == 3

    def test_the_session_that_rested_longest_goes_first(self) -> None:
        store = PrefixStore(6 * 32)
        for session in "abc":
            store.keep(self.MODEL, session, self.past(1, 2))
        assert self.seen(store, "a", 1, 2, 3) == 2
        store.keep(self.MODEL, "d", self.past(1, 2))
        assert [self.seen(store, session, 1, 2, 3) for session in "abcd"] == [2, 0, 2, 2]
        store.keep(self.MODEL, "e", self.past(*range(7)))
        assert store.kept_bytes == 6 * 32

    def test_models_that_go_take_theirs_along(self) -> None:
        store, other = PrefixStore(LIMIT), make("llama")
        for model in (self.MODEL, other):
            store.keep(model, "a", self.past(1, 2))
        store.retain({other})
        assert store.kept_bytes == 2 * 32
        assert self.seen(store, "a", 1, 2, 3) == 0

    def test_where_nobody_comes_back_it_keeps_a_sample(self) -> None:
        store = PrefixStore(LIMIT)
        assert sum(store.wants_more() for _ in range(256 + 160)) == 256 + 10
        store.keep(self.MODEL, "a", self.past(1, 2))
        assert self.seen(store, "a", 1, 2, 3) == 2
        assert all(store.wants_more() for _ in range(256))

    def test_its_size_follows_from_the_model(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert PrefixStore.beside(self.MODEL).limit_bytes == prefixes.LEAST_BYTES
        monkeypatch.setattr(prefixes, "LEAST_BYTES", 100)
        weights = sum(parameter.numel() * 4 for parameter in self.MODEL.module.parameters())
        assert PrefixStore.beside(self.MODEL).limit_bytes == weights // 2 > 100
