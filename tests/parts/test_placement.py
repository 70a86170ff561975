"""Shares add up, follow the weights, and give every rank the same number of micro-batches."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smolrun.parts.placement import plan_batches, shares

WEIGHTS = st.lists(st.floats(0.01, 100), min_size=1, max_size=9)


@given(st.integers(0, 10_000), WEIGHTS)
def test_shares_add_up_and_are_within_one_of_exact(total: int, weights: list[float]) -> None:
    counts = shares(total, weights)
    assert sum(counts) == total
    for count, weight in zip(counts, weights, strict=True):
        assert abs(count - total * weight / sum(weights)) < 1 + 1e-6


@given(st.integers(1, 300), WEIGHTS, st.integers(1, 40) | st.none(), st.integers(0, 20))
def test_ranks_cover_every_global_batch_without_overlap(
    global_batch: int, weights: list[float], micro: int | None, step: int
) -> None:
    plans = [plan_batches(global_batch, weights, rank, micro) for rank in range(len(weights))]
    seen = [
        position for plan in plans for positions in plan.positions(step) for position in positions
    ]
    assert sorted(seen) == list(range(step * global_batch, (step + 1) * global_batch))
    assert len({len(plan.sizes) for plan in plans}) == 1, (
        "all ranks run the same number of micro-batches"
    )
    assert micro is None or max(max(plan.sizes) for plan in plans) <= micro


def test_examples() -> None:
    assert shares(32, [1, 1, 1]) == [11, 11, 10]
    assert shares(8, [4, 2, 1, 1]) == [4, 2, 1, 1]
    assert (
        plan_batches(32, [8, 1, 3], 1, 4).sizes
        == (1, 1, 1, 0, 0, 0)[: len(plan_batches(32, [8, 1, 3], 1, 4).sizes)]
    )
    with pytest.raises(ValueError, match="positive"):
        shares(3, [0.0, 0.0])
