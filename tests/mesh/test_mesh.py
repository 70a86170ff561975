"""Point to point, over both meshes: tags meet in any order, memory stays bounded, waits have
deadlines."""

from __future__ import annotations

import threading

import pytest
import torch

from smolrun.collectives.api import new_group
from smolrun.errors import MeshClosed, PeerLost, SmolrunError, WaitTimeout
from smolrun.mesh.link import Pipe
from smolrun.mesh.mesh import Mesh
from smolrun.testing import FaultyPipe, run_ranks
from smolrun.wire.frame import EAGER_BYTES, FrameKind, Tag
from tests.waiting import until

KINDS = pytest.mark.parametrize("kind", ["memory", "tcp", "tls"])
SOCKETS = pytest.mark.parametrize("kind", ["tcp", "tls"])
SMALL, LARGE = EAGER_BYTES // 4, EAGER_BYTES  # float32 elements


@KINDS
def test_sends_and_receives_match_by_tag_in_any_order(kind: str) -> None:
    tags = [Tag(7, operation, hop) for operation in range(3) for hop in range(4)]

    def rank_main(mesh: Mesh) -> None:
        other = 1 - mesh.rank
        sends = [
            mesh.send(
                other,
                tag,
                torch.full((SMALL if tag.hop % 2 else LARGE,), float(tag.operation * 10 + tag.hop)),
            )
            for tag in tags
        ]
        for tag in reversed(tags):
            into = torch.empty(SMALL if tag.hop % 2 else LARGE)
            mesh.recv(other, tag, into).wait()
            assert bool((into == tag.operation * 10 + tag.hop).all())
        for work in sends:
            work.wait()

    run_ranks(2, rank_main, kind=kind)


@KINDS
def test_shapes_and_dtypes_are_preserved(kind: str) -> None:
    def rank_main(mesh: Mesh) -> None:
        for number, dtype in enumerate(
            [torch.float64, torch.bfloat16, torch.int64, torch.int8, torch.bool]
        ):
            sent = torch.arange(12).reshape(3, 4).to(dtype)
            tag = Tag(1, number, 0)
            if mesh.rank == 0:
                mesh.send(1, tag, sent).wait()
            else:
                into = torch.zeros(3, 4, dtype=dtype)
                mesh.recv(0, tag, into).wait()
                assert torch.equal(into, sent)

    run_ranks(2, rank_main, kind=kind)


@KINDS
def test_a_wait_has_a_deadline_and_names_the_peer(kind: str) -> None:
    def rank_main(mesh: Mesh) -> None:
        if mesh.rank == 0:
            with pytest.raises(WaitTimeout, match=r"receive from rank 1: not done after 0\.2 s"):
                mesh.recv(1, Tag(1, 0, 0), torch.empty(1)).wait(0.2)
        # Posted before the send: rank 1 may leave as soon as it has that.
        received = mesh.recv(1 - mesh.rank, Tag(2, 0, 0), torch.ones(1))
        mesh.send(1 - mesh.rank, Tag(2, 0, 0), torch.ones(1)).wait()
        received.wait()

    run_ranks(2, rank_main, kind=kind)


