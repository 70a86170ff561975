"""The order of samples: a fresh permutation every epoch, the same for everybody."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smolrun.data.order import SampleOrder
from smolrun.data.splits import FeatureSplit
from smolrun.parts.placement import plan_batches
from smolrun.training.loader import BatchLoader, sequential_batches

sizes = st.integers(1, 400)
seeds = st.integers(0, 2**64)


@given(size=sizes, seed=seeds, epoch=st.integers(0, 1000))
def test_every_epoch_holds_every_sample_once(size: int, seed: int, epoch: int) -> None:
    assert sorted(SampleOrder(size, seed).indices(epoch * size, (epoch + 1) * size)) == list(
        range(size)
    )


@given(
    size=sizes,
    seed=seeds,
    start=st.integers(0, 2000),
    length=st.integers(0, 50),
    cuts=st.lists(st.integers(0, 50)),
)
def test_who_asks_for_which_part_changes_nothing(
    size: int, seed: int, start: int, length: int, cuts: list[int]
) -> None:
    whole = SampleOrder(size, seed).indices(start, start + length)
    borders = [0, *sorted(min(cut, length) for cut in cuts), length]
    parts = [
        SampleOrder(size, seed).indices(start + first, start + stop)
        for first, stop in pairwise(borders)
    ]
    assert [index for part in parts for index in part] == whole


@given(seed=st.integers(0, 2**32))
def test_epochs_and_seeds_differ(seed: int) -> None:
    first = SampleOrder(200, seed).indices(0, 200)
    assert first != SampleOrder(200, seed).indices(200, 400)
    assert first != SampleOrder(200, seed + 1).indices(0, 200)
    assert first != list(range(200))


def test_neighbours_are_scattered_evenly() -> None:
    """Each sample comes early, in the middle and late about equally often."""
    size, epochs = 50, 400
    sums = [0] * size
    for position in range(size * epochs):
        sums[SampleOrder(size, 1).index(position)] += position % size
    means = [total / epochs for total in sums]
    # The mean place of a uniform order is 24.5 with a deviation of 14.4 / sqrt(400) = 0.72.
    assert all(abs(mean - 24.5) < 4 * 0.72 for mean in means)


@settings(max_examples=50)
@given(size=st.integers(1, 10**15), seed=seeds, position=st.integers(0, 10**18))
def test_huge_data_needs_no_list(size: int, seed: int, position: int) -> None:
    assert 0 <= SampleOrder(size, seed).index(position) < size


def test_the_order_stays_the_same_between_versions() -> None:
    expected = [8, 9, 4, 2, 3, 6, 5, 1, 0, 7, 5, 0, 6, 4, 2, 9, 1, 8, 7, 3]
    assert SampleOrder(10, 0).indices(0, 20) == expected


@pytest.mark.parametrize("ranks", [1, 2, 7])
@pytest.mark.parametrize("size", [1, 3, 8, 50])
def test_few_samples_come_again_and_no_rank_goes_without(size: int, ranks: int) -> None:
    """More ranks than samples, and less data than a batch: it is repeated, pass after pass."""
    split = FeatureSplit(torch.arange(size)[:, None], torch.arange(size))
    feeds = [
        BatchLoader(split, SampleOrder(size, 5), plan_batches(8, [1.0] * ranks, rank))
        for rank in range(ranks)
    ]
    drawn: list[int] = []
    for step in range(25):
        parts = [torch.cat([batch.targets for batch in feed.load(step)]) for feed in feeds]
        assert all(len(part) for part in parts)
        drawn += torch.cat(parts).tolist()
    assert drawn == SampleOrder(size, 5).indices(0, 8 * 25)
    counts = Counter(drawn)
    assert max(counts.values()) - min(counts.values()) <= 1
    plans = [plan_batches(8, [1.0] * ranks, rank) for rank in range(ranks)]
    every = [list(sequential_batches(split, plan, None)) for plan in plans]
    assert len({len(batches) for batches in every}) == 1
    seen = [batch.targets for batches in every for step in batches for batch in step]
    assert sorted(torch.cat(seen).tolist()) == list(range(size))


@pytest.mark.parametrize(("size", "position"), [(0, 0), (-1, 0), (5, -1)])
def test_impossible_questions_are_refused(size: int, position: int) -> None:
    with pytest.raises(ValueError, match=r"at least one sample|counts from 0"):
        SampleOrder(size, 0).index(position)
