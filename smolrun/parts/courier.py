"""A worker's end of the line to the parameter server: gradients leave and weights come while it
computes.

    computing   [ ticket 4 ][ ticket 7 ][ ticket 9 ][ ticket 12 ]
    up               [ push 4          ][ push 9          ]         7 was not under way yet when 9
    down                        [ weights ]     [ weights ]         was there: it goes back

A push is under way until the server has applied it, and one may wait behind it. If a newer one is
there before that has begun to move, it takes its place: newer gradients are worth more than older
ones, and the ticket of the older one goes back, so that its samples are not lost. Weights come into
a copy of their own and are loaded between two tickets.

What is said here is told in push_pull.py. Main and I/O thread share it all under one lock.

Source: Dean et al., "Large Scale Distributed Deep Networks", 2012 (Downpour: push and pull in the
background)."""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass

import torch

from smolrun.errors import WaitTimeout
from smolrun.mesh.mesh import Mesh
from smolrun.parts.flat_model import FlatModel, Flats
from smolrun.parts.patience import Patience
from smolrun.parts.push_pull import Facts, Letter, Lines, Why, Word, letter_room, read
from smolrun.parts.quantization import Feedback, Quantization


@dataclass(frozen=True)
class Ticket:
    """One to work on: part `number % per_step` of step `number // per_step`."""

    number: int
    needs: int  # version of weights
    per_step: int


@dataclass
class Push:
    """A gradient in the form in which it travels."""

    facts: Facts
    wires: list[torch.Tensor]


