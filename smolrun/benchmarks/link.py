"""How much of a link an all_reduce can use: beside one plain TCP stream over the same link.

A ring moves 2(N-1)/N times the tensor's bytes over every link, in one direction; the plain stream
moves as many from rank 0 to rank 1. So a ratio of 1 means that the link is full.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from smolrun.benchmarks.compare import compare
from smolrun.collectives.api import Collectives
from smolrun.mesh.raw_stream import RawListener, RawStream


def compare_link(
    collectives: Collectives,
    sizes: Sequence[int],
    *,
    addresses: Sequence[str],
    repeats: int,
    security: str,
    timeout_s: float,
) -> Iterator[dict[str, Any]]:
    """One row per size (bytes of a float32 tensor); collective. `addresses` are this rank's own.
    Rank 0's clock counts. `of_stream` is the share of the plain stream's rate that was reached."""
    stream = _join(collectives, addresses[0], timeout_s)
    try:
        for size in sizes:
            ours = torch.zeros(size // 4)
            moved = int(size * 2 * (collectives.size - 1) / collectives.size)
            result = compare(
                lambda ours=ours: collectives.all_reduce(ours),  # type: ignore[misc]
                lambda moved=moved: _move(stream, collectives.index, moved),  # type: ignore[misc]
                repeats=repeats,
                calls=1,
                meet=collectives.barrier,
            )
            yield {
                **result.row(
                    "link",
                    "all_reduce",
                    "one TCP stream",
                    world_size=collectives.size,
                    bytes=size,
                    security=security,
                ),
                "of_stream": 1 / result.ratio,
                "stream_bytes_per_s": moved / result.peer_s,
            }
    finally:
        if stream is not None:
            stream.close()


def _join(collectives: Collectives, address: str, timeout_s: float) -> RawStream | None:
    """The stream from rank 0 to rank 1; the other ranks have none."""
    where = torch.zeros(64 + 1, dtype=torch.int64)  # an address as text, and a port
    listener = None
    if collectives.index == 1:
        listener = RawListener(address, timeout_s)
        where[: len(address)] = torch.tensor(list(address.encode()))
        where[-1] = listener.port
    collectives.broadcast(where, 1)
    if listener is not None:
        return listener.accept()
    if collectives.index == 0:
        there = bytes(int(code) for code in where[:-1] if code).decode()
        return RawStream.dial(there, int(where[-1]), timeout_s)
    return None


def _move(stream: RawStream | None, index: int, size: int) -> None:
    if stream is None:
        return
    if index == 0:
        stream.send(size)
    else:
        stream.receive(size)
