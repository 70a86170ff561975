"""A synchronous parameter server: workers push gradients to rank 0, which alone has the optimizer,
and pull the new weights.

    worker 1   forward backward [push]         [pull] forward ...
    worker 2   forward backward [push]         [pull] forward ...
    server     (forward backward)  add, step, tell

A bucket leaves for the server as gradient, as soon as backward has filled it, and comes back into
the same memory as weights: every message answers the one before it, so neither side needs other
room. With staleness K a worker waits at step t for the answer to its push of step t-K. The server
adds up in rank order, itself first, so all runs of one seed are equal.

With `straggler_s` the server goes on that long after the first gradient of a step: a gradient that
comes later is dropped, and its worker goes on from the newest weights at the server's next step,
together with all others. (Weights at once, in the middle of a step, would make it late for ever.)

Source: Li et al., "Scaling Distributed Machine Learning with the Parameter Server", 2014.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from smolrun.algorithms import saved
from smolrun.algorithms.base import Algorithm, Context, EvalSums, InFlight
from smolrun.algorithms.classicdp import ClassicDP
from smolrun.algorithms.contract import FACTS
from smolrun.checkpoints.piece import Piece
from smolrun.checkpoints.reader import Checkpoint
from smolrun.data.base import Batch
from smolrun.mesh.mesh import Work
from smolrun.parts.buckets import Bucket
from smolrun.parts.polyak import PolyakAverage
from smolrun.parts.seats import SERVER, Seat, Seats, pull, push

_VERDICT = 4  # step, norm of the gradient, loss scale and its age: before the facts of all ranks
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
    if context.mesh.rank != SERVER:
        return SyncPSWorker(context, server_trains, straggler_s, bucket_mb, pull)
    return SyncPSServer(context, server_trains, straggler_s, bucket_mb, pull, polyak)


class SyncPS(ClassicDP):
    """What server and workers have in common."""

    def __init__(
        self,
        context: Context,
        server_trains: bool,
        straggler_s: float,
        bucket_mb: float,
        pull: str,
    ) -> None:
        super().__init__(context, bucket_mb=bucket_mb)
        self.mesh = context.mesh
        self._server_trains = server_trains
        self._straggler_s = straggler_s
        self._pulls_average = pull == "average"
        self.is_lockstep = not straggler_s

    def batch_weights(self, speeds: Sequence[float | str]) -> Sequence[float | str]:
        """By speed; nothing for a server that does not train."""
        return speeds if self._server_trains else [0.0, *speeds[1:]]

    def trained(self) -> list[nn.Parameter]:
        """What gradients are pushed for and weights pulled of, in the model's order."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def slot(self, step: int) -> int:
        """Which memory a step uses."""
        return step % self.buckets.slots


