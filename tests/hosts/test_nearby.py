"""Discovery and pairing on hosts with real multicast and no SSH.

All runs in this process, each part on the network of its host.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from zeroconf import IPVersion, ServiceInfo, Zeroconf

from smolrun.launch.nearby.discovery import (
    SERVICE_TYPE,
    Announcement,
    Browser,
    NearbyService,
    choose,
    key_hint,
)
from smolrun.launch.nearby.messages import PairingError, WrongCode
from smolrun.launch.nearby.pairing import Paired, connect
from tests.hosts.host import Host
from tests.hosts.lab import Lab
from tests.hosts.network import command
from tests.hosts.tap import Tap
from tests.launch.nearby.machines import Coordinator, machine
from tests.waiting import SOON_S, until

pytestmark = pytest.mark.hosts

# Enough for announcements that are repeated every 10 seconds, on a machine of any load.
FOUND_S = 60.0


class Nearby:
    """Coordinators, joiners and browsers on hosts; all are closed at the end of a test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._undo = ExitStack()

    def coordinator(self, host: Host, name: str = "home") -> tuple[Coordinator, Announcement]:
        me = machine(self.folder / host.name, f"{name}{time.monotonic_ns()}")
        server = host.call(lambda: Coordinator(me))
        self._undo.callback(server.close)
        service = NearbyService(
            role="coordinator",
            name=name,
            machine=me.name,
            port=server.port,
            key=key_hint(me.key.fingerprint),
            ranks=3,
            present=1,
        )
        announcement = host.call(lambda: Announcement(service))
        self._undo.callback(announcement.close)
        return server, announcement

    def browser(self, host: Host) -> Browser:
        browser = host.call(Browser)
        self._undo.callback(browser.close)
        return browser

    def join(self, host: Host, found: NearbyService, code: str, **options: Any) -> Paired:
        me = machine(self.folder / host.name, "joiner")
        paired = host.call(lambda: connect(found.addresses, found.port, me, code=code, **options))
        self._undo.callback(paired.socket.close)
        return paired

    def close(self) -> None:
        self._undo.close()


@pytest.fixture
def nearby(tmp_path: Path) -> Iterator[Nearby]:
    with contextlib.closing(Nearby(tmp_path)) as all_of_it:
        yield all_of_it


def find(
    nearby: Nearby, host: Host, is_enough: Callable[[list[NearbyService]], bool] = bool
) -> list[NearbyService]:
    browser = nearby.browser(host)
    found = host.call(lambda: browser.wait_for(is_enough, FOUND_S))
    assert is_enough(found), (found, browser.problem)
    return found


def works(nearby: Nearby, server: Coordinator, host: Host, found: NearbyService) -> Paired:
    """A machine on `host` pairs with what it has found, and the two can talk."""
    paired = nearby.join(host, found, server.code)
    other = server.paired.get(timeout=SOON_S)
    paired.socket.sendall(b"hello")
    other.socket.settimeout(SOON_S)
    assert other.socket.recv(100) == b"hello"
    other.socket.close()
    return paired


def test_a_cluster_is_found_and_joined_while_nothing_readable_is_on_the_wire(
    lab3: Lab, nearby: Nearby
):
    one, two, _ = lab3.hosts
    with Tap(two) as tap:
        server, announcement = nearby.coordinator(one)
        (found,) = find(nearby, two)
        assert (found.name, found.ranks, found.present) == ("home", 3, 1)
        before = len(tap.beginnings)
        paired = nearby.join(two, found, server.code, remember=True)
        other = server.paired.get(timeout=SOON_S)
        other.socket.sendall(b"a secret of the run")
        assert paired.socket.recv(100) == b"a secret of the run"
        until(lambda: len(tap.beginnings) > before)
    wire = tap.beginnings
    assert b"home" in wire  # the announcement
    for secret in (server.code, server.code.replace("-", ""), "joiner", "a secret of the run"):
        assert secret.encode() not in wire, secret
    for word in (b"Challenge", b"Hello", b"public_key", b"share", b"nonce", b"BEGIN"):
        assert word not in wire[before:], word
    announcement.update(present=2)
    find(nearby, two, lambda found: [one.present for one in found] == [2])


