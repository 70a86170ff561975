"""What server and workers of syncps have in common, and a worker.

    forward, backward ][ push bucket 0 ][ 1 ][ 2 ][ facts ] ... [ verdict ][ pull 0 ][ 1 ][ 2 ]

A worker computes as in classicdp, but its buckets go to the server, and come back as weights. It
knows nothing of other workers, and has no optimizer. The algorithm as a whole: syncps.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from smolrun.algorithms import saved, saved_residuals
from smolrun.algorithms.base import Context, PendingUpdate
from smolrun.algorithms.classicdp import ClassicDP
from smolrun.algorithms.contract import FACTS
from smolrun.checkpoints.reader import Checkpoint
from smolrun.checkpoints.tensor_slice import TensorSlice
from smolrun.mesh.mesh import Work
from smolrun.parts.buckets import Bucket
from smolrun.parts.seats import pull_into, push

_VERDICT = 4  # step, norm of the gradient, loss scale and its age: before the facts of all ranks


class SyncPS(ClassicDP):
    """What server and workers have in common."""

    def __init__(
        self,
        context: Context,
        *,
        server_trains: bool,
        straggler_s: float,
        pulls_average: bool,
        bucket_mb: float,
    ) -> None:
        super().__init__(context, bucket_mb=bucket_mb)
        self.mesh = context.mesh
        self._server_trains = server_trains
        self._straggler_s = straggler_s
        self._pulls_average = pulls_average
        self.is_lockstep = not straggler_s

    def batch_weights(self, speeds: Sequence[float]) -> Sequence[float]:
        """By speed; nothing for a server that does not train."""
        return speeds if self._server_trains else [0.0, *speeds[1:]]

    def trained(self) -> dict[str, nn.Parameter]:
        """What gradients are pushed for and weights pulled of, in the model's order."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}


class SyncPSWorker(SyncPS):
    """Pushes its gradients and pulls weights; has no optimizer."""

    can_evaluate = False

    def place(self, model: nn.Module) -> None:
        """A replica that is never stepped here."""
        super().place(model)
        del self.optimizer
        self.has_checkpoint_state = self.is_lockstep  # what rounding has kept
        self._answers: dict[int, Tensor] = {}  # the numbers that come with the weights

    def send(self, bucket: Bucket, slot: int) -> Work:
        """Starts to push a full bucket."""
        wire = self._encoded(bucket.to_host(slot), bucket.index, slot)
        return push(self.mesh, self.steps_begun, 1 + bucket.index, wire)

    def _encoded(self, flat: Tensor, bucket: int, slot: int) -> Tensor:
        quantization = self.context.quantization
        if quantization.is_none:
            return flat
        if not quantization.error_feedback:
            flat = flat if flat.dtype == torch.float64 else flat.float()
            return quantization.quantizer().encode(flat)
        feedback = self.sums.feedback(bucket, slot, flat.numel(), flat.dtype)
        return feedback.encode(flat, quantization.quantizer())

    def synchronize(self, facts: dict[str, float]) -> PendingUpdate:
        """The buckets are on their way already; the facts follow, and the answer is expected."""
        facts["is_finite"] = float(self._is_finite)
        step, row = self.steps_begun, row_of(facts)
        works = [*self._works, push(self.mesh, step, 0, row)]
        return PendingUpdate(step, row.view(1, -1), works + self._expect(step))

    def _expect(self, step: int) -> list[Work]:
        numbers = numbers_of(self.collectives.size)
        self._answers[step] = numbers
        room = [numbers, *(bucket.host[self.slot(step)] for bucket in self.buckets.buckets)]
        return pull_into(self.mesh, step, room)

    def wait_for(self, pending: PendingUpdate) -> None:
        """The server's verdict, which is on its own step where this gradient was late."""
        super().wait_for(pending)
        verdict, facts = self._answers.pop(pending.step).tensor_split([_VERDICT])
        step, self._norm, scale, good_steps = verdict.tolist()
        self.loss_scale.value, self.loss_scale.good_steps = scale, int(good_steps)
        self._was_late = int(step) != pending.step
        self.steps_begun += int(step) - pending.step
        pending.step, pending.facts = int(step), facts.view(-1, len(FACTS))

    @torch.no_grad()
    def update(self, pending: PendingUpdate, weight: float, learning_rate: float) -> float | None:
        """Takes the weights that were pulled. What rounding took away counts if its push did."""
        is_made = math.isfinite(self._norm)
        self.sums.settle(self.slot(pending.step), is_kept=is_made and not self._was_late)
        pulled = self.buckets.travelled(self.slot(pending.step))
        for parameter, values in zip(self.trained().values(), pulled, strict=True):
            parameter.copy_(values)
        return self._norm if is_made else None

    def finish(self) -> None:
        """A run that was stopped has pushes without an answer; the server gives one."""
        for pending in self.pending_updates:
            super().wait_for(pending)
        super().finish()

    def pieces(self) -> list[TensorSlice]:
        """What rounding has kept from the server, which has all else."""
        return saved_residuals.pieces(self) if self.is_lockstep else []

    def checkpoint_bytes(self) -> int:
        """Of all workers together."""
        return saved_residuals.expected_bytes(self)

    @torch.no_grad()
    def restore(self, checkpoint: Checkpoint, state: Mapping[str, Any]) -> None:
        """The weights as they are pulled; and it has pushed what is in flight."""
        saved.refuse_unknown(self, checkpoint)
        averages = checkpoint.keys("average/") if self._pulls_average else ()
        for name, tensor in saved.model_tensors(self.model):
            key = f"average/{name}" if f"average/{name}" in averages else f"model/{name}"
            saved.read_into(tensor, checkpoint, key)
        saved.restore_numbers(self, checkpoint, state)
        for pending in saved.restore_flights(self, checkpoint, state):
            pending.works = self._expect(pending.step)
        saved_residuals.restore(self, checkpoint)


def row_of(facts: Mapping[str, float]) -> Tensor:
    """What one rank tells."""
    return torch.tensor([facts[name] for name in FACTS], dtype=torch.float64)


def numbers_of(
    size: int, verdict: Sequence[float] = (0,) * _VERDICT, facts: Tensor | None = None
) -> Tensor:
    """What comes with the weights: the verdict, and what all ranks told."""
    facts = torch.zeros((size, len(FACTS))) if facts is None else facts
    return torch.cat([torch.tensor(verdict, dtype=torch.float64), facts.double().flatten()])
