"""The peer: torch.distributed's gloo backend among the same ranks, found through our mesh, so that
no port is fixed."""

from __future__ import annotations

import os
from datetime import timedelta

import psutil
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore  # where torch's own type stubs have it

from smolrun.collectives.api import Collectives

_ADDRESS_CHARS = 64


def join_gloo(collectives: Collectives, address: str, timeout_s: float) -> None:
    """Starts torch.distributed with gloo on this rank; collective. `address` is this rank's own, as
    the others reach it."""
    rank, world_size = collectives.index, collectives.size
    _stay_on_interface_of(address)
    first = torch.zeros(_ADDRESS_CHARS, dtype=torch.int64)
    first[: len(address)] = torch.tensor(list(address.encode()))
    collectives.broadcast(first)
    address = bytes(int(code) for code in first if code).decode()  # rank 0's from here on
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


def _stay_on_interface_of(address: str) -> None:
    """Gloo asks for the address of the host's name, which may be that of a slower network."""
    for name, found in psutil.net_if_addrs().items():
        if any(item.address.partition("%")[0] == address for item in found):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
            return


def leave_gloo() -> None:
    """Ends it."""
    dist.destroy_process_group()