class Courier:
    """Fetches tickets and weights from rank `server`, brings gradients there."""

    def __init__(
        self,
        mesh: Mesh,
        server: int,
        flat_model: FlatModel,
        quantization: Quantization,
        patience: Patience,
    ) -> None:
        self.was_stopped = False
        self._mesh = mesh
        self._server = server
        self._lines = Lines(mesh, server)
        self._flat_model = flat_model
        self._quantizer = quantization.quantizer()
        self._dtypes = [quantization.working_dtype(dtype) for dtype in flat_model.dtypes]
        self._feedbacks = [
            Feedback(size, dtype)
            for size, dtype in zip(flat_model.sizes, self._dtypes, strict=True)
            if quantization.error_feedback and not quantization.is_none
        ]
        self._changed = threading.Condition()
        self._has_begun = False
        self._error: BaseException | None = None
        self._is_over = False
        self._tickets: deque[Ticket] = deque()
        self._last_heard_s = time.monotonic()
        self._letter = letter_room()
        self._under_way: Push | None = None
        self._waiting: Push | None = None
        self._free: list[list[torch.Tensor]] = []  # wires to be used again
        self._shadow: Flats = flat_model.host_zeros()
        self._shadow_version = torch.zeros(1, dtype=torch.int64)
        self._is_fresh = False  # the shadow holds weights that are not loaded yet
        self._came_version = -1  # of the weights that are here, whether loaded or not
        self._version = -1  # of the weights that are loaded
        self._patience = patience
        self._applied_version = 0  # weights from this version on have the last push in them

    def _begin(self) -> None:
        """Expects the first letter and the first weights, and asks for work."""
        self._has_begun = True
        self._lines.next_letter(self._letter, self._letter_came)
        self._expect_weights()
        self._ask()

    # -- what the worker calls ----

    def next_ticket(self) -> Ticket | None:
        """What to work on next, when the weights that it needs are here; None when the run is over.
        Those with the last push in them are waited for as long as there is patience.

        Asks for the one after it at once. WaitTimeout if the server is alive and says nothing,
        PeerLost if it is gone."""
        if not self._has_begun:
            self._begin()
        asked_s = time.monotonic()
        while True:
            version = self.load_newest()  # also while waiting: only then newer ones can come
            with self._changed:
                if self._is_over:
                    return None
                self._raise_error()
                now_s = time.monotonic()
                is_ready = bool(self._tickets) and version >= max(0, self._tickets[0].needs)
                patience_s = self._patience.left_s(now_s)
                if is_ready and patience_s <= 0:
                    ticket = self._tickets.popleft()
                    self._patience.begin(now_s)
                    break
                if not self._is_fresh:
                    limit_s = patience_s if is_ready else self._may_wait_s(asked_s, now_s)
                    self._changed.wait(limit_s)
        self._ask()
        return ticket

    def load_newest(self) -> int:
        """The newest weights that are here go into the model; returns their version."""
        with self._changed:
            is_fresh = self._is_fresh
        if is_fresh:
            self._flat_model.load(self._shadow)
            self._version = int(self._shadow_version.item())
            self._is_fresh = False
            self._expect_weights()
        return self._version

    def push(self, facts: Facts, gradient: Flats) -> None:
        """Starts to bring a gradient to the server, or lets it wait behind the one under way; it
        may change again when this returns."""
        with self._changed:
            replaced, self._waiting = self._waiting, None
            if replaced is not None:
                self._free.append(replaced.wires)
            room = self._free.pop() if self._free else None
        for feedback in self._feedbacks:
            feedback.settle(is_kept=replaced is None)
        push = Push(facts, self._encode(gradient, room))
        with self._changed:
            self._raise_error()
            self._patience.push(time.monotonic())
            if self._under_way is None:
                self._start(push)
            else:
                self._waiting = push
        if replaced is not None:
            self.give_back(replaced.facts.ticket, Why.REPLACED)

    def give_back(self, ticket: int, why: Why) -> None:
        """The server must give this ticket to somebody else."""
        self._lines.say(Letter(Word.GIVE_BACK, ticket, why))

    # -- under the lock, or on the I/O thread ----

    def _may_wait_s(self, asked_s: float, now_s: float) -> float:
        """For work and weights, the time since anything was heard while they were waited for."""
        left_s = max(asked_s, self._last_heard_s) + self._mesh.timeout_s - now_s
        if left_s <= 0:
            raise WaitTimeout(
                f"rank {self._mesh.rank}: no work from rank {self._server} for "
                f"{self._mesh.timeout_s:g} s although it is alive",
                self._server,
            )
        return left_s

    def _raise_error(self) -> None:
        if self._error is not None and not self._is_over:
            raise self._error

    def _ask(self) -> None:
        self._lines.say(Letter(Word.WANT))

    def _encode(self, gradient: Flats, room: list[torch.Tensor] | None) -> list[torch.Tensor]:
        wires = []
        for index, flat in enumerate(gradient):
            wire = room[index] if room else None
            numbers = flat.cpu().to(self._dtypes[index])
            if self._feedbacks:
                source, lost = self._feedbacks[index].take()
                wires.append(self._quantizer.encode(numbers + source, wire, lost))
            else:
                wires.append(self._quantizer.encode(numbers, wire))
        return wires

    def _start(self, push: Push) -> None:
        self._under_way = push
        self._lines.pushes.send([push.facts.row(), *push.wires], self._failed_if)

    def _applied(self) -> None:
        """The push under way has reached its end; the one that waits takes its place."""
        assert self._under_way is not None, "the server applies what was pushed"
        self._free.append(self._under_way.wires)
        self._under_way, waiting, self._waiting = None, self._waiting, None
        if waiting is not None:
            self._start(waiting)
        self._look_for_answer()

    def _look_for_answer(self) -> None:
        if self._under_way is None and self._came_version >= self._applied_version:
            self._patience.answer(time.monotonic())

    def _expect_weights(self) -> None:
        def came(error: BaseException | None) -> None:
            with self._changed:
                self._is_fresh = error is None
                self._came_version = int(self._shadow_version.item())
                self._look_for_answer()
                self._changed.notify_all()
            self._failed_if(error)

        self._lines.weights.receive([self._shadow_version, *self._shadow], came)

    def _letter_came(self, error: BaseException | None) -> None:
        if error is not None:
            self._failed_if(error)
            return
        letter = read(self._letter)
        self._lines.next_letter(self._letter, self._letter_came)
        with self._changed:
            self._last_heard_s = time.monotonic()
            if letter.word is Word.TICKET:
                self._tickets.append(Ticket(letter.first, letter.second, letter.third))
            elif letter.word is Word.APPLIED:
                self._applied_version = letter.first
                self._applied()
            elif letter.word is Word.OVER:
                self._is_over, self.was_stopped = True, bool(letter.first)
            self._changed.notify_all()

    def _failed_if(self, error: BaseException | None) -> None:
        if error is not None:
            with self._changed:
                self._error = self._error or error
                self._changed.notify_all()
