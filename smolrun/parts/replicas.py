"""Replicas that agree: the hash of a model's parameters, and making all replicas equal before the
first step."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch

from smolrun.collectives.api import Collectives
from smolrun.wire.tensor import as_bytes

_DIGEST_BYTES = 16


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


def make_equal(collectives: Collectives, tensors: list[torch.Tensor]) -> bool:
    """Copies rank 0's tensors to all where any hash differs; returns whether that was needed;
    collective."""
    hashes = gather_hashes(collectives, parameter_hash(tensors))
    if len(set(hashes)) == 1:
        return False
    for tensor in tensors:
        host = tensor.detach().cpu().contiguous()
        collectives.broadcast(host)
        tensor.detach().copy_(host)
    return True
