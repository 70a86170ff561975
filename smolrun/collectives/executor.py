"""The one executor: runs any schedule over any mesh, hop after hop, on the I/O thread, without a
thread switch per hop.

All receives are posted at the start, so a peer's grant is there before the data is; a hop's send
starts when the receives it needs are done.

A chain (chain.py) runs on the I/O thread too, so what it computes at one time must be short:
heartbeats wait for it. Chains start in the order they were given, on all ranks alike, and few run
at one time, which bounds their memory."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np
import torch

from smolrun.collectives.chain import Chain
from smolrun.collectives.schedule import Range, Schedule, direct_all_gather, direct_all_to_all
from smolrun.errors import SmolrunError
from smolrun.mesh.mesh import Combine, Mesh, PostedReceive, Work
from smolrun.wire.frame import Tag
from smolrun.wire.tensor import Payload, as_array, as_bytes, dtype_code

_NUMPY_OPS = {"sum": np.add, "max": np.maximum, "min": np.minimum}
TORCH_OPS: dict[str, Callable[..., torch.Tensor]] = {
    "sum": torch.add,
    "max": torch.maximum,
    "min": torch.minimum,
}
OPS = tuple(_NUMPY_OPS)
_SCHEDULES = {"all_to_all": direct_all_to_all, "all_gather": direct_all_gather}
# Enough for one to compute while others are sent.
_MOST_AT_ONCE = 4


class Chunks:
    """A flat tensor as numbered ranges of elements."""

    def __init__(self, tensor: torch.Tensor, ranges: Sequence[Range]) -> None:
        self.ranges = ranges
        self._tensor = tensor.detach().reshape(-1)
        self._bytes = as_bytes(tensor)
        self._dtype = dtype_code(tensor.dtype)
        self._itemsize = tensor.itemsize

    def is_empty(self, index: int) -> bool:
        """Whether a chunk has no elements; such a chunk is never sent."""
        start, stop = self.ranges[index]
        return start == stop

    def payload(self, index: int) -> Payload:
        """The chunk's memory."""
        start, stop = self.ranges[index]
        return Payload(
            self._bytes[start * self._itemsize : stop * self._itemsize],
            self._dtype,
            (stop - start,),
        )

    def combiner(self, index: int, op: str) -> Combine:
        """A function that combines bytes at a byte offset of the chunk with it."""
        start, stop = self.ranges[index]
        return combiner(self._tensor[start:stop], op)


