"""Who reaches whom, without any mesh: `on_host/reach.py` on all machines at the same time."""

from __future__ import annotations

import random
import secrets
from collections.abc import Mapping
from typing import Any

from smolrun.errors import HostError
from smolrun.launch.at_once import on_all
from smolrun.launch.examination import Askable
from smolrun.launch.links import Host, to_dial

# Where the cluster file names no ports: any that are usually free.
_FIRST_PORT, _LAST_PORT = 20_000, 32_000
_PORTS = 3
_WAIT_S = 8.0
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
    nonce = secrets.token_hex(16)
    listen = {name: _ports(ports.get(name)) for name in machines}

    def ask(name: str) -> dict[str, Any]:
        peers = {
            other: {"addresses": to_dial(hosts[name], hosts[other]), "ports": listen[other]}
            for other in machines
            if other != name
        }
        request = {"me": name, "nonce": nonce, "listen": listen[name], "peers": peers}
        try:
            answer = machines[name].call("reach", {**request, "wait_s": wait_s}, wait_s + _START_S)
        except HostError as error:
            return {"error": error.what, "dialed": {}}
        return answer

    return on_all({name: name for name in machines}, ask, "reach")


def _ports(allowed: tuple[int, int] | None) -> list[int]:
    """A few that this test may listen on; not all of them: a run may be on."""
    first, last = allowed or (_FIRST_PORT, _LAST_PORT)
    every = range(first, last + 1)
    return random.sample(every, min(_PORTS, len(every)))  # nothing secret about them
