"""A synchronous parameter server: workers push gradients to rank 0, which alone has the optimizer,
and pull the new weights.

    worker 1   forward backward [push]         [pull] forward ...
    worker 2   forward backward [push]         [pull] forward ...
    server     (forward backward)  add, step, tell

A bucket leaves for the server as gradient as soon as backward has filled it, and comes back into
the same memory as weights. With staleness K a worker waits at step t for the answer to its push of
step t-K. The server adds up in rank order, itself first.

With `straggler_s` the server goes on that long after the first gradient of a step. One that comes
later is dropped, and its worker goes on with the newest weights at the server's next step, together
with all others. (With weights in the middle of a step it would be late for ever.)

Source: Li et al., "Scaling Distributed Machine Learning with the Parameter Server", 2014.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from smolrun.algorithms import saved, saved_residuals
from smolrun.algorithms.base import Algorithm, Context, EvalSums, PendingUpdate
from smolrun.algorithms.contract import FACTS
from smolrun.algorithms.syncps_worker import SyncPS, SyncPSWorker, numbers_of, row_of
from smolrun.checkpoints.reader import Checkpoint
from smolrun.checkpoints.tensor_slice import TensorSlice
from smolrun.data.base import Batch
from smolrun.mesh.mesh import Work
from smolrun.parts.buckets import Bucket
from smolrun.parts.polyak import PolyakAverage
from smolrun.parts.seats import SERVER, Seat, Seats

_IS_FINITE, _WANTS_STOP = FACTS.index("is_finite"), FACTS.index("wants_stop")


def syncps(
    context: Context,
    *,
    server_trains: bool,
    straggler_s: float,
    polyak: float,
    pull: str,
    bucket_mb: float,
) -> Algorithm:
    """The server on rank 0, a worker on every other."""
    common: dict[str, Any] = {
        "server_trains": server_trains,
        "straggler_s": straggler_s,
        "pulls_average": pull == "average",
        "bucket_mb": bucket_mb,
    }
    if context.mesh.rank == SERVER:
        return SyncPSServer(context, polyak=polyak, **common)
    return SyncPSWorker(context, **common)


class SyncPSServer(SyncPS):
    """Has the optimizer, and an average of the weights where one is wanted."""

    evaluates_locally = True

    def __init__(self, context: Context, *, polyak: float, **common: Any) -> None:
        super().__init__(context, **common)
        self._decay = polyak
        self._unsummed: dict[int, list[Seat]] = {}  # step -> whose gradient is here
        self._numbers = numbers_of(self.collectives.size)  # of the last answer
        self._nothing = Work("own gradient", self.mesh)
        self._nothing.finish()

    def place(self, model: nn.Module) -> None:
        """The model, the optimizer, and a seat for every worker."""
        super().place(model)
        self.average = PolyakAverage(self.trained(), self._decay)
        self.seats = Seats(self.mesh, self.buckets, len(FACTS), self.context.quantization)

    # -- a step ----

    def forward_backward(self, micro_batches: Sequence[Batch]) -> dict[str, float]:
        """As always, while the pushes of the others come in."""
        for seat in self.seats.all:
            if self.is_lockstep or not seat.expected:
                self.seats.expect(seat, self.steps_begun)
        with self.average.in_use(self._pulls_average):
            return super().forward_backward(micro_batches)

    def send(self, bucket: Bucket, slot: int) -> Work:
        """The server's own gradient is there already, and not rounded; an earlier run on other
        ranks may have left it something to add."""
        own = bucket.to_host(slot)
        if self.sums.has_feedback:
            owed = self.sums.feedback(bucket.index, slot, own.numel(), own.dtype).residual
            own.add_(owed)
            owed.zero_()
        return self._nothing

    def synchronize(self, facts: dict[str, float]) -> PendingUpdate:
        """Nothing to start: the others come by themselves."""
        facts["is_finite"] = float(self._is_finite)
        table = torch.zeros((self.collectives.size, len(FACTS)), dtype=torch.float64)
        table[:, _IS_FINITE] = 1  # also of those that are late
        table[SERVER] = row_of(facts)
        return PendingUpdate(self.steps_begun, table, [])

    def wait_for(self, pending: PendingUpdate) -> None:
        """Whoever works on this step is here, or late; who was late earlier may be here too."""
        if not self.is_lockstep:
            self._wait_for_most(pending)
        for seat in self.seats.all:
            for step, coming in list(seat.expected.items()):
                is_out = seat.rank in pending.late if step == pending.step else not coming.is_done
                if step > pending.step or is_out:
                    continue
                self.clock.wait(seat.came(step))
                row = seat.numbers[self.slot(step)]
                if step == pending.step:
                    pending.facts[seat.rank] = row
                    self._unsummed.setdefault(step, []).append(seat)
                else:  # its gradient was dropped, its wish to stop counts
                    pending.facts[seat.rank, _WANTS_STOP] = row[_WANTS_STOP]

    def _wait_for_most(self, pending: PendingUpdate) -> None:
        since = time.perf_counter() if self._server_trains else None
        with self.clock.waiting():
            late = self.seats.wait_for_most(pending.step, self._straggler_s, since=since)
        for seat in late:
            seat.dropped += 1
            pending.late[seat.rank] = seat.dropped

    def bind_gradients(self, pending: PendingUpdate) -> list[Tensor]:
        """The sum of all that are here."""
        self._add_up(pending)
        return super().bind_gradients(pending)

    def pending_gradients(self, pending: PendingUpdate) -> list[Tensor]:
        """As classicdp, once added up."""
        self._add_up(pending)
        return super().pending_gradients(pending)

    def _add_up(self, pending: PendingUpdate) -> None:
        slot = self.slot(pending.step)
        for seat in self._unsummed.pop(pending.step, []):
            for bucket in self.buckets.buckets:
                self.seats.add(seat, bucket, slot)

    @torch.no_grad()
    def update(self, pending: PendingUpdate, weight: float, learning_rate: float) -> float | None:
        """As always; then everybody who waits gets the verdict and the weights."""
        norm = super().update(pending, weight, learning_rate)
        if norm is not None:
            self.average.update()
        scale = self.loss_scale
        verdict = [pending.step, math.nan if norm is None else norm, scale.value, scale.good_steps]
        self._numbers = numbers_of(self.collectives.size, verdict, pending.facts)
        self._answer_pushes(pending.step)
        return norm

    def _answer_pushes(self, until: int) -> None:
        """To all of a step up to `until` that are here."""
        weights = {**self.trained(), **(self.average.values if self._pulls_average else {})}
        for seat in self.seats.all:
            for step in [step for step in seat.unanswered if step <= until]:
                self.seats.answer(seat, step, self._numbers, list(weights.values()))

    @torch.no_grad()
    def finish(self) -> None:
        """Nobody is left waiting for an answer."""
        for seat in self.seats.all:
            for step in list(seat.expected):
                self.clock.wait(seat.came(step))
        self._answer_pushes(self.steps_begun)
        super().finish()

    # -- what it shows and saves ----

    def eval_step(self, micro_batches: Sequence[Batch]) -> EvalSums:
        """Of the average, if there is one."""
        with self.average.in_use():
            return super().eval_step(micro_batches)

    def logits(self, tokens: Tensor) -> Tensor:
        """Of the average, if there is one."""
        with self.average.in_use():
            return super().logits(tokens)

    def replica_tensors(self) -> dict[str, Tensor]:
        """What the workers have too."""
        weights = super().replica_tensors()
        if not self._pulls_average or not hasattr(self, "average"):
            return weights
        with self.average.in_use():
            return {name: tensor.data for name, tensor in weights.items()}

    def pieces(self) -> list[TensorSlice]:
        """Everything, and the average."""
        for pending in self.pending_updates:
            self.wait_for(pending)
        residuals = saved_residuals.pieces(self) if self.is_lockstep else []
        return saved.dealt(saved.tensors(self) | self._averages(), 1, 0) + residuals

    def _averages(self) -> dict[str, Tensor]:
        return {f"average/{name}": value for name, value in self.average.values.items()}

    def checkpoint_bytes(self) -> int:
        """With the average."""
        return super().checkpoint_bytes() + sum(v.nbytes for v in self._averages().values())

    @torch.no_grad()
    def restore(self, checkpoint: Checkpoint, state: Mapping[str, Any]) -> None:
        """With the average, or a new one; and whoever has pushed waits for an answer."""
        super().restore(checkpoint, state)
        self.average.restart()
        for key, value in self._averages().items():
            if key in checkpoint.manifest.tensors:
                saved.read_into(value, checkpoint, key)
        for seat in self.seats.all:
            seat.unanswered = [pending.step for pending in self.pending_updates]
