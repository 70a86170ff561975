"""Hosts that emulate slower machines: what the user is told about it.

    hosts:
      - {name: pi1, emulate: {compute: 0.25, bandwidth_mbps: 100, latency_ms: 4}}

The pace is in parts/step_clock.py, the links in mesh/shaping.py; workers use both.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

from smolrun.config import RunConfig
from smolrun.errors import ConfigError


def emulated(config: RunConfig) -> list[str]:
    """The hosts that play others, each as a sentence; empty where all are what they are."""
    return [
        f"{host.name} plays a machine with {', '.join(_parts(host.emulate.model_dump()))}"
        for host in config.cluster.hosts or []
        if host.emulate is not None
    ]


def tell_emulated(config: RunConfig) -> Iterator[str]:
    """What a person must know who reads the figures of such a run."""
    if not (hosts := emulated(config)):
        return
    yield f"emulated: {'; '.join(hosts)}"
    here = [host for host in config.cluster.hosts or [] if host.ssh is None]
    busy = sum(host.emulate.compute if host.emulate else host.ranks for host in here)
    cores = os.cpu_count() or 1
    if busy > cores:
        yield (
            f"warning: the hosts of this run play machines that need {busy:g} cores, this machine "
            f"has {cores}; smaller `emulate.compute` for all of them would keep their ratios right"
        )


def refuse_emulated(config: RunConfig, why: str) -> None:
    """ConfigError where the cluster plays other machines, and what is asked for cannot."""
    if hosts := emulated(config):
        raise ConfigError(f"cluster={config.cluster.name}: {why} ({'; '.join(hosts)})")


def _parts(emulate: Mapping[str, Any]) -> Iterator[str]:
    yield f"{emulate['compute']:g} of this one's speed"
    if emulate["bandwidth_mbps"] is not None:
        yield f"{emulate['bandwidth_mbps']:g} Mbit/s"
    if emulate["latency_ms"]:
        yield f"{emulate['latency_ms']:g} ms on the way"
