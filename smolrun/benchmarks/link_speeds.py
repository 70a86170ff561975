"""Measures every link of a mesh, one after the other: round trip and bandwidth, both directions.

rank a                      rank b
  | -- 8 bytes ------------> |      median of 20 turns = round trip
  | <------------ 8 bytes -- |
  | -- size ---------------> |
  | -- size bytes ---------> |      bandwidth: all of it there and an answer back,
  | <------------ 8 bytes -- |      less one round trip
"""

from __future__ import annotations

import statistics
import time
from itertools import permutations
from typing import Any

import torch

from smolrun.collectives.api import Collectives
from smolrun.mesh.mesh import Mesh
from smolrun.mesh.streams import Stream
from smolrun.wire.frame import Tag

_TURNS = 20
_SMALLEST, _LARGEST = 64 * 1024, 8 * 1024 * 1024
_BULK_S = 0.5  # target time of the large message, also on a slow link


def measure_links(collectives: Collectives) -> list[dict[str, Any]]:
    """Rows {from, to, rtt_s, bytes_per_s} of what this rank sent; every rank must call it.

    A link of 1 Mbit/s takes some seconds, a fast one a few milliseconds.
    """
    mesh = collectives.mesh
    rows = []
    for number, (source, to) in enumerate(permutations(range(mesh.world_size), 2)):
        if mesh.rank == source:
            rows.append({"from": source, "to": to, **_measure(mesh, to, number)})
        elif mesh.rank == to:
            _answer(mesh, source, number)
        collectives.barrier()
    return rows


def _tag(number: int, turn: int) -> Tag:
    return Tag(Stream.LINK_SPEEDS, number, turn)


def _measure(mesh: Mesh, peer: int, number: int) -> dict[str, float]:
    small = torch.zeros(1, dtype=torch.int64)
    turns = [_turn(mesh, peer, number, turn, small) for turn in range(_TURNS)]
    rtt_s = statistics.median(turns)
    trial_s = _bulk(mesh, peer, number, _TURNS, _SMALLEST) - rtt_s
    size = int(min(_LARGEST, max(_SMALLEST, _SMALLEST * _BULK_S / max(trial_s, 1e-6))))
    times = [_bulk(mesh, peer, number, turn, size) for turn in (_TURNS + 2, _TURNS + 4)]
    return {"rtt_s": rtt_s, "bytes_per_s": size / max(min(times) - rtt_s, 1e-6)}


def _turn(mesh: Mesh, peer: int, number: int, turn: int, message: torch.Tensor) -> float:
    began = time.perf_counter()
    sent = mesh.send(peer, _tag(number, turn), message)
    mesh.recv(peer, _tag(number, turn), torch.empty(1, dtype=torch.int64)).wait()
    sent.wait()
    return time.perf_counter() - began


def _bulk(mesh: Mesh, peer: int, number: int, turn: int, size: int) -> float:
    """Seconds from the first byte sent to the answer; two turns."""
    _turn(mesh, peer, number, turn, torch.tensor([size]))
    return _turn(mesh, peer, number, turn + 1, torch.zeros(size, dtype=torch.uint8))


def _answer(mesh: Mesh, peer: int, number: int) -> None:
    for turn in range(_TURNS):
        _reply(mesh, peer, number, turn, torch.empty(1, dtype=torch.int64))
    for turn in (_TURNS, _TURNS + 2, _TURNS + 4):
        size = torch.empty(1, dtype=torch.int64)
        _reply(mesh, peer, number, turn, size)
        # The peer computed it by the same rule, but it is input from a peer.
        room = min(max(int(size), 1), _LARGEST)
        _reply(mesh, peer, number, turn + 1, torch.empty(room, dtype=torch.uint8))


def _reply(mesh: Mesh, peer: int, number: int, turn: int, into: torch.Tensor) -> None:
    mesh.recv(peer, _tag(number, turn), into).wait()
    back = torch.zeros(1, dtype=torch.int64)
    mesh.send(peer, _tag(number, turn), back).wait()