class SyncPSWorker(SyncPS):
    """Pushes its gradients and pulls weights; has no optimizer."""

    evaluates = False

    def place(self, model: nn.Module) -> None:
        """A replica that is never stepped here."""
        super().place(model)
        del self.optimizer
        self.saves = self.is_lockstep  # no tensors; only its random numbers
        self._replies: dict[int, Tensor] = {}

    def send(self, bucket: Bucket, slot: int) -> Work:
        """Starts to push a full bucket."""
        return push(self.mesh, self.steps_begun, 1 + bucket.index, bucket.to_host(slot))

    def synchronize(self, facts: dict[str, float]) -> InFlight:
        """The buckets are on their way already; the facts follow them, and room for the answer."""
        facts["is_finite"] = float(self._is_finite)
        step, row = self.steps_begun, _row(facts)
        works = [*self._works, push(self.mesh, step, 0, row)]
        return InFlight(step, row, works + self._expect(step))

    def _expect(self, step: int) -> list[Work]:
        """The answer comes into the buckets of the push."""
        numbers = torch.empty(_VERDICT + self.collectives.size * len(FACTS), dtype=torch.float64)
        self._replies[step] = numbers
        return pull(
            self.mesh, step, [numbers, *(b.host[self.slot(step)] for b in self.buckets.buckets)]
        )

    def arrive(self, flight: InFlight) -> None:
        """The verdict of the server; who was late goes on at the server's step."""
        super().arrive(flight)
        verdict, facts = self._replies.pop(flight.step).tensor_split([_VERDICT])
        step, self._norm, scale, good_steps = verdict.tolist()
        flight.facts = facts.view(-1, len(FACTS))
        self.steps_begun += int(step) - flight.step
        flight.step = int(step)
        self.loss_scale.value, self.loss_scale.good_steps = scale, int(good_steps)

    @torch.no_grad()
    def update(self, flight: InFlight, weight: float, learning_rate: float) -> float | None:
        """Loads what was pulled."""
        pulled = self.buckets.travelled(self.slot(flight.step))
        for parameter, values in zip(self.trained(), pulled, strict=True):
            parameter.copy_(values)
        return self._norm if math.isfinite(self._norm) else None

    def leave(self) -> None:
        """A run that was stopped has pushes without an answer; the server gives one."""
        for flight in self.in_flight:
            super().arrive(flight)
        super().leave()

    def pieces(self) -> list[Piece]:
        """Nothing: the server has it all."""
        return []

    def checkpoint_bytes(self) -> int:
        """Nothing."""
        return 0

    @torch.no_grad()
    def restore(self, checkpoint: Checkpoint, state: Mapping[str, Any]) -> None:
        """The weights, and whom it had pushed to."""
        average = {k.removeprefix("average/") for k in checkpoint.keys("average/")}
        for name, tensor in saved.model_tensors(self.model):
            kind = "average" if self._pulls_average and name in average else "model"
            saved.read_into(tensor, checkpoint, f"{kind}/{name}")
        saved.refuse_unknown(self, checkpoint)
        saved.restore_numbers(self, checkpoint, state)
        for flight in saved.restore_flights(self, checkpoint, state):
            flight.works = self._expect(flight.step)


