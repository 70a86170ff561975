"""Every sample once per epoch, over all ranks together, in an order that does not know the world
size."""

from __future__ import annotations

import pytest
import torch

from smolrun.data.base import Batch, FeatureSplit
from smolrun.data.order import SampleOrder
from smolrun.parts.placement import plan_batches
from smolrun.training.feed import Feed, every_sample

SIZE = 24
SPLIT = FeatureSplit(torch.arange(SIZE).float()[:, None], torch.arange(SIZE))


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_batch_says_where_in_the_run_its_samples_are(world_size: int) -> None:
    plans = [plan_batches(8, [1.0] * world_size, rank, 2) for rank in range(world_size)]
    feeds = [Feed(SPLIT, SampleOrder(SIZE, seed=5), plan) for plan in plans]
    assert [b.position for feed in feeds for b in feed.step(3)] == [24, 26, 28, 30]
    evaluated = [turn for plan in plans for turn in list(every_sample(SPLIT, plan, 2))[1]]
    assert [batch.position for batch in evaluated] == [8, 10, 12, 14]


def ids(batches: list[Batch]) -> list[int]:
    return [int(target) for batch in batches for target in batch.targets]


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_world_sizes_see_the_same_samples_in_the_same_order(world_size: int) -> None:
    plans = [plan_batches(8, [1.0] * world_size, rank, 3) for rank in range(world_size)]
    feeds = [Feed(SPLIT, SampleOrder(SIZE, seed=5), plan) for plan in plans]
    seen = [sample for step in range(6) for feed in feeds for sample in ids(feed.step(step))]
    assert seen == SampleOrder(SIZE, seed=5).indices(0, 48)
    assert sorted(seen[:24]) == sorted(seen[24:]) == list(range(SIZE)), (
        "each epoch has every sample once"
    )
    assert seen[:24] != seen[24:], "and epochs are shuffled differently"


@pytest.mark.parametrize("batch_size", [5, 8, 24, 100])
@pytest.mark.parametrize("world_size", [1, 3])
def test_evaluation_sees_every_sample_once_and_ranks_take_equal_turns(
    world_size: int, batch_size: int
) -> None:
    plans = [plan_batches(batch_size, [1.0] * world_size, rank) for rank in range(world_size)]
    rounds = [[ids(batches) for batches in every_sample(SPLIT, plan, None)] for plan in plans]
    assert sorted(sample for rank in rounds for turn in rank for sample in turn) == list(
        range(SIZE)
    )
    assert len({len(rank) for rank in rounds}) == 1


def test_evaluation_can_be_cut_short() -> None:
    assert sum(len(ids(b)) for b in every_sample(SPLIT, plan_batches(5, [1.0], 0), 2)) == 10
