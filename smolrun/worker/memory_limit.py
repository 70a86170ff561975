"""How much of its host's memory a rank may use: reported at the start, and enforced where torch
can, on CUDA and MPS. For the CPU it is what the dry run and the warning before a run compare with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import psutil
import torch

from smolrun.events import Event, Note
from smolrun.launch.control import StartMessage
from smolrun.launch.machine_memory import gb, machine_memory
from smolrun.parts.placement import ranked_hosts


def limit_memory(start: StartMessage, device: str, emit: Callable[[Event], None]) -> float:
    """Bytes that the ranks of this host may use together. On a GPU this rank gets its part of them
    from torch's allocator, which raises OutOfMemory beyond. The first rank of a host reports it."""
    cluster = start.config.get("cluster") or {}
    hosts, rank = ranked_hosts(cluster), start.rank
    alone: Mapping[str, Any] = {
        "memory_gb": cluster.get("memory_gb"),
        "ranks": start.world_size,
        "emulate": None,
    }
    host = hosts[rank] if hosts else alone
    memory, whole = machine_memory(), _device_memory(device)
    has_own = device == "cuda" and not _is_integrated()  # memory that no other program lives in
    limit = host["memory_gb"] * 2**30 if host["memory_gb"] else whole if has_own else memory.limit
    limit = min(limit or whole, whole)
    # On MPS also for all of `whole`: torch itself allows 1.7 times what the system recommends.
    if device == "mps" or (device == "cuda" and limit / host["ranks"] < whole):
        _module(device).set_per_process_memory_fraction(limit / host["ranks"] / whole)
    is_first = rank == 0 or bool(hosts and hosts[rank - 1]["name"] != host["name"])
    if is_first and (host["memory_gb"] or not (has_own or host["emulate"])):
        total = whole if has_own else memory.total
        kept = "" if device != "cpu" else ", not enforced on the CPU"
        text = (
            f"{start.host}: this run may use {gb(limit)} of {gb(total)} of memory (memory_gb{kept})"
        )
        emit(Note("info", text))
    return float(limit)


def free_memory(start: StartMessage, device: str, limit: float) -> float:
    """Bytes that this rank may still use, of the `limit` for the ranks of its host together."""
    hosts = ranked_hosts(start.config.get("cluster") or {})
    here = sum(host["name"] == start.host for host in hosts) if hosts else start.world_size
    free = float(machine_memory().available)
    if device == "cuda":
        free = float(torch.cuda.mem_get_info()[0])
        return min(free, limit / here - torch.cuda.memory_reserved())
    return min(free, limit / here - psutil.Process().memory_info().rss)


def _device_memory(device: str) -> float:
    """What torch may use of it at most: of MPS what the system recommends; of the CPU there is no
    such number."""
    if device == "cuda":
        return float(torch.cuda.mem_get_info()[1])
    return float(torch.mps.recommended_max_memory()) if device == "mps" else float("inf")


def _is_integrated() -> bool:
    """Whether the GPU shares the memory of the machine (Jetson)."""
    return bool(torch.cuda.get_device_properties().is_integrated)


def _module(device: str) -> Any:
    return torch.cuda if device == "cuda" else torch.mps
