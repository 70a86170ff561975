"""Collectives over a mesh: each operation picks a schedule by numbers that all ranks share, and the
executor runs it on the I/O thread.

    tensor <= direct_bytes   direct exchange: one hop of latency, (N-1) times the bytes
    larger                   ring: 2(N-1) hops, the fewest bytes"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from smolrun.collectives.chain import Chain
from smolrun.collectives.executor import OPS, TORCH_OPS, Chains, Chunks, ScheduleRun
from smolrun.collectives.schedule import (
    Range,
    Schedule,
    direct_all_gather,
    direct_all_to_all,
    dissemination_barrier,
    even_ranges,
    ranges_of,
    ring_all_gather,
    ring_all_reduce,
    ring_reduce_scatter,
    star_gather,
    star_scatter,
    tree_broadcast,
)
from smolrun.errors import SmolrunError
from smolrun.mesh.mesh import Mesh, Work
from smolrun.mesh.streams import DEFAULT_GROUP

# Below this many bytes one direct round beats the ring's 2(N-1) hops, see task=bench
# bench=collectives.
DIRECT_BYTES = 64 * 1024


class ScheduledCollectives:
    """Implements `Collectives` (api.py) over any mesh. Sums run in a fixed order, so all ranks end
    with the same bytes.

    `direct_bytes`: the largest tensor for the direct exchange; the same on all ranks."""

    def __init__(
        self,
        mesh: Mesh,
        ranks: Sequence[int] | None = None,
        *,
        name: str | None = None,
        direct_bytes: int = DIRECT_BYTES,
    ) -> None:
        self.mesh = mesh
        self.ranks = list(mesh.members) if ranks is None else list(ranks)
        self.size = len(self.ranks)
        self.index = self.ranks.index(mesh.rank)
        self._direct_bytes = direct_bytes
        is_all = self.ranks == mesh.members
        self.name = name or (DEFAULT_GROUP if is_all else f"ranks {self.ranks}")
        self._operations = mesh.groups.open(self.name)
        self._fingerprints: dict[str, int] = {}
        self._chains = Chains(mesh, self.ranks)

    def fingerprint(self, what: str, hint: str = "") -> int:
        """CRC-32 of the name and of the group's ranks; registered with the mesh once."""
        if what not in self._fingerprints:
            group = "" if self.name == DEFAULT_GROUP else f" of group {self.name!r}"
            self._fingerprints[what] = self.mesh.fingerprints.register(
                what + group, self.ranks, hint
            )
        return self._fingerprints[what]

    def all_reduce(self, tensor: torch.Tensor, op: str = "sum", *, async_op: bool = False) -> Work:
        """Direct exchange or ring. SmolrunError for another `op`, or the mean of integers."""
        if op not in (*OPS, "mean"):
            raise SmolrunError(f"all_reduce knows {', '.join(OPS)} and mean, not {op!r}")
        if op == "mean" and not tensor.is_floating_point():
            raise SmolrunError(f"all_reduce cannot take the mean of {tensor.dtype}")
        name, fold = f"all_reduce {op}", "sum" if op == "mean" else op

        def divide() -> None:
            if op == "mean":
                tensor.detach().div_(self.size)

        if tensor.numel() * tensor.itemsize > self._direct_bytes:
            chunks = Chunks(tensor, even_ranges(tensor.numel(), self.size))
            schedule = ring_all_reduce(self.index, self.size)
            return self._run(name, schedule, chunks, chunks, async_op, op=fold, finish=divide)
        scratch = torch.empty((self.size, tensor.numel()), dtype=tensor.dtype)
        outgoing = Chunks(tensor, [(0, tensor.numel())] * self.size)
        incoming = Chunks(scratch, even_ranges(scratch.numel(), self.size))

        def add_up() -> None:
            flat = tensor.detach().reshape(-1)
            scratch[self.index] = flat
            flat.copy_(scratch[0])
            for row in scratch[1:]:
                TORCH_OPS[fold](flat, row, out=flat)
            divide()

        schedule = direct_all_gather(self.index, self.size)
        return self._run(name, schedule, outgoing, incoming, async_op, finish=add_up)

    def reduce_scatter(
        self,
        output: torch.Tensor,
        tensor: torch.Tensor,
        sizes: Sequence[int] | None = None,
        *,
        async_op: bool = False,
    ) -> Work:
        """Ring; the partial sums overwrite `tensor`."""
        ranges = self._ranges("reduce_scatter", tensor, sizes)
        start, stop = ranges[self.index]
        _check_size("reduce_scatter", output.numel(), stop - start)
        chunks = Chunks(tensor, ranges)
        schedule = ring_reduce_scatter(self.index, self.size)

        def take() -> None:
            output.detach().reshape(-1).copy_(tensor.detach().reshape(-1)[start:stop])

        return self._run("reduce_scatter", schedule, chunks, chunks, async_op, finish=take)

    def all_gather(
        self,
        output: torch.Tensor,
        shard: torch.Tensor,
        sizes: Sequence[int] | None = None,
        *,
        fingerprint: int | None = None,
        async_op: bool = False,
    ) -> Work:
        """Direct exchange or ring; a `shard` that is its part of `output` is not copied."""
        ranges = self._ranges("all_gather", output, sizes)
        start, stop = ranges[self.index]
        _check_size("all_gather", shard.numel(), stop - start)
        own = output.detach().reshape(-1)[start:stop]
        if own.data_ptr() != shard.data_ptr():
            own.copy_(shard.detach().reshape(-1))
        is_small = output.numel() * output.itemsize <= self._direct_bytes
        schedule = (direct_all_gather if is_small else ring_all_gather)(self.index, self.size)
        chunks = Chunks(output, ranges)
        return self._run("all_gather", schedule, chunks, chunks, async_op, fingerprint=fingerprint)

    def broadcast(self, tensor: torch.Tensor, root: int = 0, *, async_op: bool = False) -> Work:
        """Binomial tree."""
        chunks = Chunks(tensor, [(0, tensor.numel())])
        schedule = tree_broadcast(self.index, self.size, root)
        return self._run(f"broadcast from {root}", schedule, chunks, chunks, async_op)

    def gather(
        self,
        output: torch.Tensor | None,
        tensor: torch.Tensor,
        root: int = 0,
        *,
        async_op: bool = False,
    ) -> Work:
        """Star: every rank sends to the root."""
        if self.index != root:
            outgoing = incoming = Chunks(tensor, [(0, tensor.numel())] * self.size)
        else:
            if output is None:
                raise SmolrunError("the root of a gather needs an output")
            _check_size("gather", output.numel(), self.size * tensor.numel())
            output.detach().view(self.size, -1)[root] = tensor.detach().reshape(-1)
            outgoing = incoming = Chunks(output, even_ranges(output.numel(), self.size))
        schedule = star_gather(self.index, self.size, root)
        return self._run(f"gather to {root}", schedule, outgoing, incoming, async_op)

    def scatter(
        self,
        output: torch.Tensor,
        tensor: torch.Tensor | None,
        root: int = 0,
        *,
        async_op: bool = False,
    ) -> Work:
        """Star: the root sends to every rank."""
        if self.index != root:
            outgoing = incoming = Chunks(output, [(0, output.numel())] * self.size)
        else:
            if tensor is None:
                raise SmolrunError("the root of a scatter needs a tensor")
            _check_size("scatter", tensor.numel(), self.size * output.numel())
            output.detach().reshape(-1).copy_(tensor.detach().view(self.size, -1)[root])
            outgoing = incoming = Chunks(tensor, even_ranges(tensor.numel(), self.size))
        schedule = star_scatter(self.index, self.size, root)
        return self._run(f"scatter from {root}", schedule, outgoing, incoming, async_op)

    def all_to_all(
        self,
        output: torch.Tensor,
        tensor: torch.Tensor,
        output_sizes: Sequence[int] | None = None,
        sizes: Sequence[int] | None = None,
        *,
        async_op: bool = False,
    ) -> Work:
        """Direct exchange."""
        sends = self._ranges("all_to_all", tensor, sizes)
        receives = self._ranges("all_to_all", output, output_sizes)
        own_from, own_to = sends[self.index], receives[self.index]
        _check_size("all_to_all", own_from[1] - own_from[0], own_to[1] - own_to[0])
        output.detach().reshape(-1)[slice(*own_to)] = tensor.detach().reshape(-1)[slice(*own_from)]
        schedule = direct_all_to_all(self.index, self.size)
        outgoing, incoming = Chunks(tensor, sends), Chunks(output, receives)
        return self._run("all_to_all", schedule, outgoing, incoming, async_op)

    def barrier(self, *, async_op: bool = False) -> Work:
        """Dissemination barrier: log2(N) rounds."""
        token = Chunks(torch.zeros(1, dtype=torch.uint8), [(0, 1)])
        schedule = dissemination_barrier(self.index, self.size)
        return self._run("barrier", schedule, token, token, async_op)

    def run_chains(self, name: str, chains: Sequence[Chain], phases: int) -> Work:
        """Starts operations of up to `phases` schedules each, in order; the work is done when all
        have ended. Their computing runs on the I/O thread (executor.py)."""
        first = self._operations.take(phases * len(chains))
        return self._chains.submit(name, chains, first, phases, self.fingerprint(name))

    def _run(
        self,
        name: str,
        schedule: Schedule,
        outgoing: Chunks,
        incoming: Chunks,
        async_op: bool,
        *,
        op: str = "sum",
        finish: Callable[[], None] | None = None,
        fingerprint: int | None = None,
    ) -> Work:
        tag = self._operations.take()
        what = self.fingerprint(name) if fingerprint is None else fingerprint
        function = name.partition(" ")[0]  # without its op or root

        def start(work: Work) -> None:
            def done() -> None:
                if finish is not None:
                    finish()
                self.mesh.finish(work)

            self.mesh.begin_operation(tag, what)
            ScheduleRun(
                self.mesh, self.ranks, tag, schedule, outgoing, incoming, done, op=op
            ).start()

        work = self.mesh.submit(f"{function} {tag.operation} of group {self.name!r}", start)
        if not async_op:
            work.wait()
        return work

    def _ranges(self, name: str, tensor: torch.Tensor, sizes: Sequence[int] | None) -> list[Range]:
        """The part of each rank in `tensor`: of the given sizes, which must add up, or even."""
        if sizes is None:
            return even_ranges(tensor.numel(), self.size)
        ranges = ranges_of(sizes)
        _check_size(name, tensor.numel(), ranges[-1][1])
        return ranges


def _check_size(name: str, have: int, want: int) -> None:
    if have != want:
        raise SmolrunError(f"{name}: a tensor has {have} elements, its sizes say {want}")
