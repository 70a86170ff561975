"""What a checkpoint holds of an algorithm whose ranks step slices: the same keys as in saved.py,
each as the ranges that the ranks own.

So any number of ranks, any stage and any algorithm that keeps whole states can go on from it, and
it from theirs: everybody reads the ranges that are its own now.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from smolrun.algorithms import saved
from smolrun.algorithms.contract import PendingUpdate
from smolrun.checkpoints.reader import CheckpointReader
from smolrun.checkpoints.tensor_slice import TensorSlice
from smolrun.errors import CheckpointError
from smolrun.parts.flat_shards import Slice
from smolrun.parts.optimizer_state import expected_bytes as optimizer_bytes
from smolrun.parts.optimizer_state import load_optimizer_state, shapes_of

if TYPE_CHECKING:
    from smolrun.algorithms.fsdp import OptimizerShards


def pieces(algorithm: OptimizerShards) -> list[TensorSlice]:
    """What this rank writes; all ranks' pieces together are the whole."""
    found = []
    for part in _slices(algorithm):
        found.append(
            TensorSlice(f"model/{part.name}", part.shape, part.start, part.values.detach())
        )
        for key, value in algorithm.optimizer.state.get(part.values, {}).items():
            if value is None:
                continue
            remembered = torch.as_tensor(value).detach()
            path = f"optimizer/{key}/{part.name}"
            if remembered.ndim:
                found.append(TensorSlice(path, part.shape, part.start, remembered))
            elif part.start == 0:  # a counter, equal in all slices of a parameter
                found.append(TensorSlice(path, (), 0, remembered))
    for number, pending in enumerate(algorithm.pending_updates):
        for part, gradient in _gradients(algorithm, pending):
            found.append(
                TensorSlice(f"in_flight/{number}/{part.name}", part.shape, part.start, gradient)
            )
    return found + saved.dealt(
        _not_cut(algorithm), algorithm.collectives.size, algorithm.collectives.index
    )


def expected_bytes(algorithm: OptimizerShards) -> int:
    """About how large a checkpoint will be, all ranks together."""
    # Parameters may be there in half precision just now; what is saved are the shards.
    cut = [
        torch.nn.Parameter(torch.empty(shape, dtype=bucket.dtype, device="meta"), p.requires_grad)
        for bucket in algorithm.shards
        for p, shape in zip(bucket.parameters, bucket.shapes, strict=True)
    ]
    held = sum(tensor.nbytes for tensor in [*cut, *_not_cut(algorithm).values()])
    late = algorithm.context.staleness * sum(p.nbytes for p in cut if p.requires_grad)
    return held + late + optimizer_bytes(algorithm.optimizer, cut)


@torch.no_grad()
def restore(
    algorithm: OptimizerShards, checkpoint: CheckpointReader, state: Mapping[str, Any]
) -> None:
    """Puts everything back; CheckpointError names what is missing, unknown or of another shape."""
    _restore_model(algorithm, checkpoint)
    saved.refuse_unknown(algorithm, checkpoint)
    _restore_optimizer(algorithm, checkpoint)
    saved.restore_numbers(algorithm, checkpoint, state)
    for number, pending in enumerate(saved.restore_flights(algorithm, checkpoint, state)):
        for part, gradient in _gradients(algorithm, pending):
            late = _read(checkpoint, f"in_flight/{number}/{part.name}", part)
            gradient.copy_(late.view_as(gradient))


def _restore_model(algorithm: OptimizerShards, checkpoint: CheckpointReader) -> None:
    """Replicas are read whole; who holds slices reads those, and looks at the shapes of all."""
    slices = {part.name: part for part in _slices(algorithm)}
    cut = _cut(algorithm)
    for name, tensor in saved.model_tensors(algorithm.model):
        key = f"model/{name}"
        if algorithm.needs_full_model or name not in cut:
            saved.read_into(tensor, checkpoint, key)
        elif name in slices:
            slices[name].values.copy_(_read(checkpoint, key, slices[name]))
        else:
            _check(checkpoint, key, tuple(tensor.shape))


def _restore_optimizer(algorithm: OptimizerShards, checkpoint: CheckpointReader) -> None:
    slices, cut = {part.name: part for part in _slices(algorithm)}, _cut(algorithm)
    state: dict[str, Tensor] = {}
    for key in checkpoint.keys("optimizer/"):
        path = key.removeprefix("optimizer/")
        kind, _, name = path.partition("/")
        if name not in cut:
            raise CheckpointError(f"{checkpoint.folder} is of another model: it has {key}")
        if name in slices:
            part = slices[name]
            shape = shapes_of(algorithm.optimizer, part.values).get(kind, ())
            value = _read(checkpoint, key, part) if shape else checkpoint.read(key)
            state[path] = value.reshape(shape) if value.numel() == math.prod(shape) else value
    load_optimizer_state(algorithm.optimizer, algorithm.stepped, state)


def _read(checkpoint: CheckpointReader, key: str, part: Slice) -> Tensor:
    """The range of a slice, as the slice is shaped."""
    _check(checkpoint, key, part.shape)
    value = checkpoint.read(key, part.start, part.stop).view_as(part.values)
    if value.dtype != part.values.dtype:
        raise CheckpointError(
            f"{checkpoint.folder} is of another model: {key} is {value.dtype}, not "
            f"{part.values.dtype}"
        )
    return value


def _check(checkpoint: CheckpointReader, key: str, shape: tuple[int, ...]) -> None:
    if key not in checkpoint.manifest.tensors:
        raise CheckpointError(f"{checkpoint.folder} is of another model: it has no {key}")
    if (found := checkpoint.shape(key)) != shape:
        raise CheckpointError(
            f"{checkpoint.folder} is of another model: {key} is {found}, not {shape}"
        )


def _slices(algorithm: OptimizerShards) -> Iterator[Slice]:
    for bucket in algorithm.shards:
        yield from bucket.slices


def _cut(algorithm: OptimizerShards) -> set[str]:
    """The names of all parameters that are cut, whoever has the slices."""
    return {name for bucket in algorithm.shards for name in bucket.names}


def _not_cut(algorithm: OptimizerShards) -> dict[str, Tensor]:
    """What all ranks hold alike, by key."""
    cut = _cut(algorithm)
    whole = {
        f"model/{name}": tensor
        for name, tensor in saved.model_tensors(algorithm.model)
        if name not in cut
    }
    facts = {
        f"in_flight/{n}/facts": pending.facts for n, pending in enumerate(algorithm.pending_updates)
    }
    return whole | facts


def _gradients(
    algorithm: OptimizerShards, pending: PendingUpdate
) -> Iterator[tuple[Slice, Tensor]]:
    for bucket, own in zip(algorithm.trained_shards, algorithm.summed(pending), strict=True):
        for part in bucket.slices:
            yield part, part.of(own)
