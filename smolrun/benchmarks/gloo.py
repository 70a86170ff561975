"""The peer: torch.distributed's gloo backend among the same ranks, found through our mesh, so that
no port is fixed."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore  # where torch's own type stubs have it

from smolrun.collectives.api import Collectives


def join_gloo(collectives: Collectives, address: str, timeout_s: float) -> None:
    """Starts torch.distributed with gloo on this rank; collective. `address` is rank 0's, as all
    ranks reach it."""
    rank, world_size = collectives.index, collectives.size
    timeout = timedelta(seconds=timeout_s)
    port = torch.zeros(1, dtype=torch.int64)
    store = None
    if rank == 0:
        store = TCPStore(
            address, 0, world_size, is_master=True, timeout=timeout, wait_for_workers=False
        )
        port[0] = store.port
    collectives.broadcast(port)
    if store is None:
        store = TCPStore(address, int(port), world_size, is_master=False, timeout=timeout)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timeout)


def leave_gloo() -> None:
    """Ends it."""
    dist.destroy_process_group()
