"""Which host reaches which, without a mesh: the test, and findings with the firewall command.

`probe_reachability` runs `on_host/reach.py` on all hosts at the same time; the rest is pure.
"""

from __future__ import annotations

import random
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

from smolrun.errors import HostError
from smolrun.launch.doctor.findings import Finding
from smolrun.launch.doctor.host_report import ScriptRunner
from smolrun.launch.doctor.links import (
    FasterNetwork,
    HostAddresses,
    Route,
    network_of,
    to_dial,
    unreachable_hosts,
)
from smolrun.launch.run_on_all import run_on_all


@dataclass(frozen=True)
class HostFirewall:
    """A host's firewall as found, and what a rule for it must name."""

    firewall: Mapping[str, Any]
    os: str
    python: str
    ports: tuple[int, int] | None

    def allow_command(self, source: str | None) -> str:
        """The command that opens it for a network, on that host."""
        return allow_command(self.firewall, self.os, self.ports, python=self.python, source=source)


def unreachable_findings(
    hosts: Mapping[str, HostAddresses],
    found: Sequence[Route],
    firewalls: Mapping[str, HostFirewall],
) -> dict[str, list[Finding]]:
    """Findings for the hosts that other hosts cannot reach."""
    cut = unreachable_hosts(found)
    by_host: dict[str, list[Finding]] = {}
    open_ = {(route.source, route.to) for route in found if route.is_open}
    for route in (one for one in found if not one.is_open):
        works_back = (route.to, route.source) in open_
        if not works_back and route.to not in cut and route.source in cut:
            continue  # reported for the other host
        rest = "; the other direction works" if works_back else ""
        by_host.setdefault(route.to, []).append(
            Finding(
                "warning" if works_back else "error",
                f"{route.source} cannot reach {route.to} ({_why(route)}){rest}",
                _mend(hosts[route.to], route, firewalls[route.to]),
            )
        )
    return by_host


def _why(route: Route) -> str:
    return "; ".join(f"{address}: {error}" for address, error in route.errors) or "no address"


def _mend(to: HostAddresses, route: Route, firewall: HostFirewall) -> str:
    errors = {error for _, error in route.errors}
    if "refused" in errors:
        return "another machine may answer at that address; check `address:` of that host"
    known = any(to.interface(address) is not None for address, _ in route.errors)
    if not known:
        own = [text.partition("/")[0] for one in to.interfaces for text in one.addresses]
        listed = ", ".join(address for address in own if not address.startswith(("127.", "::1")))
        return f"it has no such address; set `address:` to one of its own: {listed}"
    network = next((network_of(to, address) for address, _ in route.errors), None)
    return f"on {to.name}: {firewall.allow_command(network)}"


def network_findings(found: Sequence[FasterNetwork]) -> dict[str, list[Finding]]:
    """Findings for hosts that are on a faster network than the one that is used."""
    by_host: dict[str, list[Finding]] = {}
    for one in found:
        other = f"{one.to}: `address: {one.address}`"
        silent = "" if one.answered else ", but it does not answer there"
        finding = Finding(
            "warning",
            f"{one.source} reaches {one.to} over {one.used}; both are on {one.better}{silent}",
            f"in the cluster file, {other}"
            if one.answered
            else "let TCP through there, then look again",
        )
        by_host.setdefault(one.to, []).append(finding)
    return by_host


# For clusters that name none: one can only open ports that are known.
USUAL_PORTS = (40000, 40100)


def allow_command(
    firewall: Mapping[str, Any],
    os: str,
    ports: tuple[int, int] | None,
    *,
    python: str,
    source: str | None = None,
) -> str:
    """The command, run on that host, that opens its ports; `source` is the other hosts' network."""
    first, last = ports or USUAL_PORTS
    lead = "" if ports else f"set `ports: {first}-{last}` in the cluster file, then there: "
    return lead + _command(firewall.get("kind"), os, f"{first}-{last}", python, source)


def _command(kind: str | None, os: str, ports: str, python: str, source: str | None) -> str:
    if os == "darwin":
        tool = "/usr/libexec/ApplicationFirewall/socketfilterfw"
        return f"sudo {tool} --add {python} && sudo {tool} --unblockapp {python}"
    if os == "windows":
        return (
            "New-NetFirewallRule -DisplayName smolrun -Direction Inbound -Protocol TCP "
            f"-LocalPort {ports} -Action Allow   (PowerShell, as administrator)"
        )
    colon = ports.replace("-", ":")
    if kind == "ufw":
        return f"sudo ufw allow from {source or 'any'} to any port {colon} proto tcp"
    if kind == "firewalld":
        return f"sudo firewall-cmd --permanent --add-port={ports}/tcp && sudo firewall-cmd --reload"
    if kind == "iptables":
        return f"sudo iptables -I INPUT -p tcp --dport {colon} -j ACCEPT"
    if kind == "nftables":
        return f"sudo nft insert rule inet filter input tcp dport {ports} accept"
    return f"let TCP ports {ports} through whatever filters packets there, or in between"


# Where the cluster file names no ports: any that are usually free.
_FIRST_PORT, _LAST_PORT = 20_000, 32_000
_PORTS = 3
_WAIT_S = 12.0  # so much later than the first may the last be ready
_START_S = 60.0  # a Python on a Pi, from a cold card


def probe_reachability(
    machines: Mapping[str, ScriptRunner],
    hosts: Mapping[str, HostAddresses],
    ports: Mapping[str, tuple[int, int] | None],
    *,
    wait_s: float = _WAIT_S,
) -> dict[str, dict[str, Any]]:
    """What each machine's reach.py returns; `{"error": ...}` where it could not run.

    Blocks for `wait_s` if a host cannot be reached, less if all can.
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
        # Rows of addresses that were not requested are dropped: a host cannot add any.
        dialed = {
            to: [row for row in answer["dialed"].get(to, []) if row["address"] in addresses]
            for (source, to), addresses in dials.items()
            if source == name
        }
        return {**answer, "dialed": dialed}

    return run_on_all({name: name for name in machines}, ask, "reach")


def _ports(allowed: tuple[int, int] | None) -> list[int]:
    """A few that this test may listen on; not all of them: a run may be on."""
    first, last = allowed or (_FIRST_PORT, _LAST_PORT)
    every = range(first, last + 1)
    return random.sample(every, min(_PORTS, len(every)))  # nothing secret about them
