"""The elastic world of one process: the same interface as over sockets."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from smolrun.errors import PeerLost
from smolrun.mesh.memory import MemoryWorld
from smolrun.wire.frame import Tag
from tests.waiting import until

TAG = Tag(1, 0, 0)


@contextmanager
def world(size: int, *here: int) -> Iterator[MemoryWorld]:
    made = MemoryWorld(size, elastic=True, present=here)
    try:
        yield made
    finally:
        for mesh in made.meshes:
            mesh.close()
        until(lambda: not made.io._thread.is_alive())


def test_a_rank_leaves_and_rejoins_with_fresh_tags() -> None:
    with world(3, 0, 1, 2) as made:
        server, first, other = made.meshes
        news: list[tuple[int, bool, str]] = []
        server.on_membership_change(lambda *one: news.append(one))
        stale = server.send(1, TAG, torch.full((4,), 99.0))
        pending = server.recv(1, TAG, torch.empty(4))
        kept = server.recv(2, TAG, torch.empty(4))
        theirs = first.recv(0, Tag(1, 5, 0), torch.empty(4))
        made.leave(1, "it was killed")
        again = made.join(1)
        for work in (stale, pending, theirs):
            with pytest.raises(PeerLost, match="it was killed"):
                work.wait(20)
        other.send(0, TAG, torch.ones(4)).wait(20)
        kept.wait(20)
        into = torch.zeros(4)
        server.send(1, TAG, torch.ones(4))
        again.recv(0, TAG, into).wait(20)
        assert bool((into == 1).all())
        assert news == [
            (1, True, "joined"),
            (2, True, "joined"),
            (1, False, "it was killed"),
            (1, True, "joined"),
        ]
        with pytest.raises(PeerLost, match="not connected"):
            first.send(0, TAG, torch.ones(1)).wait(20)


def test_a_rank_joins_late_and_its_closing_is_reported() -> None:
    with world(3, 0) as made:
        server = made.meshes[0]
        with pytest.raises(PeerLost, match="lost rank 2: it is not connected"):
            server.send(2, TAG, torch.ones(1)).wait(20)
        late = made.join(2)
        until(lambda: server.present == {2})
        assert late.present == {0}
        work = server.recv(2, TAG, torch.empty(1))
        late.close()
        with pytest.raises(PeerLost, match="left"):
            work.wait(20)
        assert server.failure is None
