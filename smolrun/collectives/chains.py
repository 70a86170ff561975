"""Collectives made of several schedules, with something to compute in between.

A chain is a generator: it computes, yields the schedule to run next, and goes on when that has run.

    def all_reduce_in_fewer_bits():
        ...encode what the others shall sum...
        yield Phase(all to all)
        ...sum, encode the sum...
        yield Phase(all gather)
        ...decode...

All of it happens on the I/O thread, so what a chain computes at one time must be short: heartbeats
wait for it. Chains start in the order they were given, on all ranks alike, and few are under way at
one time, which bounds their memory."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from smolrun.collectives.executor import Chunks, Run
from smolrun.collectives.schedule import Schedule
from smolrun.mesh.mesh import Mesh, Work
from smolrun.wire.frame import Tag

# Enough for one to compute while others travel.
_MOST_AT_ONCE = 4


class Phase(NamedTuple):
    """One schedule of a chain, and the memory that it sends from and receives into."""

    schedule: Schedule
    outgoing: Chunks
    incoming: Chunks


Chain = Iterator[Phase]


class Chains:
    """The chains of one group of ranks."""

    def __init__(self, mesh: Mesh, ranks: Sequence[int]) -> None:
        self._mesh = mesh
        self._ranks = ranks
        # Touched on the I/O thread only.
        self._waiting: deque[tuple[Chain, Tag, _Open]] = deque()
        self._running = 0

    def submit(
        self, name: str, chains: Sequence[Chain], first: Tag, phases: int, fingerprint: int
    ) -> Work:
        """Queues one or more chains of at most `phases` phases; the work is done when all ended.

        Each phase is an operation of its own, counted from `first`."""

        def start(work: Work) -> None:
            for operation in range(phases * len(chains)):
                tag = first._replace(operation=first.operation + operation)
                self._mesh.begin_operation(tag, fingerprint)
            rest = _Open(work, len(chains))
            for number, chain in enumerate(chains):
                tag = first._replace(operation=first.operation + number * phases)
                self._waiting.append((chain, tag, rest))
            self._start_next()

        return self._mesh.submit(f"{name} {first.operation}", start)

    def _start_next(self) -> None:
        """Starts one that waits, if it may; the next one after others had their turn."""
        if self._waiting and self._running < _MOST_AT_ONCE and self._mesh.failure is None:
            self._running += 1
            self._go_on(*self._waiting.popleft())
            self._mesh.post(self._start_next)

    def _go_on(self, chain: Chain, tag: Tag, rest: _Open) -> None:
        if self._mesh.failure is not None:
            return  # the work has failed with the mesh
        try:
            phase = next(chain, None)
            if phase is not None:
                following = tag._replace(operation=tag.operation + 1)
                done = functools.partial(self._go_on, chain, following, rest)
                Run(self._mesh, self._ranks, tag, *phase, done).start()
                return
        except Exception as error:
            self._mesh.fail(error)  # the peers already wait for the other half
            return
        self._running -= 1
        rest.count -= 1
        if not rest.count:
            self._mesh.finish(rest.work)
        self._mesh.post(self._start_next)  # posted: many short ones must not become a deep stack


class _Open:
    """How many chains of a work have not ended."""

    def __init__(self, work: Work, count: int) -> None:
        self.work = work
        self.count = count
