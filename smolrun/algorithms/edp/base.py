"""What the server and the workers of edp both are: a replica whose trained parameters and gradients
are a few flat tensors, one per dtype and device.

    model     [ embedding | block 0 | block 1 | head ]
    flat      [ head, block 1, block 0, embedding    ]     in this order on all ranks
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch

from smolrun.algorithms.base import Algorithm, Context, PendingUpdate
from smolrun.algorithms.contract import StepResult, StepStats
from smolrun.algorithms.edp.protocol import BatchTotals, PushHeader
from smolrun.algorithms.edp.work_queue import WorkItem
from smolrun.collectives.api import new_group
from smolrun.data.splits import Batch
from smolrun.events import Event
from smolrun.parts.buckets import pack, views_of

Flats = list[torch.Tensor]


class FlatModel:
    """The trained parameters of a model and their layout in flat tensors."""

    def __init__(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        self._packs = pack(trained, sys.maxsize)
        self.sizes = [sum(p.numel() for p in packed) for packed in self._packs]
        self.dtypes = [packed[0].dtype for packed in self._packs]

    def zeros(self, device: str | None = None) -> Flats:
        """Flat tensors on a device, by default on the parameters' own."""
        return [
            torch.zeros(size, dtype=packed[0].dtype, device=device or packed[0].device)
            for size, packed in zip(self.sizes, self._packs, strict=True)
        ]

    def bind(self, flats: Flats) -> None:
        """Makes every `parameter.grad` a view into `flats`."""
        for parameter, view in self._views(flats):
            parameter.grad = view

    @torch.no_grad()
    def copy_to(self, flats: Flats) -> None:
        """Copies the parameters into `flats`."""
        for parameter, view in self._views(flats):
            view.copy_(parameter)

    @torch.no_grad()
    def load(self, flats: Flats) -> None:
        """Copies `flats` into the parameters."""
        for parameter, view in self._views(flats):
            parameter.copy_(view)

    def _views(self, flats: Flats) -> Iterable[tuple[torch.nn.Parameter, torch.Tensor]]:
        for packed, flat in zip(self._packs, flats, strict=True):
            yield from zip(packed, views_of(flat, packed), strict=True)


class EDP(Algorithm):
    """A replica; backward writes into flat gradients."""

    is_lockstep = False

    def __init__(self, context: Context) -> None:
        # The work queue keeps the bound; no update is delayed here.
        super().__init__(replace(context, staleness=0))
        self.collectives = new_group(context.mesh, [context.mesh.rank])
        self._num_samples = 0  # computed since the last result

    def place(self, model: torch.nn.Module) -> None:
        """Keeps a replica."""
        super().place(model)
        self.flat_model = FlatModel(model.parameters())
        self.gradients = self.flat_model.zeros()
        self.flat_model.bind(self.gradients)

    def compute_gradient(
        self, item: WorkItem, version: int, micro_batches: Sequence[Batch]
    ) -> PushHeader:
        """Leaves the sum of the gradients of an item's samples in `gradients`."""
        for flat in self.gradients:
            flat.zero_()
        with self.clock.compute():
            stats = self.watched_forward_backward(micro_batches)
        if self.loss_scale.value != 1.0:
            for flat in self.gradients:
                flat.div_(self.loss_scale.value)
        num_samples = sum(len(batch.inputs) for batch in micro_batches)
        self._num_samples += num_samples
        return PushHeader(
            item.number,
            version,
            stats["loss_sum"],
            stats["num_targets"],
            num_samples,
            float(self.wants_stop),
        )

    def result(self, step: int, totals: BatchTotals, events: Sequence[Event] = ()) -> StepResult:
        """The result of a global batch, or of one item; resets this rank's times."""
        compute_s, wait_s = self.clock.take()
        num_samples, self._num_samples = self._num_samples, 0
        return StepResult(
            step=step,
            loss=totals.loss_sum / totals.num_targets if totals.num_targets else math.nan,
            num_targets=int(totals.num_targets),
            grad_norm=totals.grad_norm,
            learning_rate=self.context.learning_rate(step),
            compute_s=compute_s,
            wait_s=wait_s,
            waited_for=None,
            nonfinite_ranks=tuple(sorted(totals.nonfinite_ranks)),
            wants_stop=totals.wants_stop,
            norms=self._norms,
            stats=StepStats.of_rank(self.context.mesh.rank, {"samples": num_samples}),
            events=tuple(events),
        )

    def bind_gradients(self, pending: PendingUpdate) -> list[torch.Tensor]:
        """They are always in `parameter.grad`."""
        return self.gradients

    def synchronize(self, stats: dict[str, float]) -> PendingUpdate:
        """NotImplementedError: gradients are never reduced together."""
        raise NotImplementedError("a push is applied when it arrives")
