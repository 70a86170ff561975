"""Every collective over both meshes against a sum one can see, with bytes counted and links that
misbehave."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch

from smolrun.collectives.api import Collectives, new_group
from smolrun.collectives.scheduled_collectives import DIRECT_BYTES, ScheduledCollectives
from smolrun.errors import CollectiveMismatch, MeshClosed, PeerLost, SmolrunError
from smolrun.mesh.link import Pipe
from smolrun.mesh.mesh import Mesh
from smolrun.testing import FaultyPipe, run_ranks

KINDS = pytest.mark.parametrize("kind", ["memory", "tcp", "torch"])
CHECKED = pytest.mark.parametrize("kind", ["memory", "tcp"])  # frames carry fingerprints
WORLDS = pytest.mark.parametrize("world_size", [1, 2, 3, 4])
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32]
SIZES = [0, 1, 7, 100, DIRECT_BYTES // 4, DIRECT_BYTES // 4 + 1, 300_001]


def values(rank: int, size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return ((torch.arange(size) * 7 + rank * 3) % 11 - 5).to(dtype)


@KINDS
@WORLDS
def test_all_reduce(kind: str, world_size: int) -> None:
    def rank_main(mesh: Mesh) -> list[torch.Tensor]:
        collectives, results = new_group(mesh), []
        for size in SIZES:
            for dtype in DTYPES if size in (7, 100) else [torch.float32]:
                tensor = values(mesh.rank, size, dtype)
                collectives.all_reduce(tensor)
                results.append(tensor)
        for op in ("max", "min", "mean"):
            tensor = values(mesh.rank, 300_001, torch.float64)
            collectives.all_reduce(tensor, op)
            results.append(tensor)
        return results

    results = run_ranks(world_size, rank_main, kind=kind)
    assert all(
        torch.equal(mine, first) for mine, first in zip(results[-1], results[0], strict=True)
    )
    stack = torch.stack([values(rank, 300_001, torch.float64) for rank in range(world_size)])
    for op, tensor in zip(("amax", "amin", "mean"), results[0][-3:], strict=True):
        assert torch.allclose(tensor, getattr(stack, op)(0))
    for tensor in results[0][:-3]:
        expected = sum(values(rank, tensor.numel(), tensor.dtype) for rank in range(world_size))
        assert torch.equal(
            tensor, expected if isinstance(expected, torch.Tensor) else values(0, tensor.numel())
        )


@KINDS
@WORLDS
def test_shards_of_uneven_sizes(kind: str, world_size: int) -> None:
    sizes = [70_000 * rank + 3 for rank in range(world_size)]
    sizes[-1] = 0 if world_size > 1 else sizes[-1]
    total = sum(sizes)

    def rank_main(mesh: Mesh) -> tuple[torch.Tensor, torch.Tensor]:
        collectives = new_group(mesh)
        shard = torch.empty(sizes[mesh.rank])
        collectives.reduce_scatter(shard, values(mesh.rank, total), sizes)
        whole = torch.empty(total)
        collectives.all_gather(whole, shard, sizes)
        return shard, whole

    expected = torch.stack([values(rank, total) for rank in range(world_size)]).sum(0)
    for shard, whole in run_ranks(world_size, rank_main, kind=kind):
        assert torch.equal(whole, expected)
        assert shard.numel() in sizes


@KINDS
@WORLDS
def test_broadcast_gather_scatter_all_to_all_barrier(kind: str, world_size: int) -> None:
    def rank_main(mesh: Mesh) -> None:
        collectives, rank, n = new_group(mesh), mesh.rank, mesh.world_size
        for size in (3, 50_000):
            for root in range(n):
                tensor = values(rank, size)
                collectives.broadcast(tensor, root)
                assert torch.equal(tensor, values(root, size))
                table = torch.empty(n, size) if rank == root else None
                collectives.gather(table, values(rank, size), root)
                if table is not None:
                    assert torch.equal(table, torch.stack([values(r, size) for r in range(n)]))
                part = torch.empty(size)
                collectives.scatter(
                    part,
                    torch.stack([values(r, size) for r in range(n)]) if rank == root else None,
                    root,
                )
                assert torch.equal(part, values(rank, size))
        sends = [
            (rank + 1) * (to + 1) * 3000 for to in range(n)
        ]  # rank r sends (r+1)(t+1) * 3000 to t
        receives = [(source + 1) * (rank + 1) * 3000 for source in range(n)]
        output = torch.empty(sum(receives))
        collectives.all_to_all(output, torch.full((sum(sends),), float(rank)), receives, sends)
        assert torch.equal(
            output, torch.cat([torch.full((count,), float(r)) for r, count in enumerate(receives)])
        )
        collectives.barrier()

    run_ranks(world_size, rank_main, kind=kind)


@KINDS
def test_many_operations_in_flight_finish_in_any_order_of_waiting(kind: str) -> None:
    def rank_main(mesh: Mesh) -> list[torch.Tensor]:
        collectives = new_group(mesh)
        tensors = [values(mesh.rank + index, 1 + index * 9000) for index in range(20)]
        works = [collectives.all_reduce(tensor, async_op=True) for tensor in tensors]
        for work in reversed(works):
            work.wait()
        return tensors

    results = run_ranks(3, rank_main, kind=kind)
    for index, tensor in enumerate(results[0]):
        assert torch.equal(tensor, sum(values(rank + index, tensor.numel()) for rank in range(3)))  # type: ignore[arg-type]


def test_two_groups_used_in_different_order_on_two_ranks() -> None:
    """Rank 0 ends one before it begins the other, rank 1 begins them the other way round."""

    def rank_main(mesh: Mesh) -> list[torch.Tensor]:
        streams = [new_group(mesh), new_group(mesh, name="second")]
        tensors = [values(mesh.rank, 500_000), values(mesh.rank + 5, 500_000)]
        if mesh.rank == 0:
            for stream, tensor in zip(streams, tensors, strict=True):
                stream.all_reduce(tensor)
        else:
            works = [streams[which].all_reduce(tensors[which], async_op=True) for which in (1, 0)]
            for work in works:
                work.wait()
        return tensors

    first, second = run_ranks(2, rank_main, kind="tcp")
    for which, tensor in enumerate(first):
        assert torch.equal(tensor, second[which])
        assert torch.equal(tensor, values(5 * which, 500_000) + values(1 + 5 * which, 500_000))


def test_a_group_of_some_ranks_works_beside_the_others() -> None:
    def rank_main(mesh: Mesh) -> float:
        group = [0, 2] if mesh.rank in (0, 2) else [3, 1]
        tensor = torch.tensor([float(mesh.rank)])
        new_group(mesh, group).all_reduce(tensor)
        return tensor.item()

    assert run_ranks(4, rank_main, kind="tcp") == [2.0, 4.0, 2.0, 4.0]


@KINDS
@pytest.mark.parametrize("size", [7, 100_000])
def test_groups_that_share_ranks_run_at_one_time(kind: str, size: int) -> None:
    def rank_main(mesh: Mesh) -> list[float]:
        groups = [new_group(mesh)]
        groups += [new_group(mesh, [0, 1]) for _ in "x" if mesh.rank < 2]
        groups += [new_group(mesh, [1, 2], name="last") for _ in "x" if mesh.rank > 0]
        tensors = [torch.full((size,), 10.0**mesh.rank) for _ in groups]
        works = [g.all_reduce(t, async_op=True) for g, t in zip(groups, tensors, strict=True)]
        for work in reversed(works):
            work.wait()
        assert all((tensor == tensor[0]).all() for tensor in tensors)
        return [tensor[0].item() for tensor in tensors]

    assert run_ranks(3, rank_main, kind=kind) == [[111, 11], [111, 11, 110], [111, 110]]


def mismatches(
    world_size: int, function: Callable[[Mesh], object], kind: str
) -> list[CollectiveMismatch]:
    """Of the ranks that see it; the others, if any, may only have lost one of those."""
    errors: dict[int, SmolrunError] = {}

    def rank_main(mesh: Mesh) -> None:
        try:
            function(mesh)
        except SmolrunError as error:
            errors[mesh.rank] = error

    run_ranks(world_size, rank_main, kind=kind, timeout_s=20)
    others = [e for e in errors.values() if not isinstance(e, CollectiveMismatch)]
    assert all(isinstance(error, PeerLost | MeshClosed) for error in others), errors
    found = [error for error in errors.values() if isinstance(error, CollectiveMismatch)]
    assert found, errors
    return found


OPERATIONS: dict[str, Callable[[Collectives, int], object]] = {
    "all_reduce": lambda c, size: c.all_reduce(torch.ones(size)),
    "all_gather": lambda c, size: c.all_gather(torch.ones(c.size * size), torch.ones(size)),
    "reduce_scatter": lambda c, size: c.reduce_scatter(torch.ones(size), torch.ones(c.size * size)),
    "broadcast": lambda c, size: c.broadcast(torch.ones(size)),
    "barrier": lambda c, size: c.barrier(),
}


@CHECKED
@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("sizes", [(5, 5), (5, 40_000), (40_000, 5), (40_000, 40_000)])
def test_every_pair_of_different_operations_is_found(
    kind: str, world_size: int, sizes: tuple[int, int]
) -> None:
    """Also where one is small and the other large, so that no tensor would ever meet."""
    pairs = [pair for pair in itertools.permutations(OPERATIONS, 2) if kind == "memory"] or [
        ("all_gather", "broadcast"),
        ("broadcast", "all_gather"),
    ]
    for pair in pairs:

        def rank_main(mesh: Mesh, pair: tuple[str, str] = pair) -> None:
            collectives, is_first = new_group(mesh), mesh.rank == 0
            OPERATIONS[pair[not is_first]](collectives, sizes[not is_first])
            collectives.barrier()

        for error in mismatches(world_size, rank_main, kind):
            assert 0 in error.ranks
            assert len(set(error.operations)) == 2


ARGUMENTS: dict[str, Callable[[Collectives, int], object]] = {
    "op": lambda c, i: c.all_reduce(torch.ones(5), ("sum", "max")[i]),
    "mean": lambda c, i: c.all_reduce(torch.ones(100_000), ("sum", "mean")[i]),
    "broadcast": lambda c, i: c.broadcast(torch.ones(5), i),
    "gather": lambda c, i: c.gather(torch.ones(c.size * 5), torch.ones(5), i),
    "scatter": lambda c, i: c.scatter(torch.ones(5), torch.ones(c.size * 5), i),
}


@pytest.mark.parametrize(
    ("name", "kind"), [*((name, "memory") for name in ARGUMENTS), ("op", "tcp"), ("mean", "tcp")]
)
def test_another_op_or_root_is_found(name: str, kind: str) -> None:
    def rank_main(mesh: Mesh) -> None:
        collectives = new_group(mesh)
        ARGUMENTS[name](collectives, min(mesh.rank, 1))
        collectives.barrier()

    for error in mismatches(2, rank_main, kind):
        assert error.ranks == (0, 1)
        assert len(set(error.operations)) == 2


@CHECKED
def test_one_name_with_other_ranks_is_found(kind: str) -> None:
    def rank_main(mesh: Mesh) -> None:
        ranks = [0, 1] if mesh.rank == 0 else [0, 1, 2]
        group = new_group(mesh, ranks, name="experts") if mesh.rank < 3 else None
        if group is not None:
            group.all_reduce(torch.ones(3))

    for error in mismatches(3, rank_main, kind):
        assert 0 in error.ranks


def test_a_group_is_made_once() -> None:
    def rank_main(mesh: Mesh) -> None:
        new_group(mesh, [0])
        with pytest.raises(SmolrunError, match="another name"):
            new_group(mesh, [0])
        new_group(mesh).barrier()
        new_group(mesh).barrier()

    run_ranks(2, lambda mesh: rank_main(mesh) if mesh.rank == 0 else two_barriers(mesh))


def two_barriers(mesh: Mesh) -> None:
    new_group(mesh).barrier()
    new_group(mesh).barrier()


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_bytes_on_the_wire_are_those_of_the_ring(world_size: int) -> None:
    nbytes = 4 * 1024 * 1024

    def rank_main(mesh: Mesh) -> tuple[int, int]:
        collectives, before = new_group(mesh), (mesh.bytes_sent, mesh.bytes_received)
        collectives.barrier()  # nobody sends before all have looked
        collectives.all_reduce(torch.ones(nbytes // 4))
        collectives.barrier()
        return mesh.bytes_sent - before[0], mesh.bytes_received - before[1]

    least = 2 * (world_size - 1) / world_size * nbytes
    for sent, received in run_ranks(world_size, rank_main, kind="tcp"):
        assert least <= sent <= 1.02 * least
        assert least <= received <= 1.02 * least


def test_reduce_scatter_sends_only_what_it_must() -> None:
    def rank_main(mesh: Mesh) -> int:
        collectives, before = new_group(mesh), mesh.bytes_sent
        collectives.reduce_scatter(torch.empty(300_000), torch.ones(1_200_000))
        return mesh.bytes_sent - before

    for sent in run_ranks(4, rank_main, kind="tcp"):
        assert 3_600_000 <= sent <= 1.02 * 3_600_000


@pytest.mark.parametrize("piece", [1, 7, 1000])
def test_links_that_move_few_bytes_at_a_time(piece: int) -> None:
    size = 40_000 if piece > 7 else 2_000

    def wrap(_rank: int) -> object:
        return lambda pipe, _peer, _channel: FaultyPipe(pipe, piece_bytes=piece)

    def rank_main(mesh: Mesh) -> torch.Tensor:
        tensor = values(mesh.rank, size)
        ScheduledCollectives(mesh, direct_bytes=0).all_reduce(tensor)
        return tensor

    first, second = run_ranks(2, rank_main, kind="tcp", wrap=wrap)  # type: ignore[arg-type]
    assert torch.equal(first, second)
    assert torch.equal(first, values(0, size) + values(1, size))


def test_small_and_large_tensors_that_are_half_read_at_once_do_not_mix() -> None:
    sizes = [60_000, 5_000, 200_000, 9_000, 31_000]

    def wrap(_rank: int) -> object:
        return lambda pipe, _peer, _channel: FaultyPipe(pipe, piece_bytes=999)

    def rank_main(mesh: Mesh) -> list[torch.Tensor]:
        collectives = ScheduledCollectives(mesh, direct_bytes=0)
        tensors = [values(mesh.rank + index, size) for index, size in enumerate(sizes * 4)]
        for work in [collectives.all_reduce(tensor, async_op=True) for tensor in tensors]:
            work.wait()
        return tensors

    for result in run_ranks(3, rank_main, kind="tcp", wrap=wrap):  # type: ignore[arg-type]
        for index, tensor in enumerate(result):
            expected = torch.stack([values(r + index, tensor.numel()) for r in range(3)]).sum(0)
            assert torch.equal(tensor, expected), index


@CHECKED
@pytest.mark.parametrize("sizes", [(10, 11), (100_000, 100_001)])
def test_ranks_that_run_different_operations_get_an_error(
    kind: str, sizes: tuple[int, int]
) -> None:
    def rank_main(mesh: Mesh) -> str:
        with pytest.raises(SmolrunError) as caught:
            new_group(mesh).all_reduce(torch.ones(sizes[mesh.rank]))
        return str(caught.value)

    said = run_ranks(2, rank_main, kind=kind, timeout_s=10)
    assert any("the two ranks run different operations" in message for message in said), said


def test_wrong_sizes_and_ops_are_refused_at_the_call() -> None:
    def rank_main(mesh: Mesh) -> None:
        collectives = new_group(mesh)
        with pytest.raises(SmolrunError, match="not 'product'"):
            collectives.all_reduce(torch.ones(2), "product")
        with pytest.raises(SmolrunError, match=r"mean of torch\.int64"):
            collectives.all_reduce(torch.ones(2, dtype=torch.int64), "mean")
        with pytest.raises(SmolrunError, match="has 5 elements, its sizes say 3"):
            collectives.all_gather(torch.ones(5), torch.ones(3), [3])

    run_ranks(1, rank_main)


def test_a_cut_link_ends_every_operation() -> None:
    def wrap(rank: int) -> object:
        def faulty(pipe: Pipe, peer: int, channel: str) -> Pipe:
            is_cut = (rank, peer, channel) == (1, 0, "up")
            return FaultyPipe(pipe, cut_after=300_000 if is_cut else None)

        return faulty

    def rank_main(mesh: Mesh) -> str:
        collectives = new_group(mesh)
        works = [collectives.all_reduce(torch.ones(200_000), async_op=True) for _ in range(3)]
        reasons = []
        for work in works:
            with pytest.raises(SmolrunError) as caught:
                work.wait()
            reasons.append(str(caught.value))
        return reasons[-1]

    first, second = run_ranks(2, rank_main, kind="tcp", wrap=wrap)  # type: ignore[arg-type]
    assert "lost rank 1" in first and "lost rank 0" in second
