"""Collectives with torch.distributed's names and meanings, on contiguous CPU tensors.

    new_group(mesh)                           the default group: all ranks
    new_group(mesh, [0, 2], name="even")      another group, independent of all others

Every rank of a group must call the same operations of it in the same order, as with
torch.distributed. A rank that receives anything of another operation, or of the same one with
another `op` or `root`, raises CollectiveMismatch; ranks that all wait for each other's first
message, WaitTimeout. Tensors of other shapes are a ProtocolError; those of equal dtype and shape
are distinguished only where a caller passes `fingerprint=`.

Knows nothing of schedules or sockets: callers depend on `Collectives` only. There are two
implementations, our own schedules over any mesh, and torch.distributed's over its process groups.
The second checks less: see torch_collectives.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from smolrun.collectives.chain import Chain
from smolrun.collectives.scheduled_collectives import ScheduledCollectives
from smolrun.collectives.torch_collectives import TorchCollectives
from smolrun.mesh.mesh import Mesh, Work
from smolrun.mesh.torch_mesh import TorchMesh


class Collectives(Protocol):
    """Operations among `ranks` of a mesh. All ranks end with the same bytes.

    With `async_op` a call returns at once, and the tensors must not be touched until its Work is
    done; without, it blocks until then. Ranks given as `root` are counted within the group."""

    mesh: Mesh
    ranks: list[int]  # of the mesh, in group order
    size: int
    index: int  # of this rank within the group
    name: str  # the same on all ranks of the group

    def fingerprint(self, what: str, hint: str = "") -> int:
        """The number, 32 bits, that frames of the operation `what` of this group carry, so that
        ranks which run different ones get an error; it names those that its rank has registered
        by this method. `hint` is the error's advice."""

    def all_reduce(self, tensor: torch.Tensor, op: str = "sum", *, async_op: bool = False) -> Work:
        """Combines the tensors of all ranks in place; `op` is sum, mean, max or min."""

    def reduce_scatter(
        self,
        output: torch.Tensor,
        tensor: torch.Tensor,
        sizes: Sequence[int] | None = None,
        *,
        async_op: bool = False,
    ) -> Work:
        """Sums the tensors of all ranks; each gets its part in `output`. `tensor` is scratch
        memory: its content is undefined afterwards.

        `sizes[i]` elements go to rank i of the group; by default they differ by at most one."""

    def all_gather(
        self,
        output: torch.Tensor,
        shard: torch.Tensor,
        sizes: Sequence[int] | None = None,
        *,
        fingerprint: int | None = None,
        async_op: bool = False,
    ) -> Work:
        """Concatenates the shards of all ranks in `output`, in rank order; `shard` may be this
        rank's part of `output`. `fingerprint` identifies the tensor, where ranks may mean
        different ones."""

    def broadcast(self, tensor: torch.Tensor, root: int = 0, *, async_op: bool = False) -> Work:
        """Copies the tensor of rank `root` to all."""

    def gather(
        self,
        output: torch.Tensor | None,
        tensor: torch.Tensor,
        root: int = 0,
        *,
        async_op: bool = False,
    ) -> Work:
        """Rank `root` gets `output[i]` = the tensor of rank i; the others pass None. All tensors
        have one size."""

    def scatter(
        self,
        output: torch.Tensor,
        tensor: torch.Tensor | None,
        root: int = 0,
        *,
        async_op: bool = False,
    ) -> Work:
        """Rank i gets `tensor[i]` of rank `root` in `output`; the others pass None. All parts have
        one size."""

    def all_to_all(
        self,
        output: torch.Tensor,
        tensor: torch.Tensor,
        output_sizes: Sequence[int] | None = None,
        sizes: Sequence[int] | None = None,
        *,
        async_op: bool = False,
    ) -> Work:
        """Sends `sizes[i]` elements of `tensor` to rank i, receives `output_sizes[i]` from it; even
        parts by default."""

    def barrier(self, *, async_op: bool = False) -> Work:
        """Done when every rank of the group has called it."""

    def run_chains(self, name: str, chains: Sequence[Chain], phases: int) -> Work:
        """Starts chains of up to `phases` exchanges each, in order; always asynchronous. The work
        is done when all have ended. What they compute runs on the I/O thread."""


def new_group(
    mesh: Mesh, ranks: Sequence[int] | None = None, name: str | None = None
) -> Collectives:
    """The collectives of a group of `ranks` (all by default), which must include this rank.

    `name` is the same on all its ranks; by default it is made of the ranks. SmolrunError if the
    name is in use on this mesh, except for the default group: its operations are then counted
    together. The only place that chooses an implementation."""
    if isinstance(mesh, TorchMesh):
        return TorchCollectives.of(mesh, ranks, name)
    return ScheduledCollectives(mesh, ranks, name=name)
