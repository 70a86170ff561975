"""Parameters laid out flat in buckets, and every bucket cut among the ranks, wherever a cut falls.

    bucket    [ head.weight                 | norm.weight | blocks.1.down.weight ]
    ranks     [ rank 0        | rank 1              | rank 2                     ]   by weight
    slices    rank 1 owns the end of head.weight, all of norm.weight, a beginning of the third

A rank steps its own slices only; a slice of a matrix is a matrix of one row, so that an optimizer
still distinguishes it from a vector. Knows nothing of when a bucket is gathered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from smolrun.collectives.api import Collectives
from smolrun.collectives.schedule import ranges_of
from smolrun.mesh.mesh import Work
from smolrun.parts.placement import shares


@dataclass(frozen=True)
class Slice:
    """This rank's part of one parameter: its elements from `start`, at `offset` of the shard."""

    name: str
    shape: tuple[int, ...]  # of the whole parameter
    start: int
    offset: int
    values: nn.Parameter  # lies in the shard

    @property
    def stop(self) -> int:
        """One past its last element."""
        return self.start + self.values.numel()

    def of(self, shard: Tensor) -> Tensor:
        """The same part of any tensor that is laid out as the shard."""
        return shard[self.offset : self.offset + self.values.numel()]


class ShardedBucket:
    """Parameters one after the other, of which this rank owns elements [start, stop); all of them
    are trained, or all are frozen."""

    def __init__(
        self,
        named: Sequence[tuple[str, nn.Parameter]],
        weights: Sequence[float],
        index: int,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.names = [name for name, _ in named]
        self.parameters = [parameter for _, parameter in named]
        self.shapes = [parameter.shape for parameter in self.parameters]
        self.size = sum(parameter.numel() for parameter in self.parameters)
        self.sizes = shares(self.size, weights)
        self.start, self.stop = ranges_of(self.sizes)[index]
        first = self.parameters[0]
        self.device, self.dtype = first.device, dtype or first.dtype
        self.is_trained = first.requires_grad
        self.shard = torch.empty(0)
        self.slices: list[Slice] = []

    def views(self, flat: Tensor) -> list[Tensor]:
        """Every parameter's part of a flat tensor, in its own shape."""
        parts = flat.split([shape.numel() for shape in self.shapes])
        return [part.view(shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def own(self, flat: Tensor) -> Tensor:
        """This rank's part of a flat tensor."""
        return flat[self.start : self.stop]

    def flatten_parameters(self) -> Tensor:
        """Moves whole parameters into one flat tensor, which it returns; the shard is a part of it
        from then on."""
        flat = torch.empty(self.size, dtype=self.dtype, device=self.device)
        for parameter, view in zip(self.parameters, self.views(flat), strict=True):
            view.copy_(parameter.detach())
            parameter.data = view
        self.keep(self.own(flat))
        return flat

    def load_shard(self, value_of: Callable[[str, nn.Parameter], Tensor]) -> None:
        """Copies this rank's part of every parameter, one parameter after the other."""
        shard = torch.empty(self.stop - self.start, dtype=self.dtype, device=self.device)
        self.keep(shard)
        for part in self.slices:
            parameter = self.parameters[self.names.index(part.name)]
            whole = value_of(part.name, parameter)
            part.of(shard).copy_(whole.reshape(-1)[part.start : part.stop])

    def keep(self, shard: Tensor) -> None:
        """Makes `shard` the memory of this rank's slices."""
        self.shard, self.slices = shard, []
        first = 0
        for name, shape in zip(self.names, self.shapes, strict=True):
            low, high = max(first, self.start), min(first + shape.numel(), self.stop)
            if low < high:
                part = shard[low - self.start : high - self.start]
                values = nn.Parameter(part.view(1, -1) if len(shape) > 1 else part, self.is_trained)
                place = (low - first, low - self.start)
                self.slices.append(Slice(name, tuple(shape), *place, values))
            first += shape.numel()

    def bind(self, gradient: Tensor) -> Tensor:
        """Makes a flat gradient of the shard the `grad` of its slices, and returns it."""
        for part in self.slices:
            part.values.grad = part.of(gradient).view_as(part.values)
        return gradient

    # -- over the network, through host memory where a device computes --

    def gather(
        self, collectives: Collectives, flat: Tensor, fingerprint: int | None = None
    ) -> PendingAllGather:
        """Starts to fill a flat tensor with the shards of all ranks, in the tensor's format."""
        host = flat
        if flat.device.type != "cpu":
            pinned = flat.device.type == "cuda"
            host = torch.empty(self.size, dtype=flat.dtype, pin_memory=pinned)
        own = self.own(host)
        if own.data_ptr() != self.shard.data_ptr():
            own.copy_(self.shard)
        work = collectives.all_gather(host, own, self.sizes, fingerprint=fingerprint, async_op=True)
        return PendingAllGather(work, host, flat)


@dataclass(frozen=True)
class PendingAllGather:
    """A flat tensor that is being gathered."""

    work: Work
    host: Tensor
    flat: Tensor

    def copy_to_device(self) -> None:
        """Copies it to the device; after the work is done."""
        if self.host is not self.flat:
            self.flat.copy_(self.host)


def cut(
    model: nn.Module,
    packed: Iterable[Sequence[nn.Parameter]],
    weights: Sequence[float],
    index: int,
    dtype: torch.dtype | None = None,
) -> list[ShardedBucket]:
    """A sharded bucket for each list of the model's parameters; `dtype` is that of the shards."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [
        ShardedBucket([(names[p], p) for p in parameters], weights, index, dtype)
        for parameters in packed
    ]
