"""Who reaches whom, without any mesh: `on_host/reach.py` on all machines at the same time."""

from __future__ import annotations

import random
import secrets
from collections.abc import Mapping
from itertools import permutations
from typing import Any

from smolrun.errors import HostError
from smolrun.launch.doctor.examination import Askable
from smolrun.launch.doctor.links import Host, to_dial
from smolrun.launch.run_on_all import on_all

# Where the cluster file names no ports: any that are usually free.
_FIRST_PORT, _LAST_PORT = 20_000, 32_000
_PORTS = 3
_WAIT_S = 12.0  # so much later than the first may the last be ready
_START_S = 60.0  # a Python on a Pi, from a cold card


def reach_test(
    machines: Mapping[str, Askable],
    hosts: Mapping[str, Host],
    ports: Mapping[str, tuple[int, int] | None],
    *,
    wait_s: float = _WAIT_S,
) -> dict[str, dict[str, Any]]:
    """What each machine's reach.py tells; `{"error": ...}` for one that could not be asked.

    Blocks for `wait_s` where somebody cannot be reached, less where all can.
    """
    if len(machines) < 2:
        return {}
    common = {"nonce": secrets.token_hex(16), "wait_s": wait_s}
    listen = {name: _ports(ports.get(name)) for name in machines}
    dials = {
        (source, to): to_dial(hosts[source], hosts[to]) for source, to in permutations(machines, 2)
    }

    def ask(name: str) -> dict[str, Any]:
        peers = {
            to: {"addresses": addresses, "ports": listen[to]}
            for (source, to), addresses in dials.items()
            if source == name
        }
        expected = [
            [source, address]
            for (source, to), addresses in dials.items()
            if to == name
            for address in addresses
        ]
        asked = {"me": name, "listen": listen[name], "peers": peers, "expected": expected}
        try:
            answer = machines[name].call("reach", common | asked, wait_s + _START_S)
        except HostError as error:
            return {"error": error.what, "dialed": {}}
        # Of a host's word only what it was asked counts, so that none can make addresses up.
        dialed = {
            to: [row for row in answer["dialed"].get(to, []) if row["address"] in addresses]
            for (source, to), addresses in dials.items()
            if source == name
        }
        return {**answer, "dialed": dialed}

    return on_all({name: name for name in machines}, ask, "reach")


def _ports(allowed: tuple[int, int] | None) -> list[int]:
    """A few that this test may listen on; not all of them: a run may be on."""
    first, last = allowed or (_FIRST_PORT, _LAST_PORT)
    every = range(first, last + 1)
    return random.sample(every, min(_PORTS, len(every)))  # nothing secret about them
