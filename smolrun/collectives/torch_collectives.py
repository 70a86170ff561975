"""Collectives by torch.distributed's own operations, over the process groups of a TorchMesh.

Two differ from the call of that name. A reduce_scatter is an all_to_all and a sum in rank order:
gloo's own moves the bytes of a whole all_reduce. An all_gather of uneven shards is an all_to_all,
since torch's takes shards of one size only.

Torch does not check that ranks run the same operations. Every rank keeps a running CRC-32 of its
own; it travels with each small all_gather, of which every training step has one."""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from smolrun.collectives.chain import Chain, Phase
from smolrun.collectives.schedule import even_ranges
from smolrun.errors import CollectiveMismatch, SmolrunError
from smolrun.mesh.mesh import Mesh, Work
from smolrun.mesh.streams import DEFAULT_GROUP
from smolrun.mesh.torch_mesh import ProcessGroup, TorchMesh, TorchWork

_OPS = {
    "sum": dist.ReduceOp.SUM,
    "mean": dist.ReduceOp.SUM,
    "max": dist.ReduceOp.MAX,
    "min": dist.ReduceOp.MIN,
}
_CHECKED_BYTES = 64 * 1024  # of an all_gather that carries the check
_CRC_BYTES = 4


class TorchCollectives:
    """Implements `Collectives` (api.py). All ranks end with the same bytes: gloo sums each element
    on one rank and copies it to the others."""

    def __init__(
        self, mesh: TorchMesh, ranks: Sequence[int] | None = None, *, name: str | None = None
    ) -> None:
        """Blocks until all `ranks` have made the group."""
        self.mesh: Mesh = mesh
        self.ranks = list(mesh.members) if ranks is None else list(ranks)
        self.size = len(self.ranks)
        self.index = self.ranks.index(mesh.rank)
        self.name = name or (DEFAULT_GROUP if self.ranks == mesh.members else f"ranks {self.ranks}")
        mesh.groups.open(self.name)
        self._torch_mesh = mesh
        self._group = mesh.process_group(self.name, self.ranks)
        self._history = History()
        self._turns: _Turns | None = None

    @classmethod
    def of(cls, mesh: TorchMesh, ranks: Sequence[int] | None, name: str | None) -> TorchCollectives:
        """Of a new group; the default group is one, however often it is opened."""
        if name not in (None, DEFAULT_GROUP) or ranks not in (None, mesh.members):
            return cls(mesh, ranks, name=name)
        if mesh.world is None:
            mesh.world = cls(mesh)
        world: TorchCollectives = mesh.world
        return world

    def fingerprint(self, what: str, hint: str = "") -> int:
        """Becomes a part of the running CRC when an all_gather is given it."""
        self._history.hints.append(hint)
        return zlib.crc32(f"{what} of group {self.name!r}".encode())

    def all_reduce(self, tensor: Tensor, op: str = "sum", *, async_op: bool = False) -> Work:
        """SmolrunError for another `op`, or the mean of integers."""
        if op not in _OPS:
            raise SmolrunError(f"all_reduce knows {', '.join(_OPS)}, not {op!r}")
        if op == "mean" and not tensor.is_floating_point():
            raise SmolrunError(f"all_reduce cannot take the mean of {tensor.dtype}")
        flat, options = tensor.detach().view(-1), dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp(_OPS[op])

        def divide() -> None:
            if op == "mean":
                flat.div_(self.size)

        self._count(2 * flat.nbytes * (self.size - 1) // self.size)
        return self._run(
            f"all_reduce {op} of {flat.numel()}",
            lambda: self._group.allreduce([flat], options),
            async_op,
            divide,
        )

    def reduce_scatter(
        self,
        output: Tensor,
        tensor: Tensor,
        sizes: Sequence[int] | None = None,
        *,
        async_op: bool = False,
    ) -> Work:
        """Sums on the mesh's thread, in the tensor's dtype; `tensor` stays as it was."""
        sizes = self._sizes("reduce_scatter", tensor, sizes)
        own, flat = sizes[self.index], tensor.detach().view(-1)
        _check_size("reduce_scatter", output.numel(), own)
        arrived = torch.empty(self.size * own, dtype=tensor.dtype)

        def add_up() -> None:
            rows = arrived.view(self.size, own)
            torch.sum(rows, 0, dtype=tensor.dtype, out=output.detach().view(-1))

        what = f"reduce_scatter of {sizes}"
        return self._exchange(what, arrived, flat, [own] * self.size, sizes, async_op, add_up)

    def all_gather(
        self,
        output: Tensor,
        shard: Tensor,
        sizes: Sequence[int] | None = None,
        *,
        fingerprint: int | None = None,
        async_op: bool = False,
    ) -> Work:
        """A small one of even shards carries the check of what ranks run."""
        sizes = self._sizes("all_gather", output, sizes)
        _check_size("all_gather", shard.numel(), sizes[self.index])
        into, own = output.detach().view(-1), shard.detach().reshape(-1)
        what = f"all_gather of {sizes} {fingerprint or ''}"
        is_even = len(set(sizes)) == 1
        if is_even and output.nbytes <= _CHECKED_BYTES:
            return self._checked_all_gather(what, into, own, async_op)
        if is_even:
            self._count(own.nbytes * (self.size - 1))
            return self._run(what, lambda: self._group._allgather_base(into, own), async_op)
        copies = own.repeat(self.size)
        return self._exchange(what, into, copies, sizes, [own.numel()] * self.size, async_op)

    def _checked_all_gather(self, what: str, into: Tensor, own: Tensor, async_op: bool) -> Work:
        """With four more bytes of each rank: its CRC of all operations up to this one."""
        crc = self._history.add(what)
        sent = torch.tensor([*crc.to_bytes(_CRC_BYTES, "little")], dtype=torch.uint8)
        row = torch.cat([own.view(torch.uint8), sent]) if own.numel() else sent
        table = torch.empty((self.size, len(row)), dtype=torch.uint8)

        def take() -> None:
            self._history.check(self.ranks, self.index, table[:, -_CRC_BYTES:].tolist(), what)
            if own.numel():
                rows = table[:, :-_CRC_BYTES].contiguous().view(-1).view(into.dtype)
                into.copy_(rows)

        self._count(len(row) * (self.size - 1))
        start = _bound(self._group._allgather_base, table.view(-1), row)
        return self._start(what, start, async_op, take)

    def broadcast(self, tensor: Tensor, root: int = 0, *, async_op: bool = False) -> Work:
        """Torch's own."""
        options, flat = dist.BroadcastOptions(), tensor.detach().view(-1)
        options.rootRank = root
        self._count(flat.nbytes if self.index == root else 0, flat.nbytes)
        return self._run(
            f"broadcast of {flat.numel()} from {root}",
            lambda: self._group.broadcast([flat], options),
            async_op,
        )

    def gather(
        self, output: Tensor | None, tensor: Tensor, root: int = 0, *, async_op: bool = False
    ) -> Work:
        """Torch's own."""
        is_root, options, flat = self.index == root, dist.GatherOptions(), tensor.detach().view(-1)
        options.rootRank = root
        rows: list[list[Tensor]] = []
        if is_root:
            if output is None:
                raise SmolrunError("the root of a gather needs an output")
            _check_size("gather", output.numel(), self.size * flat.numel())
            rows = [list(output.detach().view(self.size, -1).unbind())]
        others = flat.nbytes * (self.size - 1)
        self._count(0 if is_root else flat.nbytes, others if is_root else 0)
        return self._run(
            f"gather of {flat.numel()} to {root}",
            lambda: self._group.gather(rows, [flat], options),
            async_op,
        )

    def scatter(
        self, output: Tensor, tensor: Tensor | None, root: int = 0, *, async_op: bool = False
    ) -> Work:
        """Torch's own."""
        is_root, options, flat = self.index == root, dist.ScatterOptions(), output.detach().view(-1)
        options.rootRank = root
        rows: list[list[Tensor]] = []
        if is_root:
            if tensor is None:
                raise SmolrunError("the root of a scatter needs a tensor")
            _check_size("scatter", tensor.numel(), self.size * flat.numel())
            rows = [list(tensor.detach().view(self.size, -1).unbind())]
        others = flat.nbytes * (self.size - 1)
        self._count(others if is_root else 0, 0 if is_root else flat.nbytes)
        return self._run(
            f"scatter of {flat.numel()} from {root}",
            lambda: self._group.scatter([flat], rows, options),
            async_op,
        )

    def all_to_all(
        self,
        output: Tensor,
        tensor: Tensor,
        output_sizes: Sequence[int] | None = None,
        sizes: Sequence[int] | None = None,
        *,
        async_op: bool = False,
    ) -> Work:
        """Torch's own, in elements."""
        sends = self._sizes("all_to_all", tensor, sizes)
        receives = self._sizes("all_to_all", output, output_sizes)
        _check_size("all_to_all", sends[self.index], receives[self.index])
        into, flat = output.detach().view(-1), tensor.detach().view(-1)
        return self._exchange("all_to_all", into, flat, receives, sends, async_op)

    def barrier(self, *, async_op: bool = False) -> Work:
        """Torch's own."""
        return self._run("barrier", self._group.barrier, async_op)

    def run_chains(self, name: str, chains: Sequence[Chain], phases: int) -> Work:
        """In a process group of their own, as their exchanges come at times of their own. The first
        call blocks until all ranks have made it."""
        if self._turns is None:
            group = self._torch_mesh.process_group(f"{self.name}, chains", self.ranks)
            self._turns = _Turns(self._torch_mesh, group, self.start_phase)
        turns = self._turns
        self._history.add(f"{name} in {len(chains)} chains")
        return self._torch_mesh.submit(name, lambda work: turns.add(chains, phases, work))

    def _exchange(
        self,
        what: str,
        into: Tensor,
        flat: Tensor,
        receives: Sequence[int],
        sends: Sequence[int],
        async_op: bool,
        finish: Callable[[], None] = lambda: None,
    ) -> Work:
        self._count_exchange(into, receives, flat, sends)
        start = _bound(self._group.alltoall_base, into, flat, list(receives), list(sends))
        return self._run(what, start, async_op, finish)

    def _count_exchange(
        self, into: Tensor, receives: Sequence[int], flat: Tensor, sends: Sequence[int]
    ) -> None:
        sent = flat.nbytes - sends[self.index] * flat.itemsize
        self._count(sent, into.nbytes - receives[self.index] * into.itemsize)

    def _run(
        self,
        what: str,
        start: Callable[[], TorchWork],
        async_op: bool,
        finish: Callable[[], None] = lambda: None,
    ) -> Work:
        self._history.add(what)
        return self._start(what, start, async_op, finish)

    def _start(
        self, what: str, start: Callable[[], TorchWork], async_op: bool, finish: Callable[[], None]
    ) -> Work:
        label = f"{what.partition(' ')[0]} {self._history.count} of group {self.name!r}"
        work = self._torch_mesh.run(label, start, finish)
        if not async_op:
            work.wait()
        return work

    def _count(self, sent: int, received: int | None = None) -> None:
        self._torch_mesh.count(sent, sent if received is None else received)

    def _sizes(self, name: str, tensor: Tensor, sizes: Sequence[int] | None) -> list[int]:
        """Elements of each rank: the given sizes, which must add up, or even ones."""
        if sizes is None:
            return [stop - start for start, stop in even_ranges(tensor.numel(), self.size)]
        _check_size(name, tensor.numel(), sum(sizes))
        return list(sizes)

    def start_phase(self, group: ProcessGroup, phase: Phase) -> TorchWork:
        """Starts one exchange of a chain; on the I/O thread."""
        outgoing, sends, receives = phase.outgoing, phase.send_sizes, phase.receive_sizes
        if phase.kind == "all_gather":
            outgoing = phase.outgoing[slice(*phase.sends[self.index])].repeat(self.size)
            sends = [sends[self.index]] * self.size
        self._count_exchange(phase.incoming, receives, outgoing, sends)
        return group.alltoall_base(phase.incoming, outgoing, receives, sends)


class History:
    """What a rank has run in a group: how many operations, and a CRC-32 of all their names."""

    def __init__(self) -> None:
        self.count = self._crc = 0
        self.hints: list[str] = []

    def add(self, what: str) -> int:
        """The CRC with one more operation."""
        self.count += 1
        self._crc = zlib.crc32(what.encode(), self._crc)
        return self._crc

    def check(self, ranks: Sequence[int], own: int, found: list[list[int]], what: str) -> None:
        """CollectiveMismatch where another rank has run other operations."""
        for rank, crc in zip(ranks, found, strict=True):
            if crc != found[own]:
                first, second = sorted((rank, ranks[own]))
                hint = next((hint for hint in self.hints if hint), "")
                ours = f"operations that end with {what}"
                raise CollectiveMismatch((first, second), (ours, "others before it"), hint)


class _Turns:
    """The chains of one group: their exchanges run in an order that all ranks share, so that each
    rank's n-th is the same. A chain computes while an exchange of another one is on its way.

        turn     1        2                  3
        runs     a.0      b.0 a.1            c.0 b.1 a.end
    """

    def __init__(
        self,
        mesh: TorchMesh,
        group: ProcessGroup,
        start: Callable[[ProcessGroup, Phase], TorchWork],
    ) -> None:
        self._mesh, self._group, self._start = mesh, group, start
        # Touched on the I/O thread only.
        self._waiting: deque[_OpenChain] = deque()
        self._is_running = False

    def add(self, chains: Sequence[Chain], phases: int, work: Work) -> None:
        """Queues chains of at most `phases` exchanges; the work is done when all have ended."""
        opened = [_OpenChain(chain) for chain in chains]
        opened[-1].work = work
        turns = [(place + k, -place) for place in range(len(opened)) for k in range(phases + 1)]
        self._waiting.extend(opened[-place] for _, place in sorted(turns))
        self._advance()

    def _advance(self) -> None:
        if self._is_running:
            return
        self._is_running = True
        try:
            while self._waiting and not self._waiting[0].is_busy and self._mesh.failure is None:
                self._resume(self._waiting.popleft())
        except Exception as error:
            self._mesh.fail(error)  # the peers already wait for the other half
        self._is_running = False

    def _resume(self, opened: _OpenChain) -> None:
        phase = next(opened.chain, None)
        if phase is not None:
            opened.is_busy = True

            def done() -> None:
                opened.is_busy = False
                self._advance()

            self._mesh.watch(self._start(self._group, phase), phase.kind, done)
        elif opened.work is not None and opened not in self._waiting:
            self._mesh.finish(opened.work)


class _OpenChain:
    def __init__(self, chain: Chain) -> None:
        self.chain, self.is_busy = chain, False
        self.work: Work | None = None  # of the last one of its kind


def _bound(function: Callable[..., TorchWork], *values: object) -> Callable[[], TorchWork]:
    return lambda: function(*values)


def _check_size(name: str, have: int, want: int) -> None:
    if have != want:
        raise SmolrunError(f"{name}: a tensor has {have} elements, its sizes say {want}")
