"""all_reduce of ours beside gloo's, size by size. The same loop also tells where direct exchange
should give way to the ring."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from smolrun.benchmarks.compare import compare
from smolrun.collectives.api import Collectives

# One measurement moves about this much, so that small sizes are repeated often enough for the
# clock.
_BYTES_PER_MEASUREMENT = 100_000_000
_MOST_CALLS = 200


def compare_all_reduce(
    collectives: Collectives, sizes: Sequence[int], *, repeats: int, security: str
) -> Iterator[dict[str, Any]]:
    """One row per size (bytes of a float32 tensor); collective, gloo must have been joined. Rank
    0's clock counts."""
    for size in sizes:
        ours, peer = torch.zeros(size // 4), torch.zeros(size // 4)
        calls = max(1, min(_MOST_CALLS, _BYTES_PER_MEASUREMENT // (size + 100_000)))
        result = compare(
            lambda ours=ours: collectives.all_reduce(ours),  # type: ignore[misc]
            lambda peer=peer: dist.all_reduce(peer),  # type: ignore[misc]
            repeats=repeats,
            calls=calls,
            meet=collectives.barrier,
        )
        yield result.row(
            "collectives",
            "all_reduce",
            "gloo",
            world_size=collectives.size,
            bytes=size,
            security=security,
        )
