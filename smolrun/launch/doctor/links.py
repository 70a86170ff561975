"""Which host reaches which, over which interfaces, and whether a faster route lies idle. Pure.

`on_host/network.py` lists the interfaces, `on_host/reach.py` which host reached which. A mesh needs
one direction of each pair: a blocked one is a warning, and only a pair that is blocked in both
directions prevents a run.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

# In Mbit/s, for interfaces that do not tell: IP over Thunderbolt 3 carries 10 Gbit/s and more.
_USUAL_SPEED = {
    "thunderbolt": 10_000.0,
    "ethernet": 1_000.0,
    "wifi": 300.0,
    "vpn": 50.0,
    "loopback": 20_000.0,
}
_MUCH_FASTER = 1.5
_NAMES = {"thunderbolt": "Thunderbolt", "ethernet": "Ethernet", "wifi": "Wi-Fi", "vpn": "VPN"}
_SHARED_KINDS = ("thunderbolt", "ethernet", "wifi", "other")
_MOST_ADDRESSES = 6


@dataclass(frozen=True)
class NetworkInterface:
    """A network interface of a host. `addresses` are written 10.0.0.1/24."""

    name: str
    kind: str
    speed_mbps: float | None
    addresses: tuple[str, ...]

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> NetworkInterface:
        """From an interface of `on_host/network.py`."""
        addresses = tuple(text for text in row["addresses"] if _is_address(text))
        return cls(row["name"], row["kind"], row["speed_mbps"], addresses)

    @property
    def speed(self) -> float:
        """Mbit/s: as reported, or as usual for its kind."""
        return self.speed_mbps or _USUAL_SPEED.get(self.kind, 100.0)

    def __str__(self) -> str:
        """Thunderbolt (bridge0) or Ethernet (eth0, 1,000 Mbit/s)."""
        speed = f", {self.speed_mbps:,.0f} Mbit/s" if self.speed_mbps else ""
        return f"{_NAMES.get(self.kind, self.kind)} ({self.name}{speed})"


@dataclass(frozen=True)
class HostAddresses:
    """What is known of one host: where the cluster file says it is, and what it has."""

    name: str
    addresses: tuple[str, ...]
    interfaces: tuple[NetworkInterface, ...]

    def interface(self, address: str | None) -> NetworkInterface | None:
        """The interface that has this address."""
        wanted = _plain(address or "")
        for one in self.interfaces:
            if wanted is not None and wanted in (_plain(text) for text in one.addresses):
                return one
        return None


@dataclass(frozen=True)
class Route:
    """One direction: the address at which `to` was reached, or why it was not."""

    source: str
    to: str
    address: str | None
    local: str | None
    errors: tuple[tuple[str, str], ...]

    @property
    def is_open(self) -> bool:
        """Whether it was reached where the cluster file says it is."""
        return self.address is not None


@dataclass(frozen=True)
class FasterNetwork:
    """Two hosts that could use a faster network than they do; `address` is of `to` on that."""

    source: str
    to: str
    address: str
    used: NetworkInterface
    better: NetworkInterface
    answered: bool


def to_dial(source: HostAddresses, to: HostAddresses) -> list[str]:
    """Where to look for a host: as configured, then on every network that both are on."""
    found = [*to.addresses, *(address for _, address in _shared(source, to))]
    return list(dict.fromkeys(found))[:_MOST_ADDRESSES]


def _shared(source: HostAddresses, to: HostAddresses) -> Iterator[tuple[NetworkInterface, str]]:
    """Interfaces of `source` and addresses of `to` on one network, the fastest first."""
    pairs = [
        (min(mine.speed, other.speed), mine, text.partition("/")[0])
        for mine in source.interfaces
        for other in to.interfaces
        if mine.kind in _SHARED_KINDS and other.kind in _SHARED_KINDS
        for text in other.addresses
        if _on_one_network(mine, text)
    ]
    for _, mine, address in sorted(pairs, key=lambda pair: -pair[0]):
        yield mine, address


def _on_one_network(mine: NetworkInterface, address: str) -> bool:
    other = ipaddress.ip_interface(address)
    # An IPv6 address of one cable says nothing without the name of the cable.
    if other.version == 6 and other.is_link_local:
        return False
    networks = [ipaddress.ip_interface(text) for text in mine.addresses]
    return any(one.network == other.network and one.ip != other.ip for one in networks)


def routes(
    hosts: Mapping[str, HostAddresses], reach: Mapping[str, Mapping[str, Any]]
) -> list[Route]:
    """Every direction between hosts that could be asked, pair by pair."""
    found = []
    for first, second in combinations(hosts, 2):
        for source, to in ((first, second), (second, first)):
            rows = reach.get(source, {}).get("dialed", {}).get(to)
            if rows is not None:
                found.append(_route(source, to, hosts[to].addresses, rows))
    return found


def _route(source: str, to: str, configured: Sequence[str], rows: Sequence[Any]) -> Route:
    rows = [row for row in rows if row["address"] in configured]
    good: Mapping[str, Any] = next((row for row in rows if row["error"] is None), {})
    errors = tuple((row["address"], row["error"]) for row in rows if row["error"] is not None)
    return Route(source, to, good.get("address"), good.get("local"), errors)


def unreachable_hosts(found: Sequence[Route]) -> list[str]:
    """The fewest hosts without which every pair is linked in one direction at least.

    Hosts with equally many broken pairs are all named: the cause is ambiguous.
    """
    state: dict[frozenset[str], bool] = {}
    for route in found:
        pair = frozenset((route.source, route.to))
        state[pair] = state.get(pair, False) or route.is_open
    broken = [pair for pair, is_open in state.items() if not is_open]
    blamed: list[str] = []
    while broken:
        names = list(dict.fromkeys(name for pair in broken for name in sorted(pair)))
        counts = {name: sum(name in pair for pair in broken) for name in names}
        worst = max(counts.values())
        now = [name for name in names if counts[name] == worst]
        blamed += now
        broken = [pair for pair in broken if not pair & set(now)]
    return blamed


def faster_networks(
    hosts: Mapping[str, HostAddresses],
    found: Sequence[Route],
    reach: Mapping[str, Mapping[str, Any]],
) -> list[FasterNetwork]:
    """For each direction that is open, a much faster network that both hosts are on."""
    found_faster = []
    for route in found:
        source, to = hosts[route.source], hosts[route.to]
        mine, theirs = source.interface(route.local), to.interface(route.address)
        if mine is None or theirs is None:
            continue
        used = min((mine, theirs), key=lambda one: one.speed)
        for better, address in _shared(source, to):
            speed = min(better.speed, (to.interface(address) or better).speed)
            if speed >= used.speed * _MUCH_FASTER and better.kind != "loopback":
                rows = reach[route.source]["dialed"][route.to]
                answered = any(r["address"] == address and r["error"] is None for r in rows)
                found_faster.append(
                    FasterNetwork(route.source, route.to, address, used, better, answered)
                )
                break
    return found_faster


def best_addresses(
    hosts: Mapping[str, HostAddresses], name: str, reach: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    """The addresses of a host at which all others reached it, the fastest network first.

    Empty where there is none, or no other host was probed.
    """
    rows = [
        reply["dialed"][name]
        for source, reply in reach.items()
        if source in hosts and name in reply["dialed"]
    ]
    if not rows:
        return []
    good = [{row["address"] for row in one if row["error"] is None} for one in rows]
    common = set.intersection(*good)
    order = [row["address"] for row in rows[0] if row["address"] in common]

    def speed(address: str) -> float:
        interface = hosts[name].interface(address)
        return interface.speed if interface is not None else 0.0

    return sorted(order, key=lambda address: -speed(address))


def network_of(host: HostAddresses, address: str | None) -> str | None:
    """The network of an address of that host, as firewalls write it."""
    interface, wanted = host.interface(address), _plain(address or "")
    for text in interface.addresses if interface is not None else ():
        if _plain(text) == wanted:
            return str(ipaddress.ip_interface(text).network)
    return None


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_interface(text)
    except ValueError:
        return False
    return True


def _plain(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(text.partition("/")[0].partition("%")[0])
    except ValueError:
        return None