def test_two_clusters_of_one_name_on_two_machines(lab3: Lab, nearby: Nearby):
    one, two, three = lab3.hosts
    servers = [nearby.coordinator(one), nearby.coordinator(two)]
    found = find(nearby, three, lambda found: len(choose(found, "home")) == 2)
    for server, announcement in servers:
        (mine,) = choose(found, announcement.service.id)
        works(nearby, server, three, mine)
    (other,) = choose(found, servers[1][1].service.id)
    with pytest.raises(WrongCode):
        nearby.join(three, other, servers[0][0].code)


def test_two_coordinators_on_one_machine(lab3: Lab, nearby: Nearby):
    one, two, _ = lab3.hosts
    servers = [nearby.coordinator(one, "left"), nearby.coordinator(one, "right")]
    found = find(nearby, two, lambda found: len(found) == 2)
    for (server, _), service in zip(servers, found, strict=True):
        works(nearby, server, two, service)


def test_ipv6_only(make_lab: Callable[..., Lab], nearby: Nearby):
    one, two = make_lab(hosts=2).hosts
    for host in (one, two):
        _ip(host, "-4", "address", "flush", "dev", "eth0")
    server, _ = nearby.coordinator(one)
    (found,) = find(nearby, two)
    assert all(":" in address for address in found.addresses)
    paired = works(nearby, server, two, found)
    assert ":" in paired.address


def test_addresses_that_are_not_usable_yet(make_lab: Callable[..., Lab], nearby: Nearby):
    """IPv6's duplicate address detection runs while both start, and there is no other address."""
    one, two = make_lab(hosts=2).hosts
    for host in (one, two):
        _ip(host, "address", "flush", "dev", "eth0")
    server, _ = nearby.coordinator(one)
    browser = nearby.browser(two)
    for host in (one, two):
        _ip(host, "-6", "address", "add", f"{host.address6}/64", "dev", "eth0")
    until(lambda: bool(browser.found()), FOUND_S)
    (found,) = browser.found()
    assert one.address6 in found.addresses
    works(nearby, server, two, found)


def test_two_interfaces(make_lab: Callable[..., Lab], nearby: Nearby):
    """A machine between two networks is found and joined from both."""
    lab = make_lab(hosts=3)
    one, two, three = lab.hosts
    _second_network(lab, {one: "10.199.7.1", three: "10.199.7.3"})
    three.cut()  # the first network
    server, announcement = nearby.coordinator(one)
    (here,) = find(nearby, two)
    (there,) = find(nearby, three)
    assert here.id == there.id == announcement.service.id
    assert {one.address, "10.199.7.1"} <= set(here.addresses)
    assert works(nearby, server, two, here).address != "10.199.7.1"
    assert works(nearby, server, three, there).address == "10.199.7.1"


@pytest.mark.soak
def test_a_cable_that_is_cut_when_the_cluster_starts(make_lab: Callable[..., Lab], nearby: Nearby):
    one, two = make_lab(hosts=2).hosts
    browser = nearby.browser(two)
    two.cut()
    server, announcement = nearby.coordinator(one)
    # Its first announcements and the first questions are over.
    until(lambda: announcement._responder.zeroconf is not None)
    assert two.call(lambda: browser.wait_for(bool, 6.0)) == []
    with pytest.raises(PairingError, match=f"port {server.port}"):
        nearby.join(two, replace(announcement.service, addresses=(one.address,)), server.code)
    two.heal()
    found = two.call(lambda: browser.wait_for(bool, FOUND_S))
    works(nearby, server, two, found[0])
    two.cut()
    announcement.update(present=2)
    two.heal()
    until(lambda: [one.present for one in browser.found()] == [2], FOUND_S)


def test_who_ends_is_no_longer_shown(lab3: Lab, nearby: Nearby):
    one, two, _ = lab3.hosts
    _, announcement = nearby.coordinator(one)
    browser = nearby.browser(two)
    until(lambda: bool(browser.found()), FOUND_S)
    start = time.monotonic()
    announcement.close()
    until(lambda: not browser.found(), FOUND_S)
    print(f"gone after {time.monotonic() - start:.1f} s")


