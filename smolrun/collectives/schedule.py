"""Schedules: the list of hops one rank makes during a collective. Pure data, so it can be drawn,
costed and tested. Ranks are counted within the group here (index 0 .. size-1), and data is counted
in chunks.

Ring, for large tensors: every rank talks only to its two neighbours, and every link is busy all the
time.

    reduce_scatter, 3 ranks, rank 1:   hop 0   send chunk 0 -> 2    receive chunk 2 <- 0, add
                                       hop 1   send chunk 2 -> 2    receive chunk 1 <- 0, add  = sum
    all_gather continues from there:   hop 2   send chunk 1 -> 2    receive chunk 0 <- 0
                                       hop 3   send chunk 0 -> 2    receive chunk 2 <- 0

Each rank sends (N-1)/N of the tensor per phase, 2(N-1)/N for an all_reduce: the least that is
possible. A chunk is summed once, in the order of the ring, and then copied, so all ranks end with
the same bytes.

Direct, for small tensors, and all_to_all: every rank sends N-1 chunks without waiting for any. For
an all_reduce each rank receives all tensors and sums them itself, in rank order, so all ranks end
with the same bytes; that costs (N-1) times the tensor where the ring costs 2(N-1)/N, but one hop of
latency instead of 2(N-1).

Tree and star, for broadcast, gather, scatter and barrier:

    broadcast from 0, 8 ranks:   0 -> 4      0 -> 2, 4 -> 6      0 -> 1, 2 -> 3, 4 -> 5, 6 -> 7

Source: the ring is Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of
workstations", 2009; the binomial tree is that of MPI implementations, Thakur et al., "Optimization
of Collective Communication Operations in MPICH", 2005; the barrier is Hensgen, Finkel and Manber's
dissemination barrier, 1988."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

Range = tuple[int, int]  # elements [start, stop)


class Hop(NamedTuple):
    """One step of one rank: send a chunk, receive a chunk, or both. None: not in this hop."""

    to: int | None = None
    send: int = 0  # chunk to send
    source: int | None = None
    receive: int = 0  # chunk to receive
    adds: bool = False  # combine what arrives with what is there, instead of replacing it
    needs: int = 0  # the send starts when the receives of the first `needs` hops are done


Schedule = list[Hop]


def even_ranges(total: int, parts: int) -> list[Range]:
    """`total` elements cut into `parts` contiguous ranges whose sizes differ by at most one."""
    size, rest = divmod(total, parts)
    return ranges_of([size + (part < rest) for part in range(parts)])


def ranges_of(sizes: Sequence[int]) -> list[Range]:
    """Contiguous ranges of the given sizes."""
    return list(pairwise(accumulate(sizes, initial=0)))


def ring_reduce_scatter(index: int, size: int) -> Schedule:
    """Rank `index` ends with the sum of chunk `index`; the other chunks are left half summed."""
    return [
        Hop(
            to=(index + 1) % size,
            send=(index - hop - 1) % size,
            source=(index - 1) % size,
            receive=(index - hop - 2) % size,
            adds=True,
            needs=hop,
        )
        for hop in range(size - 1)
    ]


def ring_all_gather(index: int, size: int, *, after: int = 0) -> Schedule:
    """Rank `index` starts with chunk `index` and ends with all; `after` hops of the same schedule
    come before these."""
    return [
        Hop(
            to=(index + 1) % size,
            send=(index - hop) % size,
            source=(index - 1) % size,
            receive=(index - hop - 1) % size,
            needs=after + hop,
        )
        for hop in range(size - 1)
    ]


def ring_all_reduce(index: int, size: int) -> Schedule:
    """A reduce_scatter, then an all_gather of its results."""
    return ring_reduce_scatter(index, size) + ring_all_gather(index, size, after=size - 1)


def direct_all_gather(index: int, size: int) -> Schedule:
    """Send chunk `index` to all, receive chunk i from rank i."""
    return [
        Hop(
            to=(index + step) % size,
            send=index,
            source=(index - step) % size,
            receive=(index - step) % size,
        )
        for step in range(1, size)
    ]


def direct_all_to_all(index: int, size: int) -> Schedule:
    """Send chunk i of the input to rank i, receive chunk i of the output from rank i.

    Rank order is rotated, so that not all send to rank 0 first.
    """
    return [
        Hop(
            to=(index + step) % size,
            send=(index + step) % size,
            source=(index - step) % size,
            receive=(index - step) % size,
        )
        for step in range(1, size)
    ]


def tree_broadcast(index: int, size: int, root: int) -> Schedule:
    """Chunk 0 travels from `root` to all in a binomial tree."""
    place = (index - root) % size  # the index counted from the root
    hops: Schedule = []
    # The lowest set bit is the round of this rank's receive; the root has it before all rounds.
    reached = place & -place if place else 1 << (size - 1).bit_length()
    if place:
        hops.append(Hop(source=(place - reached + root) % size))
    step = reached >> 1
    while step:
        if place + step < size:
            hops.append(Hop(to=(place + step + root) % size, needs=1 if place else 0))
        step >>= 1
    return hops


def star_gather(index: int, size: int, root: int) -> Schedule:
    """Every rank sends chunk `index` to the root, which ends with all."""
    if index != root:
        return [Hop(to=root, send=index)]
    return [Hop(source=other, receive=other) for other in range(size) if other != root]


def star_scatter(index: int, size: int, root: int) -> Schedule:
    """The root sends chunk i to rank i."""
    if index != root:
        return [Hop(source=root, receive=index)]
    return [Hop(to=other, send=other) for other in range(size) if other != root]


def dissemination_barrier(index: int, size: int) -> Schedule:
    """In round k every rank signals the rank 2^k further; after log2(N) rounds each has, directly
    or not, a signal of all."""
    return [
        Hop(to=(index + (1 << hop)) % size, source=(index - (1 << hop)) % size, needs=hop)
        for hop in range((size - 1).bit_length())
    ]


def elements_sent(schedule: Schedule, ranges: Sequence[Range]) -> int:
    """How many elements a rank sends: the cost of a schedule, computed from the schedule itself."""
    return sum(ranges[hop.send][1] - ranges[hop.send][0] for hop in schedule if hop.to is not None)
