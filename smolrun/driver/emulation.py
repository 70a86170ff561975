"""Hosts that play slower machines: how fast their ranks compute, how fast their links are, and what
the user is told about it.

    hosts:
      - {name: pi1, emulate: {compute: 0.25, bandwidth_mbps: 100, latency_ms: 4}}

Only wiring: the pace is in parts/step_clock.py, the links in mesh/shaping.py.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from smolrun.config import RunConfig
from smolrun.errors import ConfigError
from smolrun.events import Note
from smolrun.parts.placement import ranked_hosts
from smolrun.parts.step_clock import FULL_SPEED, EmulatedPace, Pace

if TYPE_CHECKING:
    from smolrun.mesh.shaping import Shape

# From here on the figures of a run are not those of the machines that it plays.
_LATE = 0.05


def pace_of(config: Mapping[str, Any], rank: int) -> Pace:
    """How fast a rank of the resolved configuration computes."""
    emulate = _emulate(config, rank)
    return EmulatedPace(emulate["compute"]) if emulate and emulate["compute"] < 1 else FULL_SPEED


def shape_of(config: Mapping[str, Any], rank: int) -> Shape | None:
    """How fast the links of a rank are; None: as they are."""
    emulate = _emulate(config, rank)
    if not emulate or (emulate["bandwidth_mbps"] is None and not emulate["latency_ms"]):
        return None
    from smolrun.mesh.shaping import Shape

    return Shape(emulate["bandwidth_mbps"], emulate["latency_ms"])


def _emulate(config: Mapping[str, Any], rank: int) -> Mapping[str, Any] | None:
    hosts = ranked_hosts(config.get("cluster"))
    found: Mapping[str, Any] | None = hosts[rank]["emulate"] if hosts else None
    return found


def late(pace: Pace, rank: int) -> Note | None:
    """A warning where a rank could not keep its pace."""
    if pace.late < _LATE:
        return None
    return Note(
        "warning",
        f"emulation: computing took {pace.late:.0%} longer than it would on the machine that this "
        "rank plays, because something else had its core; its times are too long by that",
        rank,
    )


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
