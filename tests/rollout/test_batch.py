"""What a batch tells of the staleness of its tokens."""

from __future__ import annotations

import pytest

from asyncrl.rollout.batch import StalenessStats


def test_staleness_by_hand() -> None:
    """At step 20: five tokens of version 20, one each of 19, 17, 16, and two of version 0."""
    stats = StalenessStats()
    stats.add(20, [20] * 5)
    stats.add(20, [19, 17, 16])
    stats.add(20, [0, 0])
    assert (stats.tokens, stats.highest, stats.lowest) == (10, 20, 0)
    assert stats.mean == pytest.approx((0 * 5 + 1 + 3 + 4 + 20 * 2) / 10)
    assert stats.shares() == pytest.approx(
        {
            "staleness_share_0": 0.5,
            "staleness_share_1": 0.1,
            "staleness_share_2": 0.0,
            "staleness_share_4": 0.2,
            "staleness_share_8": 0.0,
            "staleness_share_16": 0.0,
            "staleness_share_more": 0.2,
        }
    )


def test_an_empty_batch_has_no_shares() -> None:
    assert set(StalenessStats().shares().values()) == {0.0}
