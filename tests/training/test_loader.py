"""Every sample once per epoch over all ranks together, and every row of a stream once, in an order
that depends on neither the world size nor the prefetch."""

from __future__ import annotations

import numpy
import pytest
import torch

from smolrun.data.order import SampleOrder
from smolrun.data.splits import Batch, FeatureSplit, TokenSplit
from smolrun.errors import DataError
from smolrun.parts.placement import BatchPlan, BatchPlans, plan_batches
from smolrun.training.loader import (
    BatchLoader,
    StreamLoader,
    prefetched_steps,
    sequential_batches,
    token_batch,
)

SIZE = 24
SPLIT = FeatureSplit(torch.arange(SIZE).float()[:, None], torch.arange(SIZE))


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_batch_has_the_position_of_its_first_sample(world_size: int) -> None:
    plans = [plan_batches(8, [1.0] * world_size, rank, 2) for rank in range(world_size)]
    feeds = [BatchLoader(SPLIT, SampleOrder(SIZE, seed=5), plan) for plan in plans]
    assert [b.position for feed in feeds for b in feed.load(3)] == [24, 26, 28, 30]
    evaluated = [turn for plan in plans for turn in list(sequential_batches(SPLIT, plan, 2))[1]]
    assert [batch.position for batch in evaluated] == [8, 10, 12, 14]


def ids(batches: list[Batch]) -> list[int]:
    return [int(target) for batch in batches for target in batch.targets]


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_world_sizes_see_the_same_samples_in_the_same_order(world_size: int) -> None:
    plans = [plan_batches(8, [1.0] * world_size, rank, 3) for rank in range(world_size)]
    feeds = [BatchLoader(SPLIT, SampleOrder(SIZE, seed=5), plan) for plan in plans]
    seen = [sample for step in range(6) for feed in feeds for sample in ids(feed.load(step))]
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
    rounds = [[ids(batches) for batches in sequential_batches(SPLIT, plan, None)] for plan in plans]
    assert sorted(sample for rank in rounds for turn in rank for sample in turn) == list(
        range(SIZE)
    )
    assert len({len(rank) for rank in rounds}) == 1


def test_evaluation_can_be_cut_short() -> None:
    assert sum(len(ids(b)) for b in sequential_batches(SPLIT, plan_batches(5, [1.0], 0), 2)) == 10


# -- streams ----

LENGTH = 3
BATCH = 8
TOKENS = torch.arange(4000, dtype=torch.int32)


def row(number: int) -> bytes:
    """Row i of a stream whose tokens are 0, 1, 2, ..."""
    return TOKENS[number * LENGTH : (number + 1) * LENGTH + 1].numpy().astype("<i4").tobytes()


class Rows:
    """Has every row at once, and records the requests."""

    def __init__(self) -> None:
        self.requested: list[tuple[int, int, int | None]] = []
        self.waits: list[float] = []
        self.taken = 0

    def request(self, first: int, stop: int, next_first: int | None) -> None:
        self.requested.append((first, stop, next_first))

    def take(self, first: int, stop: int, timeout_s: float) -> bytes:
        assert self.requested[self.taken][:2] == (first, stop), "taken in the order of the requests"
        self.taken += 1
        self.waits.append(timeout_s)
        return b"".join(row(number) for number in range(first, stop))


def stream(
    rows: Rows, plan: BatchPlan | BatchPlans, *, steps: int = 6, prefetch_steps: int = 2
) -> StreamLoader:
    return StreamLoader(
        rows=rows,
        plan=plan,
        sequence_length=LENGTH,
        steps=steps,
        prefetch_steps=prefetch_steps,
        timeout_s=7.0,
    )


