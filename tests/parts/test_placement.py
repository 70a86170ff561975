"""Cuts of layers are the best of all; shares add up and follow the weights."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from itertools import combinations_with_replacement, pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smolrun.parts.placement import checked_layers, cut, plan_batches, shares

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


def _all_cuts(num_layers: int, num_ranks: int) -> Iterator[list[range]]:
    """Every cut of layers into stages, empty ones included."""
    for ends in combinations_with_replacement(range(num_layers + 1), num_ranks - 1):
        yield [range(*pair) for pair in pairwise([0, *ends, num_layers])]


@st.composite
def _cut_problems(draw: st.DrawFn) -> dict[str, Any]:
    # Small integers: equal sums are equal floats, and limits often bind.
    layers, ranks = draw(st.integers(1, 7)), draw(st.integers(1, 4))
    numbers = st.integers(1, 9)
    limits = st.lists(st.integers(1, 40), min_size=ranks, max_size=ranks)
    return {
        "costs": draw(st.lists(numbers, min_size=layers, max_size=layers)),
        "speeds": draw(
            st.lists(st.sampled_from([0.25, 0.5, 1, 2]), min_size=ranks, max_size=ranks)
        ),
        "sizes": draw(st.lists(numbers, min_size=layers, max_size=layers)),
        "limits": draw(st.none() | limits),
        "shared_size": draw(st.integers(0, 1)),
        "may_leave_out": draw(st.booleans()),
    }


@given(_cut_problems())
def test_the_cut_is_the_best_of_all_cuts_that_fit(problem: dict[str, Any]) -> None:
    costs, sizes = problem["costs"], problem["sizes"]
    fitting = []
    for stages in _all_cuts(len(costs), len(problem["speeds"])):
        held = [sum(sizes[layer] for layer in stage) for stage in stages]
        held = [
            size - problem["shared_size"] if len(stage) == len(costs) else size
            for size, stage in zip(held, stages, strict=True)
        ]
        fits = problem["limits"] is None or all(map(operator.le, held, problem["limits"]))
        if fits and (problem["may_leave_out"] or all(stages)):
            times = [
                sum(costs[layer] for layer in stage) / speed
                for stage, speed in zip(stages, problem["speeds"], strict=True)
            ]
            fitting.append((max(times), sum(times)))
    found = cut(**problem)
    if found is None:
        assert not fitting
        return
    assert [layer for stage in found.layers for layer in stage] == list(range(len(costs)))
    assert (max(found.seconds), sum(found.seconds)) == min(fitting)


def test_a_slow_rank_gets_fewer_layers_or_none() -> None:
    even = cut([1.0] * 30, [1.0, 1.0])
    assert even is not None and [len(stage) for stage in even.layers] == [15, 15]
    slow = cut([1.0] * 30, [1.0, 0.25])
    assert slow is not None and [len(stage) for stage in slow.layers] == [24, 6]
    useless = cut([1.0] * 30, [1.0, 0.01], may_leave_out=True)
    assert useless is not None and [len(stage) for stage in useless.layers] == [30, 0]
    full = cut([1.0] * 30, [1.0, 0.01], sizes=[1.0] * 30, limits=[20, 20], may_leave_out=True)
    assert full is not None and [len(stage) for stage in full.layers] == [20, 10]
    assert cut([1.0] * 30, [1.0, 1.0], sizes=[1.0] * 30, limits=[20, 9]) is None


@pytest.mark.parametrize(
    ("layers", "sentence"),
    [
        ([[0, 4]], "1 stages for 2 ranks"),
        ([[0, 4], [6, 9]], "rank 1: layers 6 to 9 do not continue at layer 5"),
        ([[0, 4], [4, 9]], "do not continue at layer 5"),
        ([[0, 4], [5, 3]], "rank 1: layers 5 to 3"),
        ([[0, 4], [5, 8]], "end with layer 8, but the model has layers 0 to 9"),
        ([[0, 4], [5]], r"rank 1: write \[first layer, last layer\], not \[5\]"),
    ],
)
def test_layers_that_were_given_are_checked(layers: list[list[int]], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        checked_layers(layers, 10, 2)


def test_layers_that_were_given_are_stages() -> None:
    assert checked_layers([[0, 4], [], [5, 9]], 10, 3) == [range(5), range(5, 5), range(5, 10)]