class SyncPSServer(SyncPS):
    """Holds the optimizer and, if asked for, an average of the weights."""

    evaluates_alone = True
    average: PolyakAverage | None = None

    def __init__(self, *args: Any) -> None:
        *common, self._decay = args
        super().__init__(*common)
        self._nothing = Work("own gradient", self.mesh)
        self._nothing.finish()

    def place(self, model: nn.Module) -> None:
        """The model, the optimizer, and a seat for every worker."""
        super().place(model)
        self.average = PolyakAverage(self.trained(), self._decay) if self._decay else None
        self.seats = Seats(self.mesh, self.buckets, len(FACTS))
        self._unsummed: dict[int, list[Seat]] = {}
        self._reply = torch.zeros(_VERDICT + self.collectives.size * len(FACTS)).double()

    # -- a step ----

    def forward_backward(self, micro_batches: Sequence[Batch]) -> dict[str, float]:
        """As always, while the pushes of the others come in."""
        for seat in self.seats.all:
            if self.is_lockstep or not seat.expected:
                self.seats.expect(seat, self.steps_begun)
        with self._average_in_use(self._pulls_average):
            return super().forward_backward(micro_batches)

    def send(self, bucket: Bucket, slot: int) -> Work:
        """The server's own gradient is there already."""
        bucket.to_host(slot)
        return self._nothing

    def synchronize(self, facts: dict[str, float]) -> InFlight:
        """Nothing to start; the others are on their way here."""
        facts["is_finite"] = float(self._is_finite)
        table = torch.zeros((self.collectives.size, len(FACTS)), dtype=torch.float64)
        table[:, _IS_FINITE] = 1  # also of those that are late
        table[SERVER] = _row(facts)
        return InFlight(self.steps_begun, table, [])

    def arrive(self, flight: InFlight) -> None:
        """Who works on this step is here, or late; late ones of earlier steps may be here too."""
        if not self.is_lockstep:
            self._wait_for_most(flight)
        for seat in self.seats.all:
            for step, coming in list(seat.expected.items()):
                is_out = seat.rank in flight.late if step == flight.step else not coming.is_done
                if step > flight.step or is_out:
                    continue
                self.wait(coming)
                del seat.expected[step]
                seat.unanswered.append(step)
                row = seat.numbers[self.slot(step)]
                if step == flight.step:
                    flight.facts[seat.rank] = row
                    self._unsummed.setdefault(step, []).append(seat)
                else:  # its gradient was dropped, its wish to stop counts
                    flight.facts[seat.rank, _WANTS_STOP] = row[_WANTS_STOP]

    def _wait_for_most(self, flight: InFlight) -> None:
        started = time.perf_counter()
        since = started if self._server_trains else None
        for seat in self.seats.wait_for_most(flight.step, self._straggler_s, since=since):
            seat.dropped += 1
            flight.late[seat.rank] = seat.dropped
        self._wait_s += time.perf_counter() - started

    def load_gradients(self, flight: InFlight) -> list[Tensor]:
        """The sum, own gradient first, then by rank."""
        self._add_up(flight)
        return super().load_gradients(flight)

    def gradients_in_flight(self, flight: InFlight) -> list[Tensor]:
        """As classicdp, once added up."""
        self._add_up(flight)
        return super().gradients_in_flight(flight)

    def _add_up(self, flight: InFlight) -> None:
        slot = self.slot(flight.step)
        for seat in self._unsummed.pop(flight.step, []):
            for bucket, pushed in zip(self.buckets.buckets, seat.flat[slot], strict=True):
                bucket.host[slot].add_(pushed)

    @torch.no_grad()
    def update(self, flight: InFlight, weight: float, learning_rate: float) -> float | None:
        """As always; then everybody who waits gets the verdict and the weights."""
        norm = super().update(flight, weight, learning_rate)
        if self.average is not None and norm is not None:
            self.average.update()
        scale = self.loss_scale
        verdict = [flight.step, math.nan if norm is None else norm, scale.value, scale.good_steps]
        self._reply = torch.cat(
            [torch.tensor(verdict, dtype=torch.float64), flight.facts.flatten()]
        )
        self._send_weights(flight.step)
        return norm

    def _send_weights(self, until: int) -> None:
        """Newest weights to all whose push of a step up to `until` is here."""
        newest = self.average.values if self.average and self._pulls_average else self.trained()
        for seat in self.seats.all:
            for step in [step for step in seat.unanswered if step <= until]:
                self.seats.answer(seat, step, self._reply, newest)

    @torch.no_grad()
    def leave(self) -> None:
        """Whoever still waits for an answer gets one."""
        for seat in self.seats.all:
            for step, coming in seat.expected.items():
                self.wait(coming)
                seat.unanswered.append(step)
            seat.expected.clear()
        self._send_weights(self.steps_begun)
        super().leave()

    # -- what it shows and saves ----

    def _average_in_use(self, is_wanted: bool) -> AbstractContextManager[None]:
        return self.average.in_use() if self.average and is_wanted else nullcontext()

    def eval_step(self, micro_batches: Sequence[Batch]) -> EvalSums:
        """Of the average, if there is one."""
        with self._average_in_use(True):
            return super().eval_step(micro_batches)

    def logits(self, tokens: Tensor) -> Tensor:
        """Of the average, if there is one."""
        with self._average_in_use(True):
            return super().logits(tokens)

    def replica_tensors(self) -> list[Tensor]:
        """What the workers pull."""
        with self._average_in_use(self._pulls_average):
            return [*(p.data for p in self.model.parameters()), *self.model.buffers()]

    def pieces(self) -> list[Piece]:
        """Everything, and the average."""
        for flight in self.in_flight:
            self.arrive(flight)
        return saved.dealt(saved.tensors(self) | dict(self._averages()), 1, 0)

    def _averages(self) -> Iterable[tuple[str, Tensor]]:
        names = [name for name, p in self.model.named_parameters() if p.requires_grad]
        values = self.average.values if self.average else []
        return ((f"average/{name}", value) for name, value in zip(names, values, strict=False))

    def checkpoint_bytes(self) -> int:
        """With the average."""
        return super().checkpoint_bytes() + sum(tensor.nbytes for _, tensor in self._averages())

    @torch.no_grad()
    def restore(self, checkpoint: Checkpoint, state: Mapping[str, Any]) -> None:
        """Also the average, or a new one; and whoever has pushed waits for an answer."""
        super().restore(checkpoint, state)
        if self.average is not None:
            self.average.restart()
        for key, tensor in self._averages():
            if key in checkpoint.manifest.tensors:
                saved.read_into(tensor, checkpoint, key)
        for seat in self.seats.all:
            seat.unanswered = [flight.step for flight in self.in_flight]


def _row(facts: Mapping[str, float]) -> Tensor:
    return torch.tensor([facts[name] for name in FACTS], dtype=torch.float64)
