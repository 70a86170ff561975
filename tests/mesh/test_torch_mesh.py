"""The mesh of torch.distributed: what gloo's errors are made of, and what it does not check."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch

from smolrun.collectives.api import Collectives, new_group
from smolrun.errors import CollectiveMismatch, HandshakeError, SmolrunError, WaitTimeout
from smolrun.mesh.connect import Endpoint, RosterEntry
from smolrun.mesh.mesh import Mesh
from smolrun.mesh.torch_mesh import connect_torch, wire_tag
from smolrun.testing import run_ranks
from smolrun.wire.frame import Tag
from smolrun.wire.handshake import Identity


def errors_of(
    world_size: int, function: Callable[[Mesh], object], *, timeout_s: float
) -> list[SmolrunError | None]:
    def rank_main(mesh: Mesh) -> SmolrunError | None:
        try:
            function(mesh)
        except SmolrunError as error:
            return error
        return None

    return run_ranks(world_size, rank_main, kind="torch", timeout_s=timeout_s)


def test_tags_cross_in_any_order() -> None:
    def rank_main(mesh: Mesh) -> list[float]:
        peer = 1 - mesh.rank
        into = [torch.empty(size) for size in (3, 0, 100_000)]
        receives = [mesh.recv(peer, Tag(20, k, 1), into[k]) for k in (2, 0, 1)]
        values = [torch.full_like(one, 10.0 * mesh.rank + k) for k, one in enumerate(into)]
        sends = [mesh.send(peer, Tag(20, k, 1), values[k]) for k in (1, 2, 0)]
        for work in [*sends, *receives]:
            work.wait()
        return [one.mean().item() for one in into if one.numel()]

    assert run_ranks(2, rank_main, kind="torch") == [[10, 12], [0, 2]]


def test_a_tag_of_gloo_is_another_for_every_tag_that_can_be_pending() -> None:
    tags = [Tag(s, o, h) for s in (16, 17, 22) for o in (0, 1, 9_999) for h in (0, 1, 4095)]
    assert len({wire_tag(tag) for tag in tags}) == len(tags)
    assert all(0 <= wire_tag(tag) < 2**31 for tag in tags)
    with pytest.raises(SmolrunError, match="4096 parts"):
        wire_tag(Tag(17, 0, 4096))


DIFFERENT: dict[str, Callable[[Collectives, int], object]] = {
    "order": lambda c, i: [
        c.all_gather(torch.empty(80_000), torch.ones(40_000), fingerprint=c.fingerprint(what))
        for what in (("a", "b"), ("b", "a"))[i]
    ],
    "op": lambda c, i: c.all_reduce(torch.ones(5), ("sum", "max")[i]),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_other_operations_of_equal_shape_are_found_by_the_next_small_all_gather(name: str) -> None:
    """Torch itself exchanges the wrong tensors without a word."""

    def rank_main(mesh: Mesh) -> None:
        collectives = new_group(mesh)
        DIFFERENT[name](collectives, mesh.rank)
        collectives.all_gather(torch.empty(2), torch.ones(1))

    for error in errors_of(2, rank_main, timeout_s=20):
        assert isinstance(error, CollectiveMismatch)
        assert error.ranks == (0, 1)


def test_ranks_that_wait_in_different_operations_get_both_names() -> None:
    def rank_main(mesh: Mesh) -> None:
        collectives = new_group(mesh)
        if mesh.rank == 0:
            collectives.all_gather(torch.empty(2), torch.ones(1))
        else:
            collectives.broadcast(torch.ones(1))

    errors = errors_of(2, rank_main, timeout_s=2)
    assert any(isinstance(error, CollectiveMismatch) for error in errors), errors
    assert "all_gather" in str(errors) and "broadcast" in str(errors)


def test_a_rank_that_does_not_come_is_named_after_the_timeout() -> None:
    def rank_main(mesh: Mesh) -> None:
        collectives = new_group(mesh)
        if mesh.rank == 2:
            done.wait(60)
            return
        try:
            collectives.all_reduce(torch.ones(10))
        finally:
            arrived.append(mesh.rank)
            if len(arrived) == 2:
                done.set()

    done, arrived = threading.Event(), list[int]()
    first, second, last = errors_of(3, rank_main, timeout_s=2)
    for error in (first, second):
        assert isinstance(error, WaitTimeout), error
        assert error.rank == 2 and "rank 2 does not do its part" in str(error)
    assert last is None


def test_a_rank_of_another_configuration_is_refused() -> None:
    endpoints = [Endpoint(["127.0.0.1"]) for _ in range(2)]
    roster = [RosterEntry(r, f"host{r}", e.addresses) for r, e in enumerate(endpoints)]

    def rank_main(mesh: Mesh) -> str:
        identity = Identity(mesh.rank, 2, "run", f"hash{mesh.rank}", 0, b"")
        with pytest.raises(HandshakeError) as caught:
            connect_torch(endpoints[mesh.rank], identity, roster, start_timeout_s=20)
        return str(caught.value)

    for text in run_ranks(2, rank_main):
        assert "another run, configuration or version of torch" in text and "hash1" in text


def test_a_rank_that_never_comes_is_named() -> None:
    endpoints = [Endpoint(["127.0.0.1"]) for _ in range(2)]
    roster = [RosterEntry(r, f"host{r}", e.addresses) for r, e in enumerate(endpoints)]
    identity = Identity(0, 2, "run", "hash", 0, b"")
    with pytest.raises(WaitTimeout, match=r"rank 1 \(host1\) did not come") as caught:
        connect_torch(endpoints[0], identity, roster, start_timeout_s=1)
    assert caught.value.rank == 1
    endpoints[1].close()