def first_tokens(batches: list[Batch]) -> list[int]:
    return [int(sample[0]) for batch in batches for sample in batch.inputs]


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("prefetch_steps", [0, 1, 4, 50])
def test_a_streams_order_depends_on_neither_world_size_nor_prefetch(
    world_size: int, prefetch_steps: int
) -> None:
    plans = [plan_batches(BATCH, [1.0] * world_size, rank, 2) for rank in range(world_size)]
    feeds = [stream(Rows(), plan, prefetch_steps=prefetch_steps) for plan in plans]
    batches = [batch for step in range(6) for one in feeds for batch in one.load(step)]
    assert first_tokens(batches) == [LENGTH * number for number in range(6 * BATCH)]
    assert all(int(batch.inputs[0, 0]) == LENGTH * batch.position for batch in batches)


def test_micro_batches_of_a_stream_are_those_of_a_token_file() -> None:
    """So a stream trains as the same tokens in a file would."""
    plan = plan_batches(BATCH, [1.0, 1.0], 1, 3)
    split = TokenSplit(TOKENS, LENGTH)
    one = stream(Rows(), plan)
    for step in range(4):
        expected = [split.batch(list(positions)) for positions in plan.positions(step)]
        for batch, wanted in zip(one.load(step), expected, strict=True):
            assert batch.inputs.dtype == batch.targets.dtype == torch.int64
            assert torch.equal(batch.inputs, wanted.inputs)
            assert torch.equal(batch.targets, wanted.targets)


def test_a_stream_requests_ahead_never_beyond_the_end_and_names_the_next_row() -> None:
    rows = Rows()
    one = stream(rows, plan_batches(BATCH, [1.0, 1.0], 1), steps=5, prefetch_steps=2)
    assert rows.requested == []
    one.load(2)  # as in a resumed run
    assert rows.requested == [(20, 24, 28), (28, 32, 36), (36, 40, None)]
    one.load(3)
    one.load(4)
    assert len(rows.requested) == 3
    assert rows.waits == [7.0] * 3


def test_a_rank_without_a_share_requests_nothing_and_loads_empty_batches() -> None:
    rows = Rows()
    plan = plan_batches(3, [1.0, 0.0], 1, 2)
    (first, second) = stream(rows, plan, steps=2).load(0)
    assert first.inputs.shape == second.targets.shape == (0, LENGTH)
    assert rows.requested == [(3, 3, 6), (6, 6, None)]


def test_a_stream_cannot_repeat_a_step() -> None:
    one = stream(Rows(), plan_batches(BATCH, [1.0], 0))
    one.load(1)
    with pytest.raises(ValueError, match="step 1 of a stream, where step 2 comes next"):
        one.load(1)


def test_incomplete_rows_are_refused() -> None:
    with pytest.raises(DataError, match="15 bytes of the stream are no rows of 4 tokens"):
        token_batch(bytes(15), LENGTH)
    assert token_batch(row(2), LENGTH).targets.tolist() == [[7, 8, 9]]
    assert numpy.frombuffer(row(2), "<i4").tolist() == [6, 7, 8, 9]


@pytest.mark.parametrize("prefetch_steps", [0, 2, 5])
def test_changing_shares_keep_every_requested_row(prefetch_steps: int) -> None:
    """All ranks go from equal shares to others and back, as early as their requests allow."""
    changes = {3: [7.0, 0.0, 1.0], 9: [1.0, 6.0, 1.0]}
    steps, got = 20, [[] for _ in range(20)]
    for rank in range(3):
        plans = BatchPlans(lambda weights, rank=rank: plan_batches(BATCH, weights, rank), [1.0] * 3)
        rows = Rows()
        one = stream(rows, plans, steps=steps, prefetch_steps=prefetch_steps)
        for step in range(steps):
            got[step] += first_tokens(one.load(step))
            if weights := changes.get(step):
                plans.change(step + 1, step + 1 + prefetched_steps(prefetch_steps), weights)
        next_row = 0
        for first, stop, next_first in rows.requested:
            assert next_row <= first <= stop <= (next_first or stop)
            next_row = next_first or stop
        assert len({stop - first for first, stop, _ in rows.requested}) > 1, "shares did change"
    for step, tokens in enumerate(got):
        begin = step * BATCH
        assert tokens == [number * LENGTH for number in range(begin, begin + BATCH)]
