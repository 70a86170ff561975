"""Loads the micro-batches of one rank, of a file or of a stream.

The step and the plan of shares determine the samples; all ranks together load the same ones for any
world size. Knows nothing of how the rows of a stream reach this process: that is a `RowClient`.

Shape suffixes: B batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy
import torch

from smolrun.algorithms.contract import BatchPart
from smolrun.data.order import SampleOrder
from smolrun.data.splits import Batch, Split
from smolrun.errors import DataError
from smolrun.parts.placement import BatchPlan, BatchPlans

PlanSource = BatchPlan | BatchPlans  # the latter where shares change during a run


class BatchLoader:
    """This rank's micro-batches of every global batch, in the run's shuffled order."""

    def __init__(self, split: Split, order: SampleOrder, plan: PlanSource) -> None:
        self._split = split
        self._order = order
        self._plan = plan

    def load(self, step: int, part: BatchPart | None = None) -> list[Batch]:
        """The micro-batches of one step, of this rank's share or of `part`; some may be empty."""
        plan = self._plan.at(step)
        plan = plan if part is None else plan.part(part.index, part.count)
        return [
            self._split.batch(self._order.indices(positions.start, positions.stop), positions.start)
            for positions in plan.positions(step)
        ]


def sequential_batches(split: Split, plan: BatchPlan, limit: int | None) -> Iterator[list[Batch]]:
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


class RowClient(Protocol):
    """Ranges of the stream's rows, taken in the order of the requests."""

    def request(self, first: int, stop: int, next_first: int | None) -> None:
        """Requests rows first .. stop - 1; the next request begins at next_first (None: never)."""

    def take(self, first: int, stop: int, timeout_s: float) -> bytes:
        """The rows of the oldest request not taken yet; DataError if they do not come in time."""


def prefetched_steps(prefetch_steps: int) -> int:
    """How many steps beyond the next one keep their plan: their rows have been requested, with the
    first row of the step after them."""
    return prefetch_steps + 1


@dataclass(kw_only=True)
class StreamLoader:
    """This rank's micro-batches of every global batch up to step `steps`: sample i is row i of the
    stream. Rows are requested `prefetch_steps` steps ahead of the step that needs them."""

    rows: RowClient
    plan: PlanSource
    sequence_length: int
    steps: int
    prefetch_steps: int
    timeout_s: float
    _next_step: int | None = None
    _next_request: int = 0

    def load(self, step: int, part: BatchPart | None = None) -> list[Batch]:
        """The micro-batches of one step, some perhaps empty; blocks until they are there.

        The first step may be any, the others follow in order. DataError when the rows do not come
        in time, ValueError for a `part`: whose it will be is not known when rows are requested.
        """
        if part is not None:
            raise ValueError("a stream has no parts")
        if self._next_step is None:
            self._next_request = step
        elif step != self._next_step:
            raise ValueError(f"step {step} of a stream, where step {self._next_step} comes next")
        self._next_step = step + 1
        self._request_ahead(step + 1 + self.prefetch_steps)
        wanted = self._range(step)
        rows = self.rows.take(wanted.start, wanted.stop, self.timeout_s)
        batch = token_batch(rows, self.sequence_length)
        positions = self.plan.at(step).positions(step)
        sizes = [len(samples) for samples in positions]
        parts = zip(batch.inputs.split(sizes), batch.targets.split(sizes), positions, strict=True)
        return [Batch(inputs, targets, samples.start) for inputs, targets, samples in parts]

    def _request_ahead(self, stop_step: int) -> None:
        while self._next_request < min(stop_step, self.steps):
            wanted = self._range(self._next_request)
            self._next_request += 1
            is_last = self._next_request == self.steps
            next_first = None if is_last else self._range(self._next_request).start
            self.rows.request(wanted.start, wanted.stop, next_first)

    def _range(self, step: int) -> range:
        """This rank's rows of a step: its micro-batches lie side by side."""
        positions = self.plan.at(step).positions(step)
        return range(positions[0].start, positions[-1].stop)


def token_batch(rows: bytes, sequence_length: int) -> Batch:
    """Rows of T + 1 little-endian int32, one after the other, as inputs and targets [B, T]."""
    width = sequence_length + 1
    if len(rows) % (4 * width):
        raise DataError(f"{len(rows)} bytes of the stream are no rows of {width} tokens")
    window = numpy.frombuffer(rows, "<i4").reshape(-1, width).astype(numpy.int64)
    window_BT = torch.from_numpy(window)
    return Batch(window_BT[:, :-1].contiguous(), window_BT[:, 1:].contiguous())
