"""Schedules where every rank talks to every other at once: one round trip, for small tensors, and
all_to_all.

A rank sends N-1 chunks without waiting for any. For an all_reduce each rank receives all tensors
and sums them itself, in rank order, so all ranks end with the same bytes; that costs (N-1) times
the tensor where the ring costs 2(N-1)/N, but one hop of latency instead of 2(N-1)."""

from __future__ import annotations

from smolrun.collectives.schedule import Hop, Schedule


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
    """Send chunk i of what I have to rank i, receive chunk i of what I get from rank i.

    Rank order is rotated, so that not everybody sends to rank 0 first.
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