@SOCKETS
@pytest.mark.parametrize("size", [SMALL // 4, LARGE * 4])
def test_a_rank_that_does_not_take_part_is_named_by_all_that_wait(kind: str, size: int) -> None:
    is_over, second = threading.Event(), threading.Event()

    def rank_main(mesh: Mesh) -> int | None:
        if mesh.rank == 1:  # alive: it still sends heartbeats
            assert is_over.wait(20)
            return None
        mesh.timeout_s = 0.5
        with pytest.raises(WaitTimeout) as caught:
            new_group(mesh).all_reduce(torch.ones(size))
        if mesh.rank == 0:
            assert second.wait(20)
            is_over.set()
        else:
            second.set()
            assert is_over.wait(20)  # who leaves sooner is lost, and named instead
        return caught.value.rank

    assert run_ranks(3, rank_main, kind=kind) == [1, None, 1]


@SOCKETS
def test_a_peer_that_breaks_the_protocol_is_lost(kind: str) -> None:
    def rank_main(mesh: Mesh) -> bool:
        if mesh.rank == 1:
            mesh.post(lambda: mesh._peers[0].send_control(FrameKind.SLICE))  # type: ignore[attr-defined]
        with pytest.raises(PeerLost) as caught:
            mesh.recv(1 - mesh.rank, Tag(1, 0, 0), torch.empty(1)).wait(20)
        return caught.value.broke_protocol

    assert run_ranks(2, rank_main, kind=kind) == [True, False]


@KINDS
def test_closing_fails_what_is_pending(kind: str) -> None:
    def rank_main(mesh: Mesh) -> None:
        work = mesh.recv(1 - mesh.rank, Tag(1, 0, 0), torch.empty(1))
        mesh.close()
        with pytest.raises((MeshClosed, PeerLost)):
            work.wait(20)
        mesh.close()

    run_ranks(2, rank_main, kind=kind)


@SOCKETS
def test_no_large_tensor_is_sent_before_its_receive_is_posted(kind: str) -> None:
    def rank_main(mesh: Mesh) -> int:
        if mesh.rank == 0:
            work = mesh.send(1, Tag(1, 0, 0), torch.ones(LARGE * 16))
            with pytest.raises(WaitTimeout):
                work.wait(0.3)
            sent = mesh.bytes_sent
            mesh.send(1, Tag(2, 0, 0), torch.ones(1)).wait()
            work.wait()
            return sent
        mesh.recv(0, Tag(2, 0, 0), torch.empty(1)).wait()
        mesh.recv(0, Tag(1, 0, 0), torch.empty(LARGE * 16)).wait()
        return 0

    assert run_ranks(2, rank_main, kind=kind)[0] < EAGER_BYTES


@SOCKETS
def test_unexpected_small_tensors_are_bounded(kind: str) -> None:
    def rank_main(mesh: Mesh) -> str:
        if mesh.rank == 1:
            with pytest.raises(SmolrunError) as caught:
                mesh.recv(0, Tag(9, 0, 0), torch.empty(1)).wait()
            return str(caught.value)
        works = [mesh.send(1, Tag(1, number, 0), torch.ones(SMALL)) for number in range(1100)]
        with pytest.raises(SmolrunError):
            for work in works:
                work.wait()
            mesh.recv(1, Tag(9, 0, 0), torch.empty(1)).wait()
        return ""

    assert "have no receive" in run_ranks(2, rank_main, kind=kind)[1]


@SOCKETS
def test_a_tensor_can_be_received_after_its_sender_has_left(kind: str) -> None:
    def rank_main(mesh: Mesh) -> None:
        if mesh.rank == 0:
            mesh.send(1, Tag(1, 0, 0), torch.ones(4)).wait()
            return  # closes the mesh
        until(lambda: mesh._peers[0].has_left)  # type: ignore[attr-defined]
        into = torch.zeros(4)
        mesh.recv(0, Tag(1, 0, 0), into).wait()
        assert bool((into == 1).all())
        with pytest.raises(PeerLost, match="lost rank 0: it left the run"):
            mesh.recv(0, Tag(2, 0, 0), into).wait()

    run_ranks(2, rank_main, kind=kind)


def test_heartbeats_carry_the_progress() -> None:
    def rank_main(mesh: Mesh) -> int:
        mesh.progress = 10 + mesh.rank
        until(lambda: mesh.peer_progress(1 - mesh.rank) > 0)
        heard = mesh.peer_progress(1 - mesh.rank)
        sent = mesh.send(1 - mesh.rank, Tag(2, 0, 0), torch.ones(1))
        mesh.recv(1 - mesh.rank, Tag(2, 0, 0), torch.ones(1)).wait()
        sent.wait()
        return heard

    assert run_ranks(2, rank_main, kind="tcp") == [11, 10]


@KINDS
def test_a_lost_rank_fails_everything_on_the_others(kind: str) -> None:
    def rank_main(mesh: Mesh) -> str:
        if mesh.rank == 1:
            if kind == "memory":
                mesh._world.lose(1)  # type: ignore[attr-defined]
            else:
                mesh.post(lambda: [peer.close() for peer in mesh._peers.values()])  # type: ignore[attr-defined,func-returns-value]
            return "lost rank 1"
        works = [mesh.recv(1, Tag(1, n, 0), torch.empty(4)) for n in range(3)]
        for work in works:
            with pytest.raises(PeerLost) as caught:
                work.wait()
        with pytest.raises(PeerLost):
            mesh.send(2 - mesh.rank, Tag(5, 0, 0), torch.ones(1)).wait()
        return str(caught.value)

    assert all("lost rank 1" in said for said in run_ranks(3, rank_main, kind=kind))


@SOCKETS
def test_survivors_of_a_lost_rank_keep_their_io_thread(kind: str) -> None:
    def rank_main(mesh: Mesh) -> None:
        collectives = new_group(mesh)
        works = [collectives.all_reduce(torch.ones(400_000), async_op=True) for _ in range(6)]
        if mesh.rank == 1:
            works[0].wait()
            for peer in mesh._peers.values():  # type: ignore[attr-defined]
                mesh.post(peer.close)
            return
        with pytest.raises(PeerLost):
            for work in works:
                work.wait(20)
            collectives.barrier()
        with pytest.raises(PeerLost):
            collectives.all_reduce(torch.ones(3))  # at once, not after a deadline

    run_ranks(3, rank_main, kind=kind)


def test_work_posted_after_the_end_fails_at_once() -> None:
    def rank_main(mesh: Mesh) -> None:
        mesh.close()
        with pytest.raises(MeshClosed):
            mesh.recv(1 - mesh.rank, Tag(1, 0, 0), torch.empty(1)).wait(20)

    run_ranks(2, rank_main, kind="tcp")


@SOCKETS
def test_a_large_send_to_a_peer_that_leaves_fails(kind: str) -> None:
    def rank_main(mesh: Mesh) -> None:
        if mesh.rank == 0:
            work = mesh.send(1, Tag(1, 0, 0), torch.ones(16_000_000))
            with pytest.raises(PeerLost, match="lost rank 1"):
                work.wait(20)
        else:
            mesh.recv(0, Tag(1, 0, 0), torch.empty(16_000_000))  # grants it, and goes

    run_ranks(2, rank_main, kind=kind)


@pytest.mark.parametrize("is_posted_first", [True, False])
def test_an_empty_tensor_where_another_is_expected_is_an_error(is_posted_first: bool) -> None:
    def rank_main(mesh: Mesh) -> str:
        ready, tag = Tag(2, 0, 0), Tag(1, 0, 0)
        if mesh.rank == 0:
            if is_posted_first:
                mesh.recv(1, ready, torch.empty(1)).wait()
            mesh.send(1, tag, torch.ones(0)).wait()
            with pytest.raises(SmolrunError):
                mesh.send(1, ready, torch.ones(1)).wait()
                mesh.recv(1, Tag(3, 0, 0), torch.empty(1)).wait()
            return ""
        if is_posted_first:
            work = mesh.recv(0, tag, torch.empty(4))
            mesh.send(0, ready, torch.ones(1))
        else:
            mesh.recv(0, ready, torch.empty(1)).wait()
            work = mesh.recv(0, tag, torch.empty(4))
        with pytest.raises(SmolrunError) as caught:
            work.wait(20)
        return str(caught.value)

    assert "different operations" in run_ranks(2, rank_main, kind="tcp")[1]


def test_a_peer_that_does_not_exist_is_refused_at_the_call() -> None:
    def rank_main(mesh: Mesh) -> None:
        for peer in (mesh.rank, 7, -1):
            with pytest.raises(SmolrunError, match="has no peer"):
                mesh.send(peer, Tag(1, 0, 0), torch.ones(1))

    run_ranks(2, rank_main, kind="tcp")


@SOCKETS
@pytest.mark.parametrize("piece_bytes", [None, 1, 1000])
def test_tensors_of_any_size_arrive_in_pieces_of_any_size(
    kind: str, piece_bytes: int | None
) -> None:
    """A pipe that moves a few bytes at a time, as a slow link does."""
    most = 2_000 if piece_bytes == 1 else 3_000_000
    sizes = [size for size in (0, 1, 100, 16_384, 16_385, most) if size <= most]

    def rank_main(mesh: Mesh) -> None:
        other = 1 - mesh.rank
        for number, size in enumerate(sizes):
            into = torch.zeros(size)
            work = mesh.recv(other, Tag(1, number, 0), into)
            mesh.send(other, Tag(1, number, 0), torch.arange(size) + float(other)).wait()
            work.wait()
            assert torch.equal(into, torch.arange(size) + float(mesh.rank))

    run_ranks(
        2,
        rank_main,
        kind=kind,
        wrap=lambda _: lambda pipe, *_: FaultyPipe(pipe, piece_bytes=piece_bytes),
    )


@SOCKETS
@pytest.mark.parametrize(
    ("channel", "fault"), [("down", {"cut_after": 3_000_000}), ("control", {"silent_after": 1500})]
)
def test_a_cut_and_a_silence_are_detected(kind: str, channel: str, fault: dict[str, int]) -> None:
    def wrap(pipe: Pipe, _: int, name: str) -> Pipe:
        return FaultyPipe(pipe, **fault) if name == channel else pipe  # type: ignore[arg-type]

    def rank_main(mesh: Mesh) -> None:
        collectives = new_group(mesh)
        with pytest.raises(PeerLost):
            while True:
                collectives.all_reduce(torch.ones(400_000))

    run_ranks(2, rank_main, kind=kind, silence_s=0.5, timeout_s=10.0, wrap=lambda _: wrap)
