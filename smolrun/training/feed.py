"""The samples of one rank, step after step: which they are follows from the step alone, never from
the world size."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from smolrun.algorithms.contract import BatchPart
from smolrun.data.base import Batch, Split
from smolrun.data.order import SampleOrder
from smolrun.parts.placement import BatchPlan


class Planned(Protocol):
    """A BatchPlan, or Plans where shares may change."""

    def at(self, step: int) -> BatchPlan:
        """The plan that holds in a step."""
        ...


class Feed:
    """This rank's micro-batches of every global batch, in the run's shuffled order."""

    def __init__(self, split: Split, order: SampleOrder, plan: Planned) -> None:
        self._split = split
        self._order = order
        self._plan = plan

    def step(self, step: int, part: BatchPart | None = None) -> list[Batch]:
        """The micro-batches of one step, of this rank's share or of that part; some may be
        empty."""
        plan = self._plan.at(step)
        plan = plan if part is None else plan.part(part.index, part.count)
        return [
            self._split.batch(self._order.indices(positions.start, positions.stop), positions.start)
            for positions in plan.positions(step)
        ]


def every_sample(split: Split, plan: BatchPlan, limit: int | None) -> Iterator[list[Batch]]:
    """This rank's micro-batches of each global batch of a split, in file order, `limit` global
    batches at most.

    The last batch may be short; every rank gets the same number of batches.
    """
    num_batches = -(-len(split) // plan.global_batch_size)
    for step in range(num_batches if limit is None else min(limit, num_batches)):
        yield [
            split.batch(
                range(min(positions.start, len(split)), min(positions.stop, len(split))),
                positions.start,
            )
            for positions in plan.positions(step)
        ]