def combiner(tensor: torch.Tensor, op: str) -> Combine:
    """combine(offset, chunk) for a flat tensor: tensor[offset:] = op(tensor[offset:], chunk), in
    the tensor's dtype."""
    itemsize = tensor.itemsize
    array = as_array(tensor)
    if array is None:  # half precision: numpy has none, or a slow one
        torch_op = TORCH_OPS[op]

        def combine_torch(offset: int, chunk: memoryview) -> None:
            part = torch.frombuffer(chunk, dtype=tensor.dtype)
            into = tensor[offset // itemsize : offset // itemsize + len(part)]
            torch_op(into, part, out=into)

        return combine_torch
    numpy_op, dtype = _NUMPY_OPS[op], array.dtype

    def combine(offset: int, chunk: memoryview) -> None:
        part = np.frombuffer(chunk, dtype)
        into = array[offset // itemsize : offset // itemsize + len(part)]
        numpy_op(into, part, out=into)

    return combine


class ScheduleRun:
    """One running schedule. `on_done` is called once, on the I/O thread, after the last hop."""

    def __init__(
        self,
        mesh: Mesh,
        ranks: Sequence[int],
        tag: Tag,
        schedule: Schedule,
        outgoing: Chunks,
        incoming: Chunks,
        on_done: Callable[[], None],
        *,
        op: str = "sum",
    ) -> None:
        self._mesh = mesh
        self._ranks = ranks
        self._tag = tag
        self._schedule = schedule
        self._outgoing = outgoing
        self._incoming = incoming
        self._on_done = on_done
        self._op = op
        self._has_received = [False] * len(schedule)
        self._received = 0  # the first so many receives are done
        self._sent = 0  # the first so many sends were started
        self._nth_send: dict[int, int] = {}
        self._open = 1  # sends and receives that are not done, and one for start() itself

    def start(self) -> None:
        """Posts every receive, then the sends that need none."""
        # Hops are numbered per pair and direction, so that schedules of different length meet.
        nth: dict[int, int] = {}
        for index, hop in enumerate(self._schedule):
            if hop.source is None or self._incoming.is_empty(hop.receive):
                self._has_received[index] = True
                continue
            number = nth[hop.source] = nth.get(hop.source, -1) + 1
            self._open += 1
            combine = self._incoming.combiner(hop.receive, self._op) if hop.adds else None
            done = functools.partial(self._received_hop, index)
            receive = PostedReceive(self._incoming.payload(hop.receive), done, combine)
            tag = self._tag._replace(hop=number)
            self._mesh.post_recv(self._ranks[hop.source], tag, receive)
        self._advance()
        self._close_one()

    def _received_hop(self, index: int) -> None:
        if self._mesh.failure is not None:
            return  # it has failed with the mesh; what still arrives changes nothing
        self._has_received[index] = True
        try:
            self._advance()
        except SmolrunError as error:
            self._mesh.fail(error)  # not an error of the peer whose bytes are being read
            return
        self._close_one()

    def _advance(self) -> None:
        schedule = self._schedule
        while self._received < len(schedule) and self._has_received[self._received]:
            self._received += 1
        while self._sent < len(schedule) and schedule[self._sent].needs <= self._received:
            hop = schedule[self._sent]
            self._sent += 1
            if hop.to is None or self._outgoing.is_empty(hop.send):
                continue
            number = self._nth_send[hop.to] = self._nth_send.get(hop.to, -1) + 1
            self._open += 1
            self._mesh.post_send(
                self._ranks[hop.to],
                self._tag._replace(hop=number),
                self._outgoing.payload(hop.send),
                self._close_one,
            )

    def _close_one(self) -> None:
        self._open -= 1
        if not self._open:
            self._on_done()


class Chains:
    """The chains of one group of ranks."""

    def __init__(self, mesh: Mesh, ranks: Sequence[int]) -> None:
        self._mesh = mesh
        self._ranks = ranks
        self._index = list(ranks).index(mesh.rank)
        # Touched on the I/O thread only.
        self._waiting: deque[tuple[Chain, Tag, _OpenChains]] = deque()
        self._running = 0

    def submit(
        self, name: str, chains: Sequence[Chain], first: Tag, phases: int, fingerprint: int
    ) -> Work:
        """Queues chains of at most `phases` phases each; the work is done when all have ended.

        Each phase is an operation of its own, counted from `first`."""

        def start(work: Work) -> None:
            for operation in range(phases * len(chains)):
                tag = first._replace(operation=first.operation + operation)
                self._mesh.begin_operation(tag, fingerprint)
            rest = _OpenChains(work, len(chains))
            for number, chain in enumerate(chains):
                tag = first._replace(operation=first.operation + number * phases)
                self._waiting.append((chain, tag, rest))
            self._start_next()

        return self._mesh.submit(f"{name} {first.operation}", start)

    def _start_next(self) -> None:
        """Starts the next chain if few are running; the one after that in a later turn."""
        if self._waiting and self._running < _MOST_AT_ONCE and self._mesh.failure is None:
            self._running += 1
            self._resume(*self._waiting.popleft())
            self._mesh.post(self._start_next)

    def _resume(self, chain: Chain, tag: Tag, rest: _OpenChains) -> None:
        if self._mesh.failure is not None:
            return  # the work has failed with the mesh
        try:
            phase = next(chain, None)
            if phase is not None:
                following = tag._replace(operation=tag.operation + 1)
                done = functools.partial(self._resume, chain, following, rest)
                schedule = _SCHEDULES[phase.kind](self._index, len(self._ranks))
                outgoing = Chunks(phase.outgoing, phase.sends)
                incoming = Chunks(phase.incoming, phase.receives)
                ScheduleRun(
                    self._mesh, self._ranks, tag, schedule, outgoing, incoming, done
                ).start()
                return
        except Exception as error:
            self._mesh.fail(error)  # the peers already wait for the other half
            return
        self._running -= 1
        rest.count -= 1
        if not rest.count:
            self._mesh.finish(rest.work)
        self._mesh.post(self._start_next)  # posted: many short ones must not become a deep stack


class _OpenChains:
    """A work and how many of its chains have not ended."""

    def __init__(self, work: Work, count: int) -> None:
        self.work = work
        self.count = count
