"""What server and workers of edp have in common, and a worker.

    ticket ][ newest weights ][ forward, backward ][ push, in the background ] ticket ][ ...

A worker knows nothing of other workers and has no optimizer. The algorithm as a whole: edp.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from smolrun.algorithms.base import Algorithm, Context, PendingUpdate
from smolrun.algorithms.contract import BatchAssignment, BatchPart, StepResult
from smolrun.checkpoints.reader import Checkpoint
from smolrun.collectives.api import new_group
from smolrun.data.base import Batch
from smolrun.events import Event
from smolrun.parts.courier import Courier, Ticket
from smolrun.parts.flat_model import FlatModel
from smolrun.parts.patience import Patience
from smolrun.parts.push_pull import Facts, Sums, Why

SERVER = 0


class EDP(Algorithm):
    """What server and workers have in common: backward writes into flat gradients."""

    is_lockstep = False

    def __init__(self, context: Context) -> None:
        # Tickets keep the bound; no gradient is kept back here.
        super().__init__(replace(context, staleness=0))
        self.collectives = new_group(context.mesh, [context.mesh.rank])
        self._samples = 0  # that this rank has computed since it last told

    def place(self, model: torch.nn.Module) -> None:
        """A replica."""
        super().place(model)
        self.flat_model = FlatModel(model.parameters())
        self.gradients = self.flat_model.zeros()
        self.flat_model.bind(self.gradients)

    def gradient(self, ticket: int, version: int, micro_batches: Sequence[Batch]) -> Facts:
        """Computes the sum of the gradients of a ticket's samples."""
        for flat in self.gradients:
            flat.zero_()
        with self.clock.compute():
            facts = self.watched_forward_backward(micro_batches)
        if self.loss_scale.value != 1.0:
            for flat in self.gradients:
                flat.div_(self.loss_scale.value)
        samples = sum(len(batch.inputs) for batch in micro_batches)
        self._samples += samples
        return Facts(
            ticket, version, facts["loss_sum"], facts["weight"], samples, float(self.wants_stop)
        )

    def result(self, step: int, sums: Sums, events: Sequence[Event] = ()) -> StepResult:
        """What a trainer wants to know."""
        compute_s, wait_s = self.clock.take()
        samples, self._samples = self._samples, 0
        return StepResult(
            step=step,
            loss=sums.loss / sums.weight if sums.weight else math.nan,
            weight=int(sums.weight),
            grad_norm=sums.grad_norm,
            learning_rate=self.context.learning_rate(step),
            compute_s=compute_s,
            wait_s=wait_s,
            waited_for=None,
            culprits=tuple(sorted(sums.culprits)),
            wants_stop=sums.wants_stop,
            norms=self._norms,
            facts={"samples": [samples]},
            events=tuple(events),
        )

    def bind_gradients(self, pending: PendingUpdate) -> list[torch.Tensor]:
        """They are in `parameter.grad` all the time."""
        return self.gradients

    def synchronize(self, facts: dict[str, float]) -> PendingUpdate:
        """There is no moment at which all gradients come together."""
        raise NotImplementedError("a push is applied when it comes")


class EDPWorker(EDP):
    """Computes gradients; it has no optimizer, and neither evaluates nor saves."""

    can_evaluate = has_checkpoint_state = False

    def __init__(self, context: Context, patience: Patience) -> None:
        super().__init__(context)
        self._patience = patience

    def place(self, model: torch.nn.Module) -> None:
        """The weights will come from the server."""
        super().place(model)
        del self.optimizer
        context = self.context
        self.courier = Courier(
            context.mesh, SERVER, self.flat_model, context.quantization, self._patience
        )
        self._ticket: Ticket | None = None

    def checkpoint_bytes(self) -> int:
        """Nothing: the server has it all."""
        return 0

    def restore(self, checkpoint: Checkpoint, state: Mapping[str, Any]) -> None:
        """Nothing, likewise."""

    def next_assignment(self, steps: int) -> BatchAssignment | None:
        """The next ticket; waits where the server has none to give, or weights are too old."""
        with self.clock.waiting():
            self._ticket = ticket = self.courier.next_ticket()
        if ticket is None:
            self.steps_begun = 0 if self.courier.was_stopped else steps
            return None
        step, index = divmod(ticket.number, ticket.per_step)
        return BatchAssignment(step, BatchPart(index, ticket.per_step))

    def train_step(self, micro_batches: Sequence[Batch]) -> StepResult:
        """One ticket; its push goes on when this has returned."""
        assert self._ticket is not None, "there is no share without a ticket"
        step = self._ticket.number // self._ticket.per_step
        self.context.mesh.progress = step
        version = self.courier.load_newest()
        facts = self.gradient(self._ticket.number, version, micro_batches)
        norm = math.sqrt(self.norm_squared(self.gradients)) / max(facts.weight, 1.0)
        is_finite = math.isfinite(norm)
        self.loss_scale.update(was_finite=is_finite)
        if is_finite:
            self.courier.push(facts, self.gradients)
        else:  # somebody tries again with newer weights, and in fp16 another loss scale
            self.courier.give_back(self._ticket.number, Why.NOT_FINITE)
        sums = Sums()
        sums.add(self.context.mesh.rank, facts, norm if is_finite else None)
        sums.wants_stop = False  # that is for the server to decide
        return self.result(step, sums)
