"""Schedules with one root or with log2(N) rounds: broadcast, gather, scatter, barrier.

    broadcast from 0, 8 ranks:   0 -> 4      0 -> 2, 4 -> 6      0 -> 1, 2 -> 3, 4 -> 5, 6 -> 7

Source: the binomial tree of MPI implementations, Thakur et al., "Optimization of Collective
Communication Operations in MPICH", 2005; the barrier is Hensgen, Finkel and Manber's dissemination
barrier, 1988."""

from __future__ import annotations

from smolrun.collectives.schedule import Hop, Schedule


def tree_broadcast(index: int, size: int, root: int) -> Schedule:
    """Chunk 0 travels from `root` to all in a binomial tree."""
    place = (index - root) % size  # my place when the root is counted as 0
    hops: Schedule = []
    # My lowest set bit says which round I am reached in; the root is reached before all rounds.
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
    """In round k every rank tells the rank 2^k further; after log2(N) rounds each has heard of all,
    directly or not."""
    return [
        Hop(to=(index + (1 << hop)) % size, source=(index - (1 << hop)) % size, needs=hop)
        for hop in range((size - 1).bit_length())
    ]
