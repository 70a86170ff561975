"""A mesh that continues when a peer is lost, and its listener: real sockets, plain and TLS."""

from __future__ import annotations

import gc
import threading

import psutil
import pytest
import torch

from smolrun.collectives.api import new_group
from smolrun.errors import MeshClosed, PeerLost, WaitTimeout
from smolrun.mesh.mesh import Mesh, Work
from smolrun.mesh.streams import stream_of
from smolrun.testing import run_ranks
from smolrun.wire.frame import Tag
from smolrun.wire.tensor import payload_of
from tests.mesh.star import LARGE, SMALL, die, exchange, fall_silent, star
from tests.waiting import until

SOCKETS = pytest.mark.parametrize("kind", ["tcp", "tls"])


@SOCKETS
def test_ranks_join_late_one_by_one(kind: str) -> None:
    with star(4, kind) as made:
        assert made.server.present == frozenset()
        for rank in (2, 1, 3):
            exchange(made.server, made.join(rank))
        assert made.server.present == {1, 2, 3}
        assert made.guests[0].present == {0}
        assert made.news == [(2, True, "joined"), (1, True, "joined"), (3, True, "joined")]


@SOCKETS
def test_the_loss_of_a_peer_fails_the_work_with_it_and_nothing_else(kind: str) -> None:
    with star(3, kind) as made:
        one, two = made.join(1), made.join(2)
        lost = [
            made.server.recv(1, Tag(1, 0, 0), torch.empty(4)),
            made.server.recv(1, Tag(1, 1, 0), torch.empty(LARGE)),
            made.server.send(1, Tag(1, 2, 0), torch.ones(LARGE)),
        ]
        kept = made.server.recv(2, Tag(1, 0, 0), torch.empty(LARGE))
        die(one)
        for work in lost:
            with pytest.raises(PeerLost, match="lost rank 1") as caught:
                work.wait(20)
            assert caught.value.rank == 1
            assert work.error is caught.value
        two.send(0, Tag(1, 0, 0), torch.ones(LARGE)).wait(20)
        kept.wait(20)
        assert kept.error is None
        assert made.server.failure is None
        assert made.server.present == {2}
        assert [news[:2] for news in made.news] == [(1, True), (2, True), (1, False)]
        exchange(made.server, two, 7)
        for post in (made.server.send, made.server.recv):
            with pytest.raises(PeerLost, match="lost rank 1: it is not connected"):
                post(1, Tag(2, 0, 0), torch.ones(1)).wait(20)
        assert made.server.failure is None


@SOCKETS
def test_a_rank_that_rejoins_starts_with_fresh_tags(kind: str) -> None:
    with star(3, kind) as made:
        first, other = made.join(1), made.join(2)
        for number in range(3):
            # An unexpected tensor and a grant without a tensor: both must be forgotten.
            first.send(0, Tag(1, number, 0), torch.full((SMALL,), 99.0)).wait(20)
            first.recv(0, Tag(1, number, 0), torch.empty(LARGE))
        until(lambda: len(made.server._peers[1]._grants) == 3)
        sent, received = made.server.bytes_sent, made.server.bytes_received
        die(first)
        until(lambda: 1 not in made.server.present)
        again = made.join(1)
        for number in range(3):
            exchange(made.server, again, number, SMALL)
        exchange(made.server, again, 3)
        exchange(made.server, other)
        assert made.news[3:] == [(1, True, "rejoined")]
        assert made.server.bytes_sent > sent and made.server.bytes_received > received


@SOCKETS
def test_work_for_an_earlier_link_is_not_sent_over_the_next(kind: str) -> None:
    with star(2, kind) as made:
        first = made.join(1)
        until(lambda: 1 in made.server.present)
        link = made.server.link_with(1)
        made.server.send(1, Tag(1, 0, 0), torch.ones(SMALL), link=link).wait(20)
        die(first)
        until(lambda: 1 not in made.server.present)
        again = made.join(1)
        until(lambda: 1 in made.server.present)
        for post in (made.server.send, made.server.recv):
            with pytest.raises(PeerLost, match="it has rejoined since"):
                post(1, Tag(1, 1, 0), torch.ones(SMALL), link=link).wait(20)
        now = made.server.link_with(1)
        made.server.send(1, Tag(1, 1, 0), torch.full((SMALL,), 7.0), link=now)
        into = torch.zeros(SMALL)
        again.recv(0, Tag(1, 1, 0), into).wait(20)
        assert bool((into == 7).all())


