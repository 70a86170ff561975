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

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from smolrun.algorithms.base import Algorithm, Context, InFlight
from smolrun.algorithms.contract import NOTHING, EvalSums, Part, Share, StepResult
from smolrun.checkpoints.reader import Checkpoint
from smolrun.collectives.api import Collectives
from smolrun.data.base import Batch
from smolrun.errors import ConfigError, WaitTimeout
from smolrun.events import Event, PushApplied
from smolrun.parts.courier import Courier, Ticket
from smolrun.parts.damping import DAMPING
from smolrun.parts.flat_model import FlatModel
from smolrun.parts.patience import Patience
from smolrun.parts.push_pull import Facts, Sums, Why
from smolrun.parts.reception import Reception
from smolrun.parts.tickets import Tickets

SERVER = 0


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


class EDP(Algorithm):
    """What server and workers have in common: backward writes into flat gradients."""

    is_lockstep = False

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.collectives = Collectives(context.mesh, [context.mesh.rank])
        self._samples = 0  # that this rank has computed since it last told

    def place(self, model: torch.nn.Module) -> None:
        """A replica. ConfigError for a model that learns something without gradients."""
        if any(getattr(module, "track_running_stats", False) for module in model.modules()):
            raise ConfigError(
                "algorithm=edp brings gradients to the server and nothing else, but this model has "
                "norms that keep running means; take layer norms, or algorithm=classicdp"
            )
        super().place(model)
        self.flat_model = FlatModel(model.parameters())
        self.gradients = self.flat_model.zeros()
        self.flat_model.bind(self.gradients)

    def gradient(self, ticket: int, version: int, micro_batches: Sequence[Batch]) -> Facts:
        """Computes the sum of the gradients of a ticket's samples."""
        for flat in self.gradients:
            flat.zero_()
        with self._computing():
            told = self.forward_backward(micro_batches)
        if self.loss_scale.value != 1.0:
            for flat in self.gradients:
                flat.div_(self.loss_scale.value)
        samples = sum(len(batch.inputs) for batch in micro_batches)
        self._samples += samples
        return Facts(
            ticket, version, told["loss_sum"], told["weight"], samples, float(self.wants_stop)
        )

    def result(self, step: int, sums: Sums, events: Sequence[Event] = ()) -> StepResult:
        """What a trainer wants to know."""
        compute_s, wait_s, samples = self._compute_s, self._wait_s, self._samples
        self._compute_s, self._wait_s, self._samples = 0.0, 0.0, 0
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

    def load_gradients(self, flight: InFlight) -> list[torch.Tensor]:
        """They are in `parameter.grad` all the time."""
        return self.gradients

    def synchronize(self, facts: dict[str, float]) -> InFlight:
        """There is no moment at which all gradients come together."""
        raise NotImplementedError("a push is applied when it comes")


class EDPWorker(EDP):
    """Computes gradients; it has no optimizer, and neither evaluates nor saves."""

    evaluates = saves = False

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

    def next_share(self, steps: int) -> Share | None:
        """The next ticket; waits where the server has none to give, or weights are too old."""
        began = time.perf_counter()
        self._ticket = ticket = self.courier.next_ticket()
        self._wait_s += time.perf_counter() - began
        if ticket is None:
            self.steps_begun = 0 if self.courier.was_stopped else steps
            return None
        step, index = divmod(ticket.number, ticket.per_step)
        return Share(step, Part(index, ticket.per_step))

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


class EDPServer(EDP):
    """Applies pushes in the order in which they come."""

    evaluates_alone = True

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

    def next_share(self, steps: int) -> Share | None:
        """A ticket of its own, if it trains and there is one; else nothing but to serve."""
        self.reception.open(steps)
        if self.tickets.is_over(steps):
            self.reception.say_over(was_stopped=False)
            return None
        self._own = self.tickets.take(SERVER, steps) if self._trains else None
        if self._own is None:
            return Share(self.steps_begun, NOTHING)
        step, index = divmod(self._own, self.tickets.per_step)
        return Share(step, Part(index, self.tickets.per_step))

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
            began = time.perf_counter()
            pushed = self.reception.next_push(0.0 if trains else limit_s)
            self._wait_s += time.perf_counter() - began
            if pushed is None and trains:
                return None
            if pushed is None:
                here = len(self.reception.workers)
                raise WaitTimeout(f"no gradient came for {limit_s:g} s; {here} workers are here")
            pushed.worker.take_gradient(self.gradients)
            self._apply(pushed.worker.rank, pushed.facts)
            self.reception.applied(pushed)
        return self._end_of_batch()

    def _apply(self, rank: int, facts: Facts) -> None:
        """One update: mean gradient of the push, clipped, stepped with a rate that fits its age."""
        with self._computing():
            step, age = self.steps_begun, self.tickets.num_done - facts.version
            # Not the gradient is damped but the rate: Adam would undo the former, as it divides by
            # the gradient's own length.
            rate = self.context.learning_rate(step) * self._damping(age)
            flight = InFlight(step, torch.empty(0), [])
            norm = self.update(flight, facts.weight, rate)
        if rank == SERVER:
            self.loss_scale.update(was_finite=norm is not None)
        self._sums.add(rank, facts, norm)
        self._events.append(
            PushApplied(step, rank, facts.ticket, facts.version, age, int(facts.samples), norm)
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

    def leave(self) -> None:
        """The last to go: everybody has been told that it is over."""
        self.reception.wait_until_all_left(self.context.mesh.timeout_s)

    def state(self) -> dict[str, Any]:
        """Also which tickets are open; those in somebody's hands will have to be done again."""
        return {**super().state(), "tickets": self.tickets.state()}

    def restore(self, checkpoint: Checkpoint, state: Mapping[str, Any]) -> None:
        """Also from a run without tickets, where all samples of the steps before are done."""
        super().restore(checkpoint, state)
        done = self.steps_begun * self.tickets.per_step
        fresh = {"per_step": self.tickets.per_step, "next": done, "open": []}
        self.tickets.restore(state.get("tickets", fresh))
