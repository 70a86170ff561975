"""Replicas that agree: the hash of a model's parameters, and making all replicas equal, before the
first step or whenever they may have drifted apart; and buffers that forward changes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import torch

from smolrun.collectives.api import Collectives
from smolrun.mesh.mesh import Work
from smolrun.wire.tensor import as_bytes

_DIGEST_BYTES = 16
_PIECE = 1 << 18  # numbers


def parameter_hash(parameters: Iterable[torch.Tensor]) -> str:
    """32 hex digits over the bytes of all tensors; equal hashes mean equal bytes."""
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    for parameter in parameters:
        digest.update(as_bytes(parameter.detach().cpu().contiguous()))
    return digest.hexdigest()


def gather_hashes(collectives: Collectives, own: str) -> list[str]:
    """The hashes of all ranks, in rank order; collective."""
    table = torch.empty((collectives.size, _DIGEST_BYTES), dtype=torch.uint8)
    collectives.all_gather(table, torch.tensor(list(bytes.fromhex(own)), dtype=torch.uint8))
    return [bytes(row.tolist()).hex() for row in table]


def first_difference(collectives: Collectives, tensors: Mapping[str, torch.Tensor]) -> str:
    """The name of the first tensor that is not equal on all ranks; empty if all are. Collective."""
    for name, tensor in tensors.items():
        if len(set(gather_hashes(collectives, parameter_hash([tensor])))) > 1:
            return name
    return ""


def persistent_buffers(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The buffers of a model's state_dict by name; the others are made anew by the model itself."""
    return {
        f"{prefix}.{name}" if prefix else name: buffer
        for prefix, module in model.named_modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set
    }


def model_tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and persistent buffers by name, each tensor once."""
    yield from model.named_parameters()
    yield from persistent_buffers(model).items()


class Contents(NamedTuple):
    """What to compare of a tensor: its shape and type, and its bytes or where and which it is."""

    layout: tuple[torch.Size, torch.dtype]
    values: bytes | tuple[int, int]


def contents(tensors: Mapping[str, torch.Tensor], *, by_bytes: bool) -> dict[str, Contents]:
    """Equal for a tensor before and after a function that has not changed it. By bytes it is exact
    (also of NaN, which torch.equal calls unequal) and costs a copy. Otherwise its address and
    torch's count of in-place changes, which some kernels do not raise; keep the tensors meanwhile,
    or others may get their addresses."""
    return {
        name: Contents(
            (tensor.shape, tensor.dtype),
            as_bytes(tensor.detach().cpu().contiguous()).tobytes()
            if by_bytes
            else (tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version),
        )
        for name, tensor in tensors.items()
    }


def broadcast_from(
    collectives: Collectives,
    root: int,
    tensors: list[torch.Tensor],
    *,
    wait: Callable[[Work], None],
) -> None:
    """Copies the tensors of rank `root` (within the group) to all, in one message; collective."""
    host = [tensor.detach().cpu().contiguous().reshape(-1) for tensor in tensors]
    flat = torch.cat([values.view(torch.uint8) for values in host])
    wait(collectives.broadcast(flat, root, async_op=True))
    if collectives.index == root:
        return
    for tensor, part in zip(tensors, flat.split([values.nbytes for values in host]), strict=True):
        # A copy, as a part may begin where its own type may not.
        tensor.detach().copy_(part.clone().view(tensor.dtype).view(tensor.shape))


def sync_replicas(collectives: Collectives, tensors: list[torch.Tensor]) -> list[float]:
    """Copies rank 0's tensors to all where any hash differs; collective.

    Returns how far each rank's numbers were from rank 0's at most; empty where nothing differed.
    """
    hashes = gather_hashes(collectives, parameter_hash(tensors))
    if len(set(hashes)) == 1:
        return []
    most = torch.zeros((), dtype=torch.float64)
    for tensor in tensors:
        before = tensor.detach().cpu().contiguous()
        host = before.clone()
        collectives.broadcast(host)
        most = torch.maximum(most, _largest_difference(before, host))  # not a number stays that
        tensor.detach().copy_(host)
    differences = torch.empty(collectives.size, dtype=torch.float64)
    collectives.all_gather(differences, most.reshape(1))
    found: list[float] = differences.tolist()
    return found


def _largest_difference(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """In double precision, of which there are only a few MB at a time."""
    pairs = zip(one.flatten().split(_PIECE), other.flatten().split(_PIECE), strict=True)
    found = [(a.double() - b.double()).abs().max() for a, b in pairs if a.numel()]
    return torch.stack(found).max() if found else torch.zeros((), dtype=torch.float64)
