"""all_reduce of ours beside gloo's, size by size, and beside one plain TCP stream over the link.

The first also shows where direct exchange should give way to the ring. For the second: a ring moves
2(N-1)/N times the tensor's bytes over every link, in one direction; the plain stream moves as many
from rank 0 to rank 1. So a ratio of 1 means that the link is full. Gloo joins through our mesh, so
that no port is fixed."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore  # where torch's own type stubs have it

from smolrun.benchmarks.compare import compare
from smolrun.collectives.api import Collectives
from smolrun.errors import ProtocolError

# One measurement moves about this much, so that small sizes are repeated often enough for the
# clock.
_BYTES_PER_MEASUREMENT = 100_000_000
_MOST_CALLS = 200
_ADDRESS_CHARS = 64
_PIECE_BYTES = 256 * 1024  # of the plain stream, at once


def compare_all_reduce(
    collectives: Collectives, sizes: Sequence[int], *, repeats: int, security: str
) -> Iterator[dict[str, Any]]:
    """One row per size (bytes of a float32 tensor); collective, gloo must have been joined. Rank
    0's clock counts."""
    for size in sizes:
        ours, peer = torch.zeros(size // 4), torch.zeros(size // 4)
        calls = max(1, min(_MOST_CALLS, _BYTES_PER_MEASUREMENT // (size + 100_000)))
        result = compare(
            lambda ours=ours: collectives.all_reduce(ours),  # type: ignore[misc]
            lambda peer=peer: dist.all_reduce(peer),  # type: ignore[misc]
            repeats=repeats,
            calls=calls,
            meet=collectives.barrier,
        )
        yield result.row(
            "collectives",
            "all_reduce",
            "gloo",
            world_size=collectives.size,
            bytes=size,
            security=security,
        )


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
    if collectives.index == 1:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with socket.create_server((address, 0), family=family) as listener:  # one connection only
            listener.settimeout(timeout_s)
            _share_address(collectives, 1, address, listener.getsockname()[1])
            return RawStream(listener.accept()[0], timeout_s)
    there = _share_address(collectives, 1)
    if collectives.index == 0:
        return RawStream(socket.create_connection(there, timeout_s), timeout_s)
    return None


def _share_address(
    collectives: Collectives, root: int, address: str = "", port: int = 0
) -> tuple[str, int]:
    """The address and port that rank `root` passes, on all ranks; collective."""
    numbers = torch.zeros(_ADDRESS_CHARS + 1, dtype=torch.int64)
    numbers[: len(address)] = torch.tensor(list(address.encode()), dtype=torch.int64)
    numbers[-1] = port
    collectives.broadcast(numbers, root)
    *characters, port = numbers.tolist()
    return bytes(filter(None, characters)).decode(), port


def _move(stream: RawStream | None, index: int, size: int) -> None:
    if stream is None:
        return
    if index == 0:
        stream.send(size)
    else:
        stream.receive(size)


class RawStream:
    """One plain TCP stream between two ranks, without frames, threads or encryption: what a link
    is measured against. The bytes have no meaning; `send` blocks until all have arrived."""

    def __init__(self, sock: socket.socket, timeout_s: float) -> None:
        sock.settimeout(timeout_s)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = sock
        self._memory = memoryview(bytearray(_PIECE_BYTES))

    def send(self, size: int) -> None:
        """Sends `size` bytes and blocks until the receiver has confirmed them."""
        while size > 0:
            self._socket.sendall(self._memory[: min(size, _PIECE_BYTES)])
            size -= _PIECE_BYTES
        if not self._socket.recv(1):
            raise ProtocolError("the other end of the raw stream left")

    def receive(self, size: int) -> None:
        """Receives `size` bytes and confirms them."""
        while size > 0:
            count = self._socket.recv_into(self._memory, min(size, _PIECE_BYTES))
            if count == 0:
                raise ProtocolError("the other end of the raw stream left")
            size -= count
        self._socket.sendall(b"k")

    def close(self) -> None:
        """Closes the socket."""
        self._socket.close()


def join_gloo(collectives: Collectives, address: str, timeout_s: float) -> None:
    """Starts torch.distributed with gloo on this rank; collective. `address` is this rank's own, as
    the other ranks reach it."""
    rank, world_size = collectives.index, collectives.size
    _stay_on_interface_of(address)
    timeout = timedelta(seconds=timeout_s)
    if rank == 0:
        store = TCPStore(
            address, 0, world_size, is_master=True, timeout=timeout, wait_for_workers=False
        )
        _share_address(collectives, 0, address, store.port)
    else:
        there = _share_address(collectives, 0)
        store = TCPStore(*there, world_size, is_master=False, timeout=timeout)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timeout)


def _stay_on_interface_of(address: str) -> None:
    """Gloo uses the address of the host's name, which may be that of a slower network."""
    for name, found in psutil.net_if_addrs().items():
        if any(item.address.partition("%")[0] == address for item in found):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
            return


def leave_gloo() -> None:
    """Ends torch.distributed on this rank."""
    dist.destroy_process_group()