@SOCKETS
def test_goodbye_is_reported_as_left_and_earlier_tensors_can_be_received(kind: str) -> None:
    with star(2, kind) as made:
        guest = made.join(1)
        guest.send(0, Tag(1, 0, 0), torch.ones(4)).wait(20)
        guest.close()
        until(lambda: made.news[-1] == (1, False, "left"))
        into = torch.zeros(4)
        made.server.recv(1, Tag(1, 0, 0), into).wait(20)
        assert bool((into == 1).all())
        with pytest.raises(PeerLost):
            made.server.recv(1, Tag(1, 1, 0), into).wait(20)
        exchange(made.server, made.join(1))


def test_a_silent_peer_is_lost_and_may_rejoin_while_another_is_served() -> None:
    with star(3, silence_s=2.0) as made:
        frozen, other = made.join(1), made.join(2)
        work = made.server.recv(1, Tag(1, 0, 0), torch.empty(4))
        fall_silent(frozen)
        with pytest.raises(PeerLost, match="silent for"):
            work.wait(20)
        exchange(made.server, other)
        exchange(made.server, made.join(1))


def test_a_second_link_of_a_rank_waits_until_the_first_is_dead() -> None:
    """A link that is not silent is not replaced; one that was cut off without GOODBYE is, by the
    rank's next process, long before the silence limit."""
    with star(2) as made:
        first = made.join(1)
        with pytest.raises(WaitTimeout, match="no link to rank 0"):
            made.join(1, start_timeout_s=0.5)
        exchange(made.server, first)
        assert made.news == [(1, True, "joined")]
        fall_silent(first)
        exchange(made.server, made.join(1))
        assert made.news[1:] == [(1, False, "it rejoined"), (1, True, "rejoined")]


def test_a_collective_fails_with_the_first_loss_and_the_mesh_continues() -> None:
    with star(2) as made:
        guest = made.join(1)
        work = new_group(made.server, [0, 1]).all_reduce(torch.ones(400_000), async_op=True)
        die(guest)
        with pytest.raises(PeerLost):
            work.wait(20)
        with pytest.raises(PeerLost):
            new_group(made.server, [0, 1], name="again").barrier()
        again = made.join(1)
        works = [
            new_group(mesh, [0, 1], name="anew").all_reduce(torch.ones(9), async_op=True)
            for mesh in (made.server, again)
        ]
        for work in works:
            work.wait(20)
        assert made.server.failure is None


@SOCKETS
def test_a_peer_that_breaks_the_protocol_is_lost_alone(kind: str) -> None:
    with star(3, kind) as made:
        bad, good = made.join(1), made.join(2)
        bad.send(0, Tag(1, 0, 0), torch.ones(3)).wait(20)
        until(lambda: made.server._peers[1].receives.has_unexpected(Tag(1, 0, 0)))
        with pytest.raises(PeerLost, match="different operations"):
            made.server.recv(1, Tag(1, 0, 0), torch.ones(4)).wait(20)
        bad_again = made.join(1)
        work = made.server.recv(1, Tag(1, 0, 0), torch.ones(4))
        bad_again.send(0, Tag(1, 0, 0), torch.ones(3))
        with pytest.raises(PeerLost, match="different operations"):
            work.wait(20)
        exchange(made.server, good)


