"""Which sequence goes into which microbatch, and what it shares there."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncrl.training.columns import Columns, token_columns, train_columns
from asyncrl.training.layout import lay_out
from asyncrl.training.plan import SHARED_TOKEN_COST, Cut, plan
from asyncrl.types import TrainSequence
from tests.training.cases import everything_shared, token_lists


def columns_of(groups: Sequence[Sequence[Sequence[int]]]) -> Columns:
    """Every token but each first is trained."""
    return train_columns(
        [
            TrainSequence(tokens, [0.0] * len(tokens), [1] * len(tokens), 1.0, group)
            for group, members in enumerate(groups)
            for tokens in members
        ]
    )


def answers(seed: int, groups: int, members: int, prompt: int, answer: int) -> list[list[list[int]]]:
    prompts = token_lists(seed, [prompt] * groups)
    tails = token_lists(seed + 1, [answer] * (groups * members))
    return [
        [start + tail for tail in tails[place * members : (place + 1) * members]] for place, start in enumerate(prompts)
    ]


def row_tokens(columns: Columns, cut: Cut) -> int:
    return lay_out(columns.used[cut.indices], cut.shared)[0].tokens


def bins(columns: Columns, max_tokens: int) -> list[set[int]]:
    return [set(cut.indices.tolist()) for cut in plan(columns, max_tokens, share=False)]


def test_plan_by_hand() -> None:
    """The last token of each is only predicted. Best fit: 4 goes beside 5, where it leaves least room."""
    columns = token_columns(token_lists(0, [4, 10, 6, 3, 5, 21]))
    assert bins(columns, 10) == [{5}, {1}, {2, 4}, {0, 3}]
    assert bins(columns, 100) == [{0, 1, 2, 3, 4, 5}]
    assert bins(token_columns([]), 10) == []
    assert bins(token_columns([[1], [1, 2], [3]]), 10) == [{1}]


def test_groups_do_their_prompt_once() -> None:
    """8 groups of 8 x (24 prompt + 6 answer): 8 x (24 + 8 x 5), up to answers that begin alike."""
    columns = columns_of(answers(0, 8, 8, 24, 6))
    (cut,) = plan(columns, 8192, share=True)
    assert row_tokens(columns, cut) == pytest.approx(512, abs=8)
    (cut,) = plan(columns, 8192, share=False)
    assert row_tokens(columns, cut) == 8 * 8 * 29


def test_a_group_stays_together_where_it_fits() -> None:
    columns = columns_of(answers(0, 8, 8, 24, 6))
    cuts = plan(columns, 100, share=True)
    groups = [set(columns.groups[cut.indices].tolist()) for cut in cuts]
    assert sorted(groups, key=min) == [{group} for group in range(8)]


def test_a_group_that_does_not_fit_is_cut_and_shares_in_each_part() -> None:
    columns = columns_of(answers(0, 1, 8, 40, 21))
    cuts = plan(columns, 110, share=True)
    assert [len(cut.indices) for cut in cuts] == [3, 3, 2]
    for cut in cuts:
        assert row_tokens(columns, cut) == pytest.approx(40 + 20 * len(cut.indices), abs=2)


def test_whole_groups_are_never_cut() -> None:
    columns = columns_of(answers(0, 4, 3, 2, 30))
    for share in (False, True):
        cuts = plan(columns, 50, share=share, whole_groups=True)
        groups = [group for cut in cuts for group in set(columns.groups[cut.indices].tolist())]
        assert sorted(groups) == [0, 1, 2, 3]


def test_groups_share_what_their_prompts_begin_with() -> None:
    """Two system prompts, in turn."""
    systems = token_lists(5, [60, 60])
    groups = enumerate(answers(0, 4, 2, 20, 9))
    columns = columns_of([[systems[number % 2] + tokens for tokens in group] for number, group in groups])
    (cut,) = plan(columns, 8192, share=True)
    assert row_tokens(columns, cut) == pytest.approx(2 * 60 + 4 * (20 + 2 * 8), abs=4)


def test_a_group_that_fits_only_beside_another_is_cut() -> None:
    """60 + 10 + 2 x 9 tokens: too many for a group of its own, though what it adds to another would be few."""
    system = token_lists(5, [60])[0]
    columns = columns_of([[system + tokens for tokens in group] for group in answers(0, 3, 2, 10, 10)])
    for cut in plan(columns, 84, share=True):
        assert row_tokens(columns, cut) <= 84


def test_little_in_common_is_not_shared() -> None:
    short, long = token_lists(0, [7, 10])
    near, far = token_lists(1, [30, 400])
    columns = columns_of([[short + near, short + near[::-1]], [long + far, long + far[::-1]]])
    (cut,) = plan(columns, 8192, share=True)
    assert not cut.shared.any()


tokens = st.lists(st.integers(0, 2), min_size=1, max_size=25)


@given(
    groups=st.lists(st.lists(tokens, min_size=1, max_size=6), max_size=6),
    budget=st.integers(1, 150),
    share=st.booleans(),
    whole_groups=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_each_once_within_the_budget(
    groups: list[list[list[int]]], budget: int, share: bool, whole_groups: bool
) -> None:
    columns = columns_of(groups)
    with everything_shared():
        cuts = plan(columns, budget, share=share, whole_groups=whole_groups)
    placed = [index for cut in cuts for index in cut.indices.tolist()]
    assert sorted(placed) == [index for index, used in enumerate(columns.used) if used > 0]
    flat = [member for group in groups for member in group]
    for cut in cuts:
        members = [flat[index][:-1] for index in cut.indices]
        for before, after, shared in zip([[], *members], members, cut.shared, strict=False):
            assert before[:shared] == after[:shared]
            assert len(before) >= shared
        alone = len(members) == 1 or (whole_groups and len(set(columns.groups[cut.indices].tolist())) == 1)
        cost = row_tokens(columns, cut) + SHARED_TOKEN_COST * cut.shared.sum()
        assert cost <= budget or alone
        assert share or not cut.shared.any()
    if whole_groups:
        homes = [set(columns.groups[cut.indices].tolist()) for cut in cuts]
        assert sum(map(len, homes)) == len(set().union(*homes))


@given(group=st.lists(tokens, min_size=1, max_size=12))
@settings(max_examples=100, deadline=None)
def test_a_group_shares_all_that_it_can(group: list[list[int]]) -> None:
    """One token of the row for each different beginning, at any depth."""
    columns = columns_of([group])
    with everything_shared():
        cuts = plan(columns, 8192, share=True)
    beginnings = {tuple(member[:end]) for member in group for end in range(1, len(member))}
    assert sum(row_tokens(columns, cut) for cut in cuts) == len(beginnings)
