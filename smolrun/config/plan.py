"""Which rank lives where: a pure function of the configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from smolrun.config.algorithm import AlgorithmConfig
from smolrun.config.base import Device
from smolrun.config.cluster import THIS_MACHINE as THIS_MACHINE
from smolrun.config.cluster import ClusterConfig, HostConfig
from smolrun.config.run import RunConfig

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class RankPlan:
    """One process of a run. `threads` is for torch.

    Auto = cores of the host / `local_world_size`.
    """

    rank: int
    host: str
    addresses: list[str]
    local_rank: int
    local_world_size: int
    device: Device
    threads: int | Literal["auto"]
    ports: tuple[int, int] | None = None


def cluster_size(cluster: ClusterConfig, algorithm: AlgorithmConfig) -> int:
    """Ranks that this cluster starts for this algorithm."""
    if cluster.hosts is not None:
        return sum(host.ranks for host in cluster.hosts)
    if cluster.ranks != "auto":
        return cluster.ranks
    return min(2, algorithm.max_ranks or 2)


def world_size(config: RunConfig) -> int:
    """How many ranks the run has."""
    return cluster_size(config.cluster, config.algorithm)


def are_replicas(config: RunConfig) -> bool:
    """Whether every rank serves the whole model: they have no links, and none needs another."""
    return config.task == "serve" and config.serving.mode == "replicas"


def min_ranks_left(config: RunConfig) -> int | None:
    """The ranks that a run needs at least, which continues without the others; None: all."""
    if are_replicas(config):
        return 1
    return config.algorithm.min_ranks_left if config.task == "train" else None


def linked(config: RunConfig) -> Literal["all", "group", "star", "none"]:
    """Which ranks are linked, and what the loss of one means: `Links` of launch/control.py."""
    if are_replicas(config):
        return "none"
    if config.task == "serve":
        return "group" if world_size(config) > 1 else "all"
    return "all" if min_ranks_left(config) is None else "star"


def savers(config: RunConfig) -> int:
    """How many ranks write checkpoints: all that are at one step, else the server alone."""
    return world_size(config) if config.algorithm.is_lockstep else 1


def has_dedicated_server(config: RunConfig) -> bool:
    """Whether rank 0 has the optimizer, and computes no samples."""
    return world_size(config) > 1 and config.algorithm.has_dedicated_server


def ranks(config: RunConfig) -> list[RankPlan]:
    """One plan per rank, in rank order: host after host, as the cluster lists them."""
    cluster = config.cluster
    hosts = cluster.hosts or [HostConfig(name=THIS_MACHINE, ranks=world_size(config))]
    places = [(host, local_rank) for host in hosts for local_rank in range(host.ranks)]
    return [
        RankPlan(
            rank=rank,
            host=host.name,
            addresses=addresses(host),
            local_rank=local_rank,
            local_world_size=host.ranks,
            device=_device(cluster, host),
            # Emulation measures the CPU time of one thread.
            threads=1 if host.emulate is not None else cluster.threads,
            ports=_range(host.ports or cluster.ports),
        )
        for rank, (host, local_rank) in enumerate(places)
    ]


def _device(cluster: ClusterConfig, host: HostConfig) -> Device:
    device = cluster.device if host.device == "auto" else host.device
    return "cpu" if device == "auto" and host.emulate is not None else device


def addresses(host: HostConfig) -> list[str]:
    """Where the other hosts can reach it, best first: as configured, else as SSH reaches it."""
    if isinstance(host.address, str):
        return [host.address]
    if host.address is not None:
        return list(host.address)
    if host.nearby:
        return []  # known once it has joined
    return [LOOPBACK if host.ssh is None else host.ssh.rpartition("@")[2]]


def _range(ports: str | None) -> tuple[int, int] | None:
    """40000-40100 as two numbers."""
    if ports is None:
        return None
    first, _, last = ports.partition("-")
    return int(first), int(last)