def test_a_peer_that_sends_to_a_group_of_others_is_lost_alone() -> None:
    """It says ahead of time that the next operation of the server's own group is another one."""
    with star(3) as made:
        bad, good = made.join(1), made.join(2)
        alone = new_group(made.server, [0])
        alone.barrier()
        tag = Tag(stream_of(alone.name), 1, 0)

        def claim(work: Work) -> None:
            bad.begin_operation(tag, 12345)
            bad.post_send(0, tag, payload_of(torch.ones(3)), lambda: bad.finish(work))

        bad.submit("claim", claim, 0).wait(20)
        until(lambda: made.server._peers[1].receives.has_unexpected(tag))
        alone.barrier()
        until(lambda: made.news[-1][:2] == (1, False))
        assert "rank 0 runs barrier of group 'ranks [0]'" in made.news[-1][2]
        assert made.server.present == {2}
        alone.barrier()
        exchange(made.server, good)
        assert made.server.failure is None


@pytest.mark.parametrize("kind", ["memory", "tcp"])
def test_a_done_callback_runs_once_on_the_io_thread_however_the_work_ends(kind: str) -> None:
    def rank_main(mesh: Mesh) -> None:
        heard: list[tuple[str, BaseException | None, str]] = []

        def note(work: Work) -> None:
            heard.append((work.label, work.error, threading.current_thread().name))

        tag, other = Tag(1, 0, 0), 1 - mesh.rank
        works = [mesh.recv(other, tag, torch.empty(1)), mesh.send(other, tag, torch.ones(1))]
        for work in works:
            work.add_done_callback(note)
            work.wait(20)
        works[0].add_done_callback(note)  # it is over
        until(lambda: len(heard) == 3)
        assert {error for _, error, _ in heard} == {None}
        failing = mesh.recv(other, Tag(2, 0, 0), torch.empty(1))
        failing.add_done_callback(note)
        mesh.close()
        until(lambda: len(heard) == 4)
        assert isinstance(heard[3][1], MeshClosed | PeerLost)
        assert all(name.startswith("mesh-") for _, _, name in heard[:3])

    run_ranks(2, rank_main, kind=kind)


def test_a_done_callback_may_post_more_work() -> None:
    """What a server does: answer a push as soon as it has come."""
    with star(2) as made:
        guest = made.join(1)
        came = torch.zeros(4)

        def answer(work: Work) -> None:
            made.server.send(1, Tag(2, 0, 0), came + 1)

        made.server.recv(1, Tag(1, 0, 0), came).add_done_callback(answer)
        into = torch.zeros(4)
        work = guest.recv(0, Tag(2, 0, 0), into)
        guest.send(0, Tag(1, 0, 0), torch.full((4,), 41.0))
        work.wait(20)
        assert bool((into == 42).all())


def test_no_resources_are_left_when_ranks_have_joined_and_left() -> None:
    this = psutil.Process()

    def held() -> int:
        gc.collect()
        return this.num_fds() if hasattr(this, "num_fds") else len(this.net_connections())

    threads, before = threading.active_count(), held()
    with star(2, "tls") as made:
        guests = []
        for number in range(5):
            guest = made.join(1)
            exchange(made.server, guest, number)
            die(guest) if number % 2 else guest.close()
            until(lambda: 1 not in made.server.present)
            guests.append(guest)
        for guest in guests:
            guest.close()
        # The listening socket, the selector and its wake-up pair are the server's own.
        until(lambda: held() <= before + 4)
    until(lambda: held() <= before)
    until(lambda: threading.active_count() <= threads)


@pytest.mark.parametrize("kind", ["memory", "tcp", "tls"])
def test_a_star_by_run_ranks(kind: str) -> None:
    def rank_main(mesh: Mesh) -> frozenset[int]:
        until(lambda: len(mesh.present) == (2 if mesh.rank == 0 else 1))
        present = mesh.present
        works = [mesh.send(other, Tag(1, 0, 0), torch.ones(1)) for other in present]
        works += [mesh.recv(other, Tag(1, 0, 0), torch.ones(1)) for other in present]
        for work in works:
            work.wait()
        return present

    assert run_ranks(3, rank_main, kind=kind, elastic=True) == [{1, 2}, {0}, {0}]
