"""The parameter server's end of the lines: whatever workers do becomes one queue of events, in the
order in which it happens.

    rank 1  letter, push, letter ...  \
    rank 2  push, push ...             >  event, event, event  ->  the server's loop, one at a time
    rank 3  comes, ..., is gone       /

So the server decides everything on one thread, and applies pushes in the order in which they came.
The rest is done here: tickets are handed out, and come back from those who leave; who has pushed
gets newer weights. Of every worker there is room for one push and a copy of the weights that go
there, so that none changes under way. Knows nothing of optimizers."""

from __future__ import annotations

import queue
import time
from collections import Counter
from collections.abc import Callable

from smolrun.events import REPLACED, Event, Membership, PushDropped
from smolrun.mesh.mesh import Mesh
from smolrun.parts.flat_model import FlatModel
from smolrun.parts.push_pull import Facts, Letter, Why, Word
from smolrun.parts.quantization import Quantization
from smolrun.parts.tickets import Tickets
from smolrun.parts.worker_at_server import Came, Gone, Happening, Pushed, Sent, Worker

# So often a ticket is tried whose gradient is not finite: in fp16 the next loss scale may do.
_TRIES = 4

_WHY = {
    Why.REPLACED: REPLACED,
    Why.NOT_FINITE: "it was not finite",
    Why.LOST: "its rank is gone",
}


class Reception:
    """All workers of a mesh, and the tickets. Its methods are for one thread, the server's.

    `told` is what there is to tell of comings, goings and dropped gradients; who tells it empties
    it."""

    def __init__(
        self, mesh: Mesh, flat_model: FlatModel, quantization: Quantization, tickets: Tickets
    ) -> None:
        self.workers: dict[int, Worker] = {}
        self.tickets = tickets
        self.told: list[Event] = []
        self._mesh = mesh
        self._flat_model = flat_model
        self._quantization = quantization
        self._steps = 0
        self._happenings: queue.SimpleQueue[Happening] = queue.SimpleQueue()
        self._wanting: list[Worker] = []  # who has asked for a ticket, in order
        self._not_finite: Counter[int] = Counter()  # tickets that were tried in vain
        self._is_open = False
        self._over: Letter | None = None

    def open(self, steps: int) -> None:
        """From now on workers are received, to train so many steps."""
        self._steps = steps
        if not self._is_open:
            self._is_open = True
            self._mesh.on_membership_change(self._news)

    def next_push(
        self, timeout_s: float, unless: Callable[[], bool] = lambda: False
    ) -> Pushed | None:
        """The next gradient; None if none came in time, or something else happened so that
        `unless()`. 0: only what has happened already."""
        deadline = time.monotonic() + timeout_s
        while True:
            left_s = deadline - time.monotonic()
            try:
                happening = self._happenings.get(block=left_s > 0, timeout=max(0.0, left_s))
            except queue.Empty:
                return None
            if isinstance(happening, Pushed):
                if self._is_here(happening.worker):
                    return happening
            else:
                self._handle(happening)
                if unless():
                    return None

    def applied(self, pushed: Pushed) -> None:
        """The gradient is in the weights, or is skipped: its ticket is done. Who has pushed gets
        newer weights."""
        worker = pushed.worker
        self.tickets.finish(worker.rank, pushed.facts.ticket)
        if pushed.has_gradient:
            worker.say(Letter(Word.APPLIED, self.tickets.num_done))
            worker.expect_push()
            worker.is_due = True
            worker.send_if_due(self.tickets.num_done)
        self.hand_out()

    def hand_out(self) -> None:
        """Tickets to those who want some, as far as there are any."""
        for worker in list(self._wanting):
            ticket = self.tickets.take(worker.rank, self._steps)
            if ticket is None:
                continue  # there may be one for somebody who has none yet
            self._wanting.remove(worker)
            needs = self.tickets.needs(ticket)
            worker.say(Letter(Word.TICKET, ticket, needs, self.tickets.per_step))
            if worker.sent_version < needs:
                worker.is_due = True
                worker.send_if_due(self.tickets.num_done)

    def say_busy(self) -> None:
        """The server does something else for a while, nobody should lose patience."""
        for worker in self.workers.values():
            worker.say(Letter(Word.BUSY))

    def say_over(self, *, was_stopped: bool) -> None:
        """There is no more work, also for those who come now."""
        if self._over is None:
            self._over = Letter(Word.OVER, int(was_stopped))
            for worker in self.workers.values():
                worker.say(self._over)

    def wait_until_all_left(self, timeout_s: float) -> None:
        """Nobody is left here when this returns, or they were given their time."""
        deadline = time.monotonic() + timeout_s
        while self.workers and (left_s := deadline - time.monotonic()) > 0:
            try:
                self._handle(self._happenings.get(timeout=left_s))
            except queue.Empty:
                return

    def _is_here(self, worker: Worker) -> bool:
        """What was on its way from before a worker was lost does not count."""
        return self.workers.get(worker.rank) is worker

    def _handle(self, happening: Happening) -> None:
        if isinstance(happening, Came):
            self._came(happening.worker)
        elif isinstance(happening, Gone):
            self._gone(happening)
        elif isinstance(happening, Pushed) or not self._is_here(happening.worker):
            return  # there is no more use for it
        elif isinstance(happening, Sent):
            happening.worker.has_sent()
            happening.worker.send_if_due(self.tickets.num_done)
        elif happening.letter.word is Word.WANT:
            self._wanting.append(happening.worker)
            self.hand_out()
        elif happening.letter.word is Word.GIVE_BACK:
            self._came_back(happening.worker, happening.letter.first, Why(happening.letter.second))

    def _came_back(self, worker: Worker, ticket: int, why: Why) -> None:
        """Somebody else tries it; after some vain attempts it is skipped, as in any algorithm."""
        if why is Why.NOT_FINITE:
            self._not_finite[ticket] += 1
        if self._not_finite[ticket] >= _TRIES:
            del self._not_finite[ticket]
            facts = Facts(ticket, self.tickets.num_done, 0.0, 0.0, 0.0, 0.0)
            self._happenings.put(Pushed(worker, facts, has_gradient=False))
            return
        self.tickets.give_back(worker.rank, ticket)
        self._tell_dropped(worker.rank, ticket, why)
        self.hand_out()

    def _came(self, worker: Worker) -> None:
        self.workers[worker.rank] = worker
        worker.begin()
        worker.send_if_due(self.tickets.num_done)
        if self._over is not None:
            worker.say(self._over)
        else:
            self.told.append(Membership(self._step, worker.rank, True, "joined", 0))

    def _gone(self, gone: Gone) -> None:
        worker = self.workers.pop(gone.rank, None)
        if worker is None:
            return
        self._wanting = [other for other in self._wanting if other is not worker]
        lost = self.tickets.lose(gone.rank)
        for ticket in lost:
            self._tell_dropped(gone.rank, ticket, Why.LOST)
        if self._over is None:
            step = self._step
            self.told.append(Membership(step, gone.rank, False, gone.reason, len(lost)))
        self.hand_out()

    @property
    def _step(self) -> int:
        return self.tickets.num_done // self.tickets.per_step

    def _tell_dropped(self, rank: int, ticket: int, why: Why) -> None:
        self.told.append(PushDropped(self._step, rank, ticket, _WHY[why]))

    def _news(self, rank: int, is_here: bool, reason: str) -> None:
        """On the I/O thread."""
        if is_here:
            worker = Worker(
                self._mesh, rank, self._flat_model, self._quantization, self._happenings
            )
            self._happenings.put(Came(worker))
        else:
            self._happenings.put(Gone(rank, reason))
