"""Frames of an earlier generation are dropped and counted; invalid frames break the link."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from smolrun.collectives.api import new_group
from smolrun.mesh.io import IoThread
from smolrun.mesh.link import PlainPipe
from smolrun.mesh.mesh import Mesh, PostedReceive
from smolrun.mesh.peer import Peer, PeerEvents
from smolrun.mesh.streams import Fingerprints
from smolrun.testing import run_ranks
from smolrun.wire.frame import FrameKind, Tag
from smolrun.wire.handshake import CHANNELS
from smolrun.wire.tensor import payload_of
from tests.waiting import until


@contextmanager
def two_peers(generations: tuple[int, int]) -> Iterator[tuple[IoThread, list[Peer], list[str]]]:
    """Rank 0's view of rank 1 and the other way round, over socket pairs, in one I/O thread."""
    io = IoThread("test-io", lambda error: lost.append(f"io: {error}"))
    pairs = {channel: socket.socketpair() for channel in CHANNELS}
    lost: list[str] = []
    events = PeerEvents(
        on_lost=lambda rank, reason: lost.append(f"{rank}: {reason}"),
        on_reported=lambda teller, rank: lost.append(f"{teller} lost {rank}"),
    )
    peers: list[Peer] = []

    def build() -> None:
        for me in (0, 1):
            pipes = {channel: PlainPipe(pair[me]) for channel, pair in pairs.items()}
            peers.append(Peer(io, me, 1 - me, generations[me], pipes, events, Fingerprints()))  # type: ignore[arg-type]

    io.start()
    run_on(io, build)
    try:
        yield io, peers, lost
    finally:
        run_on(io, lambda: [peer.close() for peer in peers])
        io.stop()


def run_on(io: IoThread, function: object) -> None:
    done = threading.Event()

    def call() -> None:
        function()  # type: ignore[operator]
        done.set()

    io.post(call)
    assert done.wait(20)


def test_frames_of_an_old_generation_are_dropped_and_counted() -> None:
    small, large, tag = torch.zeros(4), payload_of(torch.ones(100_000)), Tag(1, 0, 0)
    came: list[str] = []
    with two_peers((0, 1)) as (io, (old, new), _):
        receive = PostedReceive(payload_of(small), lambda: came.append("x"))
        run_on(io, lambda: new.post_recv(tag, receive))
        run_on(io, lambda: old.send_control(FrameKind.HEARTBEAT, 7))
        run_on(io, lambda: old.post_send(tag, payload_of(torch.ones(4)), lambda: None))
        header = old._header(FrameKind.SLICE, tag, large)._replace(shape=(), nbytes=4096)
        run_on(io, lambda: old.outgoing.send(header, large.data[:4096]))
        until(lambda: new.dropped_frames == 3)
    assert not small.any()
    assert not came
    assert new.progress == 0


def test_a_frame_of_a_later_generation_breaks_the_link() -> None:
    with two_peers((0, 1)) as (io, (_, new), lost):
        run_on(io, lambda: new.send_control(FrameKind.HEARTBEAT))
        until(lambda: bool(lost))
    assert "frame of generation 1 in generation 0" in lost[0]


def test_a_frame_with_another_sender_breaks_the_link() -> None:
    with two_peers((0, 0)) as (io, (zero, _), lost):
        zero._me = 5
        run_on(io, lambda: zero.send_control(FrameKind.HEARTBEAT))
        until(lambda: bool(lost))
    assert "with rank 5 as its sender" in lost[0]


def test_a_slice_that_was_not_granted_breaks_the_link() -> None:
    with two_peers((0, 0)) as (io, (zero, _), lost):
        big, tag = payload_of(torch.ones(100_000)), Tag(1, 0, 0)
        header = zero._header(FrameKind.SLICE, tag, big)._replace(shape=(), nbytes=4096)
        run_on(io, lambda: zero.outgoing.send(header, big.data[:4096]))
        until(lambda: bool(lost))
    assert "never granted" in lost[0]


def test_a_system_without_sendmsg_sends_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    tuned = PlainPipe.__init__

    def without_sendmsg(pipe: PlainPipe, sock: socket.socket) -> None:
        tuned(pipe, sock)
        pipe._can_gather = False  # as on Windows

    monkeypatch.setattr(PlainPipe, "__init__", without_sendmsg)

    def rank_main(mesh: Mesh) -> torch.Tensor:
        tensor = torch.arange(300_000.0) + mesh.rank
        new_group(mesh).all_reduce(tensor)
        return tensor

    for tensor in run_ranks(2, rank_main, kind="tcp"):
        assert torch.equal(tensor, 2 * torch.arange(300_000.0) + 1)
