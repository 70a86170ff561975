"""Ring schedules for large tensors: every rank talks only to its two neighbours, and every link is
busy all the time.

    reduce_scatter, 3 ranks, rank 1:   hop 0   send chunk 0 -> 2    receive chunk 2 <- 0, add
                                       hop 1   send chunk 2 -> 2    receive chunk 1 <- 0, add  = sum
    all_gather goes on from there:     hop 2   send chunk 1 -> 2    receive chunk 0 <- 0
                                       hop 3   send chunk 0 -> 2    receive chunk 2 <- 0

Each rank sends (N-1)/N of the tensor per phase, 2(N-1)/N for an all_reduce: the least that is
possible. A chunk is summed once, in the order of the ring, and then copied, so all ranks end with
the same bytes.

Source: Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations",
2009."""

from __future__ import annotations

from smolrun.collectives.schedule import Hop, Schedule


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
