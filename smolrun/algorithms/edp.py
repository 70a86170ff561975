"""Elastic data parallelism: a parameter server, and workers that never wait for each other.

    rank 1, fast     [t0   ][t2   ][t3   ][t5   ][t6   ]     t0, t1, ...: tickets
                           push 0 |  push 2 |  ^ weights
    rank 0, server                [u]      [u]  [u]   [u]     an update per push, as they come
                                                 | push 1
    rank 2, slow     [t1                       ][t4          ]

Rank 0 holds the optimizer. A worker takes a ticket (parts/tickets.py), computes the gradient of
those samples, pushes it in the background (parts/courier.py) and goes on with the next ticket, with
newer weights if some have come; it waits for those with its own push in them only if that is quick
(parts/patience.py). So a gradient is late: its age is the number of updates since the
weights that it was computed with, and the older it is, the smaller is the learning rate
(parts/damping.py). Workers may come, go and come back at any time (parts/reception.py).

Every rank is alone in its group: nothing here is collective.

Source: Dean et al., "Large Scale Distributed Deep Networks", 2012 (Downpour SGD); Ho et al., "More
Effective Distributed ML via a Stale Synchronous Parallel Parameter Server", 2013 (the bound); Zhang
et al., "Staleness-aware Async-SGD for Distributed Deep Learning", 2016 (damping)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from smolrun.algorithms.base import UPDATE, Algorithm, Context, PendingUpdate
from smolrun.algorithms.contract import IDLE, BatchAssignment, BatchPart, EvalSums, StepResult
from smolrun.algorithms.edp_worker import EDP, SERVER, EDPWorker
from smolrun.checkpoints.reader import Checkpoint
from smolrun.data.base import Batch
from smolrun.errors import CheckpointError, WaitTimeout
from smolrun.events import Event, PushApplied
from smolrun.parts.damping import DAMPING
from smolrun.parts.patience import Patience
from smolrun.parts.push_pull import Facts, Sums
from smolrun.parts.reception import Reception
from smolrun.parts.tickets import Tickets


def edp(
    context: Context,
    *,
    server_trains: bool,
    pushes_per_batch: int | str,
    damping: str,
    patience: float,
    min_ranks: int,
) -> Algorithm:
    """This rank's part in it. A rank without others is a server that trains. How many ranks must be
    there at least, `min_ranks`, is for the driver to see to."""
    if context.mesh.rank != SERVER:
        return EDPWorker(context, Patience(patience))
    trains = server_trains or context.mesh.world_size == 1
    auto = context.mesh.world_size - 1 + trains
    per_step = auto if pushes_per_batch == "auto" else int(pushes_per_batch)
    return EDPServer(context, trains, Tickets(per_step, context.staleness_bound), damping)


class EDPServer(EDP):
    """Applies pushes in the order in which they come."""

    evaluates_locally = True

    def __init__(self, context: Context, trains: bool, tickets: Tickets, damping: str) -> None:
        super().__init__(context)
        self.tickets = tickets
        self._trains = trains
        self._damping = DAMPING[damping]
        self._own: int | None = None  # the ticket that the server itself works on
        self._sums = Sums()
        self._events: list[Event] = []

    def place(self, model: torch.nn.Module) -> None:
        """The model, its optimizer, and where workers are received."""
        super().place(model)
        context = self.context
        self.reception = Reception(
            context.mesh, self.flat_model, context.quantization, self.tickets
        )

    def next_assignment(self, steps: int) -> BatchAssignment | None:
        """A ticket of its own, if it trains and there is one; else nothing but to serve."""
        self.reception.open(steps)
        if self.tickets.is_over(steps):
            self.reception.say_over(was_stopped=False)
            return None
        self._own = self.tickets.take(SERVER, steps) if self._trains else None
        if self._own is None:
            return BatchAssignment(self.steps_begun, IDLE)
        step, index = divmod(self._own, self.tickets.per_step)
        return BatchAssignment(step, BatchPart(index, self.tickets.per_step))

    def train_step(self, micro_batches: Sequence[Batch]) -> StepResult | None:
        """Serves until a global batch is applied; who trains too only takes what has come, and
        returns None before that."""
        self.context.mesh.progress = self.steps_begun
        trains, limit_s = self._own is not None, self.context.mesh.timeout_s
        if self._own is not None:
            facts = self.gradient(self._own, self.tickets.num_done, micro_batches)
            self._apply(SERVER, facts)
            self.tickets.finish(SERVER, facts.ticket)
            self.reception.hand_out()
        while self._sums.pushes < self.tickets.per_step:
            with self.clock.waiting():
                pushed = self.reception.next_push(0.0 if trains else limit_s, unless=self._may_help)
            if pushed is None and (trains or self._may_help()):
                return None
            if pushed is None:
                here = len(self.reception.workers)
                raise WaitTimeout(f"no gradient came for {limit_s:g} s; {here} workers are here")
            if pushed.has_gradient:
                pushed.worker.take_gradient(self.gradients)
                self._apply(pushed.worker.rank, pushed.facts)
            else:
                self._told(pushed.worker.rank, pushed.facts, None)
            self.reception.applied(pushed)
        return self._end_of_batch()

    def _may_help(self) -> bool:
        """A ticket came back, of somebody who is gone perhaps, and the server trains too."""
        return self._trains and self.tickets.has_returned

    def _apply(self, rank: int, facts: Facts) -> None:
        """One update: mean gradient of the push, clipped, stepped with a rate that fits its age."""
        with self.clock.compute():
            age = self.tickets.num_done - facts.version
            # Not the gradient is damped but the rate: Adam would undo the former, as it divides by
            # the gradient's own length.
            rate = self.context.learning_rate(self.steps_begun) * self._damping(age)
            pending = PendingUpdate(self.steps_begun, torch.empty(0), [])
            self.context.reseed(UPDATE, self.tickets.num_done)
            norm = self.update(pending, facts.weight, rate)
        if rank == SERVER:
            self.loss_scale.update(was_finite=norm is not None)
        self._told(rank, facts, norm)

    def _told(self, rank: int, facts: Facts, norm: float | None) -> None:
        self._sums.add(rank, facts, norm)
        step, age, samples = self.steps_begun, self.tickets.num_done - facts.version, facts.samples
        self._events.append(
            PushApplied(step, rank, facts.ticket, facts.version, age, int(samples), norm)
        )

    def _end_of_batch(self) -> StepResult:
        step, self.steps_begun = self.steps_begun, self.tickets.num_done // self.tickets.per_step
        self._sums.wants_stop |= self.wants_stop
        if self._sums.wants_stop:
            self.reception.say_over(was_stopped=True)
        events = [*self._events, *self.reception.told]
        sums, self._sums = self._sums, Sums()
        self._events.clear()
        self.reception.told.clear()
        return self.result(step, sums, events)

    @torch.no_grad()
    def eval_step(self, micro_batches: Sequence[Batch]) -> EvalSums:
        """As always, and nobody loses patience meanwhile."""
        self.reception.say_busy()
        return super().eval_step(micro_batches)

    def finish(self) -> None:
        """The last to go: everybody has been told that it is over."""
        self.reception.wait_until_all_left(self.context.mesh.timeout_s)

    def state(self) -> dict[str, Any]:
        """Also which tickets are open; those in somebody's hands will have to be done again."""
        return {**super().state(), "tickets": self.tickets.state()}

    def restore(self, checkpoint: Checkpoint, state: Mapping[str, Any]) -> None:
        """Also from a run without tickets, where all samples of the steps before are done."""
        if state["in_flight"]:
            raise CheckpointError(
                f"{checkpoint.folder} has gradients that no update has used, and algorithm=edp has "
                "no place for them; go on with the algorithm that it had: at its end there are none"
            )
        super().restore(checkpoint, state)
        done = self.steps_begun * self.tickets.per_step
        fresh = {"per_step": self.tickets.per_step, "next": done, "open": []}
        self.tickets.restore(state.get("tickets", fresh))
