"""Discovery: who announces itself in the local network, by multicast DNS (zeroconf).

    announcement = Announcement(NearbyService(role="coordinator", name="home", ...))
    with Browser() as browser:
        browser.wait_for(lambda found: bool(found), timeout_s=5.0)

What is announced is public and proves nothing: names, versions and addresses of others are bounded
and safe to show, and pairing.py decides whom to trust. IPv4 and IPv6, on all interfaces, also on
those that get an address later (a cable, Wi-Fi, IPv6's duplicate address detection).
Source: RFC 6762 (mDNS), RFC 6763 (DNS-SD).
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from types import TracebackType

import ifaddr
from zeroconf import IPVersion, ServiceBrowser, ServiceInfo, ServiceStateChange, Zeroconf

from smolrun.launch.nearby.remembered import Role, shown_name

SERVICE_TYPE = "_smolrun._tcp.local."
# Why nothing may be found, and what helps.
NOTHING_FOUND = (
    "nothing announces itself here. Is the other machine in the same network, and is `smolrun "
    "cluster=nearby` running on it? Guest Wi-Fi, client isolation, a VLAN, a VPN or a firewall "
    "(UDP port 5353) can block multicast while all else works: then `smolrun task=join "
    "join.address=HOST:PORT` with the address that `smolrun cluster=nearby` shows"
)
_MOST_FOUND = 256  # of a network that announces more, the rest is ignored
_MOST_ADDRESSES = 16
_MOST_RANKS = 10_000
_LOOK_S = 1.0  # between two looks at this machine's own addresses
_REPEAT_S = 10.0  # announcements and questions again, as multicast is often lost on Wi-Fi
_TTL_S = 30  # who has died without a word is no longer shown then
_REQUEST_MS = 500  # for what a short announcement left out
_CLOSE_S = 3.0
_ROLES: dict[str, Role] = {"coordinator": "coordinator", "joiner": "joiner"}
_ID = re.compile(r"[0-9a-f]{8}")

# Its warnings are about single interfaces; what matters becomes `problem`.
logging.getLogger("zeroconf").setLevel(logging.CRITICAL)


@dataclass(frozen=True)
class NearbyService:
    """What one process announces: a cluster that machines can join (role `coordinator`), or a
    machine that waits to be needed (role `joiner`, which listens nowhere: `port` is 0).

    `id` is another for each start, so it distinguishes two of one name. `key` begins like the
    fingerprint of its key without `SHA256:`, a hint and no proof. `ranks` and `present` are those
    of the run, wanted and there.
    """

    role: Role
    name: str
    machine: str
    port: int
    key: str = ""
    ranks: int = 0
    present: int = 0
    id: str = field(default_factory=lambda: secrets.token_hex(4))
    smolrun: str = field(default_factory=lambda: version("smolrun"))
    addresses: tuple[str, ...] = ()

    def is_of_key(self, fingerprint: str) -> bool:
        """Whether it says that it is the machine with this key."""
        return bool(self.key) and fingerprint.removeprefix("SHA256:").startswith(self.key)


def key_hint(fingerprint: str) -> str:
    """The `key` of a NearbyService."""
    return fingerprint.removeprefix("SHA256:")[:12]


def parse(
    properties: Mapping[bytes, bytes | None], port: int | None, addresses: Sequence[str]
) -> NearbyService | None:
    """What a foreign announcement says, bounded and safe to show; None for one that is not of
    smolrun, of another format, or invalid."""
    texts = {
        key.decode("ascii", "replace"): (value or b"").decode("utf-8", "replace")
        for key, value in properties.items()
    }
    role = _ROLES.get(texts.get("role", ""))
    if texts.get("v") != "1" or role is None:
        return None
    if not _ID.fullmatch(texts.get("id", "")) or not addresses:
        return None
    if role == "coordinator" and not 0 < (port or 0) < 65536:
        return None
    return NearbyService(
        role=role,
        name=shown_name(texts.get("name", "")),
        machine=shown_name(texts.get("machine", "")),
        port=port or 0,
        key=shown_name(texts.get("key", ""))[:12] if texts.get("key") else "",
        ranks=_number(texts.get("ranks", "")),
        present=_number(texts.get("present", "")),
        id=texts["id"],
        smolrun=shown_name(texts.get("smolrun", ""))[:20],
        addresses=tuple(dict.fromkeys(addresses))[:_MOST_ADDRESSES],
    )


def choose(found: Sequence[NearbyService], name: str | None) -> list[NearbyService]:
    """The clusters of that name, or of that id where `name` is one; all clusters for None. Which
    of several of one name is meant, only a person or an id can say."""
    clusters = [one for one in found if one.role == "coordinator"]
    if name is None:
        return clusters
    return [one for one in clusters if name == one.id] or [
        one for one in clusters if name == one.name
    ]


class _Responder:
    """A Zeroconf in a thread of its own, which follows the addresses of this machine.

    `on_open` is called once, `on_change` after each change of addresses, after each `refresh` and
    every 10 seconds, both in that thread.
    """

    def __init__(
        self,
        name: str,
        on_open: Callable[[Zeroconf, tuple[str, ...]], None],
        on_change: Callable[[Zeroconf, tuple[str, ...]], None],
    ) -> None:
        self.problem: str | None = None
        self.zeroconf: Zeroconf | None = None
        self._on_open = on_open
        self._on_change = on_change
        self._is_closed = False
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def refresh(self) -> None:
        """What is announced has changed. Returns at once."""
        self._wake.set()

    def close(self) -> None:
        """Take back what is announced. Never raises; takes 3 seconds at most."""
        self._is_closed = True
        self._wake.set()
        self._thread.join(_CLOSE_S)

    def _run(self) -> None:
        before: tuple[str, ...] | None = None
        next_repeat = 0.0
        while not self._is_closed:
            now = own_addresses()
            if is_stale := self._wake.is_set():
                self._wake.clear()
            if now != before or is_stale or time.monotonic() >= next_repeat:
                next_repeat = time.monotonic() + _REPEAT_S
                # zeroconf reports what fails on an interface by many kinds of exceptions; the next
                # look is another chance.
                try:
                    self._follow(now, has_moved=now != before)
                    before, self.problem = now, None
                except Exception as error:
                    before = None
                    self.problem = f"multicast DNS does not work here: {error}"
            if not self._is_closed:
                self._wake.wait(_LOOK_S)
        if self.zeroconf is not None:
            with contextlib.suppress(Exception):  # the network may be gone
                self.zeroconf.close()

    def _follow(self, addresses: tuple[str, ...], *, has_moved: bool) -> None:
        if self.zeroconf is not None:
            if has_moved:
                self.zeroconf.update_interfaces()
            self._on_change(self.zeroconf, addresses)
            return
        opened = _open()
        try:
            self._on_open(opened, addresses)
        except BaseException:
            opened.close()
            raise
        self.zeroconf = opened


class Announcement:
    """Announces a service from now until `close`. Returns at once; others see it a second later."""

    def __init__(self, service: NearbyService) -> None:
        self.service = service  # what is announced now
        self._responder = _Responder("smolrun-announcement", self._register, self._update)

    @property
    def problem(self) -> str | None:
        """Why nothing can be announced at the moment."""
        return self._responder.problem

    def update(self, *, present: int, ranks: int | None = None) -> None:
        """Other numbers of ranks. Returns at once; others see them a second later."""
        wanted = self.service.ranks if ranks is None else ranks
        self.service = replace(self.service, present=present, ranks=wanted)
        self._responder.refresh()

    def close(self) -> None:
        """Others no longer see it. Never raises; takes 3 seconds at most."""
        self._responder.close()

    def _register(self, opened: Zeroconf, addresses: tuple[str, ...]) -> None:
        opened.register_service(_info(self.service, addresses), strict=False)

    def _update(self, opened: Zeroconf, addresses: tuple[str, ...]) -> None:
        opened.update_service(_info(self.service, addresses))


class Browser:
    """Looks for services from now until `close`; `found` has those that are there."""

    def __init__(self) -> None:
        self._names: dict[str, None] = {}
        self._changed = threading.Condition()
        self._browser: ServiceBrowser | None = None
        self._responder = _Responder("smolrun-browser", self._browse, self._browse)

    def __enter__(self) -> Browser:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def problem(self) -> str | None:
        """Why nothing can be found at the moment."""
        return self._responder.problem

    def found(self) -> list[NearbyService]:
        """Sorted by name and id. May block for half a second for each that is new."""
        opened = self._responder.zeroconf
        if opened is None:
            return []
        with self._changed:
            names = list(self._names)
        present = []
        for name in names:
            if (service := _look_up(opened, name)) is not None:
                present.append(service)
            else:
                self._forget(name)
        return sorted(_newest(present), key=lambda one: (one.name, one.id))

    def wait_for(
        self, is_enough: Callable[[list[NearbyService]], bool], timeout_s: float
    ) -> list[NearbyService]:
        """What is found once that is enough, or after `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while not is_enough(found := self.found()) and (left := deadline - time.monotonic()) > 0:
            with self._changed:
                self._changed.wait(min(left, _LOOK_S))
        return found

    def close(self) -> None:
        """Never raises; takes 3 seconds at most."""
        self._responder.close()

    def _browse(self, opened: Zeroconf, addresses: tuple[str, ...]) -> None:
        # A new one asks again, and reports again what it knows.
        if self._browser is not None:
            self._browser.cancel()
        self._browser = ServiceBrowser(opened, SERVICE_TYPE, handlers=[self._take])

    def _forget(self, name: str) -> None:
        with self._changed:
            self._names.pop(name, None)

    def _take(
        self, zeroconf: Zeroconf, service_type: str, name: str, state_change: ServiceStateChange
    ) -> None:
        with self._changed:
            if state_change is ServiceStateChange.Removed:
                self._names.pop(name, None)
            elif len(self._names) < _MOST_FOUND:
                self._names[name] = None
            self._changed.notify_all()


def _newest(services: Sequence[NearbyService]) -> Iterable[NearbyService]:
    """Without clusters in whose place, on the same machine and port, another came later: they have
    died without a word, and their announcements live on for a while."""
    places = {}
    for one in services:
        is_cluster = one.role == "coordinator"
        places[(one.key, one.machine, one.port) if is_cluster else one.id] = one
    return places.values()


def own_addresses() -> tuple[str, ...]:
    """This machine's addresses that can be connected to: IPv4, IPv6, then IPv6's link-local ones;
    loopback's only where there is no other."""
    found = []
    for adapter in ifaddr.get_adapters():
        for one in adapter.ips:
            text = one.ip if isinstance(one.ip, str) else one.ip[0]
            scope = 0 if isinstance(one.ip, str) else adapter.index or 0
            with contextlib.suppress(ValueError):
                ip = _ip(text)
                if _can_be_used(ip, scope):
                    found.append(ip)
    outer = [ip for ip in found if not ip.is_loopback] or found
    return tuple(sorted({str(ip) for ip in outer}, key=_rank))


def _can_be_used(ip: ipaddress.IPv4Address | ipaddress.IPv6Address, scope: int) -> bool:
    """Not while IPv6's duplicate address detection runs: a second or two after a link is up."""
    family = socket.AF_INET if ip.version == 4 else socket.AF_INET6
    place = (str(ip), 0) if ip.version == 4 else (str(ip), 0, 0, scope)
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.bind(place)
    except OSError:
        return False
    return True


def _open() -> Zeroconf:
    try:
        return Zeroconf(ip_version=IPVersion.All)
    except (OSError, RuntimeError):  # a system without IPv6
        return Zeroconf(ip_version=IPVersion.V4Only)


def _info(service: NearbyService, addresses: tuple[str, ...]) -> ServiceInfo:
    texts = {
        "v": "1",
        "role": service.role,
        "name": shown_name(service.name),
        "machine": shown_name(service.machine),
        "id": service.id,
        "key": service.key,
        "smolrun": service.smolrun,
        "ranks": str(service.ranks),
        "present": str(service.present),
    }
    return ServiceInfo(
        SERVICE_TYPE,
        f"smolrun-{service.id}.{SERVICE_TYPE}",
        port=service.port,
        properties={key: value.encode() for key, value in texts.items()},
        server=f"smolrun-{service.id}.local.",
        parsed_addresses=list(addresses[:_MOST_ADDRESSES]),
        host_ttl=_TTL_S,
        other_ttl=_TTL_S,
    )


def _look_up(opened: Zeroconf, name: str) -> NearbyService | None:
    """What that service says; its addresses with the scope of the interface that they came by."""
    info = ServiceInfo(SERVICE_TYPE, name)
    try:
        if not info.load_from_cache(opened):
            info.request(opened, _REQUEST_MS)
        addresses = info.parsed_scoped_addresses(IPVersion.All)
        return parse(info.properties, info.port, _reachable(addresses))
    except Exception:  # whatever a foreign announcement makes zeroconf raise
        return None


def _reachable(addresses: Sequence[str]) -> Sequence[str]:
    """In the order of `own_addresses`, without those of loopback, which a machine announces that
    has no other address yet; only a machine without any network can use them, as the service is
    on itself."""
    ranked = sorted(addresses, key=_rank)
    outer = [one for one in ranked if not _ip(one).is_loopback]
    return outer if outer or not all(_ip(one).is_loopback for one in own_addresses()) else ranked


def _rank(address: str) -> tuple[bool, int, str]:
    ip = _ip(address)
    return ip.is_link_local, ip.version, address


def _ip(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """Without the scope, as in fe80::1%3."""
    return ipaddress.ip_address(address.partition("%")[0])


def _number(text: str) -> int:
    return min(int(text), _MOST_RANKS) if re.fullmatch(r"[0-9]{1,6}", text) else 0