@pytest.mark.soak
def test_who_dies_without_a_word_is_no_longer_shown(make_lab: Callable[..., Lab], nearby: Nearby):
    one, two = make_lab(hosts=2).hosts
    nearby.coordinator(one)
    browser = nearby.browser(two)
    until(lambda: bool(browser.found()), FOUND_S)
    one.cut_out()
    start = time.monotonic()
    until(lambda: not browser.found(), 120.0)
    print(f"gone after {time.monotonic() - start:.1f} s")


def test_hostile_announcements_beside_an_honest_one(lab3: Lab, nearby: Nearby):
    one, two, three = lab3.hosts
    evil = "\x1b[2J\x07\N{RIGHT-TO-LEFT OVERRIDE}$(reboot)\n".encode() + b"\xff" * 200
    good = {"v": b"1", "role": b"coordinator", "smolrun": evil[:100], "key": evil[:99]}
    texts: list[dict[str, bytes]] = [
        {**good, "id": b"0123abcd", "name": evil, "machine": evil, "ranks": b"-9"},
        {**good, "id": evil[:50], "name": b"home"},
        {"x": b"y"},
    ]
    zeroconf = three.call(lambda: Zeroconf(ip_version=IPVersion.V4Only))
    try:
        for number, properties in enumerate(texts):
            zeroconf.register_service(
                ServiceInfo(
                    SERVICE_TYPE,
                    f"evil {number}.{SERVICE_TYPE}",
                    port=65535,
                    properties=properties,
                    server=f"evil{number}.local.",
                    parsed_addresses=["127.0.0.1", "255.255.255.255"],
                ),
                strict=False,
            )
        server, honest = nearby.coordinator(one)
        found = find(nearby, two, lambda found: len(found) == 2)
    finally:
        zeroconf.close()
    for service in found:
        assert (service.name + service.machine + service.key + service.smolrun).isprintable()
        assert len(service.name) <= 60
    assert {service.id for service in found} == {"0123abcd", honest.service.id}
    (mine,) = choose(found, honest.service.id)
    works(nearby, server, two, mine)


def test_a_flood_of_strangers_does_not_keep_a_machine_out(lab3: Lab, nearby: Nearby):
    """One stranger opens connections as fast as it can; another machine still gets in."""
    one, two, three = lab3.hosts
    server, _ = nearby.coordinator(one)
    (found,) = find(nearby, two)
    over = threading.Event()
    opened = [0]

    def flood() -> None:
        kept: list[socket.socket] = []
        while not over.is_set():
            with contextlib.suppress(OSError):
                sock = socket.create_connection((one.address, server.port), 2.0)
                sock.sendall(b"\x16\x03\x01\x00\xff")
                kept.append(sock)
                opened[0] += 1
            while len(kept) > 200:
                kept.pop(0).close()
        for sock in kept:
            sock.close()

    thread = threading.Thread(target=lambda: three.call(flood), daemon=True)
    thread.start()
    try:
        until(lambda: opened[0] > 300, FOUND_S)
        start = time.monotonic()
        works(nearby, server, two, found)
        print(f"joined in {time.monotonic() - start:.2f} s beside {opened[0]} connections")
    finally:
        over.set()
        thread.join(SOON_S)
    assert server.codes == [server.code]


def _ip(host: Host, *words: str) -> None:
    command("ip", "-n", host._to_host[0], *words)


def _second_network(lab: Lab, addresses: dict[Host, str]) -> None:
    """A bridge beside the first one, and a second cable of each of these hosts to it."""
    switch = f"{lab.name}-switch"
    command("ip", "-n", switch, "link", "add", "br1", "type", "bridge", "mcast_snooping", "0")
    command("ip", "-n", switch, "link", "set", "br1", "up")
    for host, address in addresses.items():
        namespace = host._to_host[0]
        cable = f"q{host.number}"
        peer = ("type", "veth", "peer", "name", "eth1", "netns", namespace)
        command("ip", "-n", switch, "link", "add", cable, *peer)
        command("ip", "-n", switch, "link", "set", cable, "master", "br1", "up")
        _ip(host, "address", "add", f"{address}/24", "dev", "eth1")
        _ip(host, "link", "set", "eth1", "up")
