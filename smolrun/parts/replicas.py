"""Replicas that agree: the hash of a model's parameters, and making all replicas equal, before the
first step or whenever they may have drifted apart."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch

from smolrun.collectives.api import Collectives
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


def make_equal(collectives: Collectives, tensors: list[torch.Tensor]) -> list[float]:
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
