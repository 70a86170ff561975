"""Who reaches whom, in words: findings for hosts, from what `links.py` made of the facts. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from smolrun.launch.doctor.firewall import opening
from smolrun.launch.doctor.links import Faster, Host, Way, cut_off, network_of
from smolrun.launch.doctor.verdicts import Finding


@dataclass(frozen=True)
class Door:
    """What guards a host: its firewall, as found, and what a rule for it must name."""

    firewall: Mapping[str, Any]
    os: str
    python: str
    ports: tuple[int, int] | None

    def opening(self, source: str | None) -> str:
        """The command that opens it for a network."""
        return opening(self.firewall, self.os, self.ports, python=self.python, source=source)


def blocked(
    hosts: Mapping[str, Host], found: Sequence[Way], doors: Mapping[str, Door]
) -> dict[str, list[Finding]]:
    """Findings for the hosts that others cannot reach."""
    cut = cut_off(found)
    told: dict[str, list[Finding]] = {}
    open_ = {(way.source, way.to) for way in found if way.is_open}
    for way in (one for one in found if not one.is_open):
        works_back = (way.to, way.source) in open_
        if not works_back and way.to not in cut and way.source in cut:
            continue  # told of the other one
        rest = "; the other direction works" if works_back else ""
        told.setdefault(way.to, []).append(
            Finding(
                "limits" if works_back else "blocks",
                f"{way.source} cannot reach {way.to} ({_why(way)}){rest}",
                _mend(hosts[way.to], way, doors[way.to]),
            )
        )
    return told


def _why(way: Way) -> str:
    return "; ".join(f"{address}: {error}" for address, error in way.errors) or "no address"


def _mend(to: Host, way: Way, door: Door) -> str:
    errors = {error for _, error in way.errors}
    if "refused" in errors:
        return "does another machine answer at that address? check `address:` of that host"
    known = any(to.interface(address) is not None for address, _ in way.errors)
    if not known:
        own = [text.partition("/")[0] for one in to.interfaces for text in one.addresses]
        listed = ", ".join(address for address in own if not address.startswith(("127.", "::1")))
        return f"it has no such address; set `address:` to one of its own: {listed}"
    network = next((network_of(to, address) for address, _ in way.errors), None)
    return f"on {to.name}: {door.opening(network)}"


def idle_networks(found: Sequence[Faster]) -> dict[str, list[Finding]]:
    """Findings for hosts that are on a faster network than the one that is used."""
    told: dict[str, list[Finding]] = {}
    for one in found:
        other = f"{one.to}: `address: {one.address}`"
        silent = "" if one.answered else ", but it does not answer there"
        finding = Finding(
            "limits",
            f"{one.source} reaches {one.to} over {one.used}; both are on {one.better}{silent}",
            f"in the cluster file, {other}"
            if one.answered
            else "let TCP through there, then look again",
        )
        told.setdefault(one.to, []).append(finding)
    return told
