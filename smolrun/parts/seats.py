"""What a parameter server has of each worker: memory for its pushes, and which of them are here.

    expected     receives are posted           the worker computes, or its gradient is on its way
    unanswered   the whole push is here        it waits for weights

The same memory takes a gradient on its way up and weights on their way down: a worker pushes again
only after it has all of the last answer. Knows the shape of the conversation, and nothing of what
is done with gradients or which weights are sent.

    push of step t      hop 0: the worker's numbers      hop 1, 2, ...: its buckets
    answer to it        hop 0: the server's numbers      hop 1, 2, ...: weights in the same buckets
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from smolrun.collectives.schedule import Hop, Schedule
from smolrun.mesh.bell import Bell
from smolrun.mesh.mesh import Mesh, Work
from smolrun.mesh.streams import Stream
from smolrun.parts.buckets import Bucket, GradientBuckets
from smolrun.parts.quantization import Quantization
from smolrun.wire.frame import Tag
from smolrun.wire.tensor import payload_of

SERVER = 0
_PUSH, _PULL = Stream.SYNCPS_PUSH, Stream.SYNCPS_PULL  # the operation is the step of the push
_LOOK_S = 0.25  # so late is a lost peer seen by a server that waits for whoever comes


@dataclass
class Seat:
    """One worker; `flat[slot]` (one per bucket) and `views[slot]` (one per parameter) share
    memory. Gradients in fewer bits need memory of their own."""

    rank: int
    pushed: list[list[Tensor]]  # per slot: one per bucket, as it travels up; `flat` as a rule
    flat: list[list[Tensor]]
    views: list[list[Tensor]]
    numbers: list[Tensor]  # per slot
    expected: dict[int, Work] = field(default_factory=dict)  # step -> its push
    unanswered: list[int] = field(default_factory=list)  # steps
    dropped: int = 0

    def came(self, step: int) -> Work:
        """The push of a step is taken note of; wait for it."""
        self.unanswered.append(step)
        return self.expected.pop(step)


class Seats:
    """The server's side, of as many steps at once as the buckets have slots."""

    def __init__(
        self, mesh: Mesh, buckets: GradientBuckets, num_numbers: int, quantization: Quantization
    ) -> None:
        self._mesh = mesh
        self._slots = buckets.slots
        self._quantizer = None if quantization.is_none else quantization.quantizer()
        self._bell = Bell()
        self.all = []
        for rank in range(SERVER + 1, mesh.world_size):
            rooms = [buckets.room() for _ in range(buckets.slots)]
            numbers = [torch.empty(num_numbers, dtype=torch.float64) for _ in rooms]
            flat = [flat for flat, _ in rooms]
            pushed = [[self._wire(tensor) for tensor in tensors] for tensors in flat]
            self.all.append(Seat(rank, pushed, flat, [views for _, views in rooms], numbers))

    def _wire(self, flat: Tensor) -> Tensor:
        """What a gradient of this form comes in."""
        if self._quantizer is None:
            return flat
        return torch.empty(self._quantizer.wire_bytes(flat.numel()), dtype=torch.uint8)

    def expect(self, seat: Seat, step: int) -> None:
        """Posts the receives of one push; one work is done when all of it is here."""
        slot = step % self._slots
        room = [seat.numbers[slot], *seat.pushed[slot]]
        left = len(room)

        def start(work: Work) -> None:
            for hop, into in enumerate(room):
                tag = Tag(_PUSH, step, hop)
                self._mesh.post_recv(seat.rank, tag, payload_of(into), lambda: one_came(work))

        def one_came(work: Work) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                self._mesh.finish(work)
                self._bell.ring()

        label = f"push of step {step} from rank {seat.rank}"
        seat.expected[step] = self._mesh.submit(label, start)

    def wait_for_most(self, step: int, patience_s: float, *, since: float | None) -> list[Seat]:
        """Until everybody who works on `step` is here, or `patience_s` after the first of them (or
        after `since`, by perf_counter). Returns who is late."""
        begun_s = time.perf_counter()
        there = [seat for seat in self.all if step in seat.expected]
        while True:
            self._bell.clear()
            late = [seat for seat in there if not seat.expected[step].is_done]
            now = time.perf_counter()
            firsts = [seat.expected[step].done_s for seat in there if seat not in late]
            firsts += [] if since is None else [since]
            left_s = min(firsts) + patience_s - now if firsts else _LOOK_S
            if not late or left_s <= 0:
                return late
            if now - begun_s > self._mesh.timeout_s:
                late[0].expected[step].wait(0)  # raises, and says whom it waits for
            self._bell.wait(min(left_s, _LOOK_S))

    def add(self, seat: Seat, bucket: Bucket, slot: int) -> None:
        """Adds what was pushed to the server's own gradient."""
        own, pushed = bucket.host[slot], seat.pushed[slot][bucket.index]
        if self._quantizer is None:
            own.add_(pushed)
        elif own.dtype in (torch.float32, torch.float64):
            self._quantizer.decode(pushed, own, adds=True)
        else:
            whole = torch.empty(own.numel())
            self._quantizer.decode(pushed, whole)
            own.add_(whole)

    def answer(self, seat: Seat, step: int, numbers: Tensor, weights: Sequence[Tensor]) -> None:
        """Starts to send the weights to whoever pushed at `step`."""
        slot = step % self._slots
        seat.unanswered.remove(step)
        for view, value in zip(seat.views[slot], weights, strict=True):
            view.copy_(value)
        for hop, tensor in enumerate([numbers, *seat.flat[slot]]):
            self._mesh.send(seat.rank, Tag(_PULL, step, hop), tensor)


def conversation(rank: int, size: int) -> Schedule:
    """What a rank sends and receives in a step, in the order in which the server takes note of it
    and answers; under way is all at one time. Chunk r is the gradient of rank r, 0 the weights."""
    workers = range(SERVER + 1, size)
    if rank == SERVER:
        pushes = [Hop(source=worker, receive=worker, adds=True) for worker in workers]
        return pushes + [Hop(to=worker, needs=len(pushes)) for worker in workers]
    hops = [Hop()] * (2 * len(workers))
    hops[rank - 1] = Hop(to=SERVER, send=rank)
    hops[rank - 1 + len(workers)] = Hop(source=SERVER)
    return hops


def push(mesh: Mesh, step: int, hop: int, tensor: Tensor) -> Work:
    """The worker's side: starts to send one part of its push."""
    return mesh.send(SERVER, Tag(_PUSH, step, hop), tensor)


def pull_into(mesh: Mesh, step: int, room: Sequence[Tensor]) -> list[Work]:
    """The worker's side: starts to receive the answer to its push; `room` is the server's numbers
    and the buckets of the push, which it does not touch before the push is whole."""
    return [mesh.recv(SERVER, Tag(_PULL, step, hop), into) for hop, into in enumerate(room)]
