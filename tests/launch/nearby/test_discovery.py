"""Discovery without a network; tests/hosts/test_nearby.py has real multicast."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import pytest
from zeroconf import ServiceInfo

from smolrun.launch.nearby import discovery
from smolrun.launch.nearby.discovery import (
    Announcement,
    Browser,
    NearbyService,
    choose,
    key_hint,
    own_addresses,
    parse,
)
from smolrun.launch.nearby.machine_key import MachineKey
from tests.waiting import SOON_S, until

HOME = NearbyService(role="coordinator", name="home", machine="anna@mini", port=4711, ranks=3)
GOOD = {
    b"v": b"1",
    b"role": b"coordinator",
    b"name": b"home",
    b"machine": b"anna@mini",
    b"id": b"0123abcd",
    b"ranks": b"3",
    b"present": b"1",
    b"smolrun": b"0.1.0",
}


def test_what_is_announced_is_what_is_found():
    key = MachineKey.make().fingerprint
    service = NearbyService(
        role="coordinator",
        name="Anna's cluster",
        machine="anna@mini",
        port=4711,
        key=key_hint(key),
        ranks=3,
        present=2,
        addresses=("10.0.0.1", "fd00::1"),
    )
    info = discovery._info(service, service.addresses)
    found = parse(info.properties, info.port, info.parsed_addresses())
    assert found == service
    assert found.is_of_key(key)
    assert not found.is_of_key(MachineKey.make().fingerprint)
    assert not HOME.is_of_key(key)


def test_a_long_name_fits_into_an_announcement():
    service = NearbyService(
        role="joiner", name="\N{GRINNING FACE}" * 200, machine="x" * 300, port=0
    )
    info = discovery._info(service, ("10.0.0.1",))
    found = parse(info.properties, 0, ["10.0.0.1"])
    assert found is not None
    assert found.name == "\N{GRINNING FACE}" * 60


@pytest.mark.parametrize(
    "changes",
    [
        {b"v": b"2"},
        {b"v": None},
        {b"role": b"root"},
        {b"id": b"../../ab"},
        {b"id": b"0123abcd0"},
        {b"id": b""},
    ],
)
def test_what_is_not_of_this_format_is_not_shown(changes: dict[bytes, bytes | None]):
    assert parse(GOOD | changes, 4711, ["10.0.0.1"]) is None


@pytest.mark.parametrize(("port", "addresses"), [(0, ["10.0.0.1"]), (None, ["10.0.0.1"]), (1, [])])
def test_a_cluster_without_a_place_is_not_shown(port: int | None, addresses: list[str]):
    assert parse(GOOD, port, addresses) is None


def test_hostile_texts_are_bounded_and_safe_to_show():
    evil = "\x1b[2J\x07\N{RIGHT-TO-LEFT OVERRIDE}\nroot@bank ".encode() + b"\xff" * 250
    found = parse(
        dict.fromkeys(GOOD, evil) | {b"v": b"1", b"role": b"joiner", b"id": b"0123abcd"},
        0,
        [f"10.0.0.{n}" for n in range(99)],
    )
    assert found is not None
    for text in (found.name, found.machine, found.key, found.smolrun):
        assert text.isprintable()
        assert len(text) <= 60
    assert (found.ranks, found.present) == (0, 0)
    assert len(found.addresses) == 16


@pytest.mark.parametrize(
    ("text", "number"),
    [(b"3", 3), (b"-1", 0), (b"999999", 10_000), (b"1e9", 0), (b"", 0), ("٣".encode(), 0)],
)
def test_numbers_of_others(text: bytes, number: int):
    found = parse(GOOD | {b"ranks": text}, 4711, ["10.0.0.1"])
    assert found is not None
    assert found.ranks == number


def test_clusters_are_chosen_by_name_or_id():
    one = NearbyService(role="coordinator", name="home", machine="a", port=1, id="00000001")
    two = NearbyService(role="coordinator", name="home", machine="b", port=1, id="00000002")
    three = NearbyService(role="coordinator", name="00000001", machine="c", port=1, id="00000003")
    waiting = NearbyService(role="joiner", name="home", machine="d", port=0)
    found = [one, two, three, waiting]
    assert choose(found, None) == [one, two, three]
    assert choose(found, "home") == [one, two]
    assert choose(found, "00000002") == [two]
    assert choose(found, "00000001") == [one]  # an id before a name that looks like one
    assert choose(found, "away") == []


def test_a_cluster_in_the_place_of_one_that_died_is_the_one_that_is_shown():
    def cluster(number: int, port: int, machine: str) -> NearbyService:
        service = NearbyService(role="coordinator", name="home", machine=machine, port=port)
        return replace(service, id=f"0000000{number}", key="abc", addresses=(f"10.0.0.{number}",))

    found = [cluster(1, 1, "anna@a"), cluster(2, 2, "anna@a"), cluster(3, 1, "anna@b")]
    waiting = [replace(HOME, role="joiner", port=0, id=f"0000001{n}") for n in range(2)]
    assert list(discovery._newest([*found, *waiting])) == [*found, *waiting]
    after = cluster(4, 1, "anna@a")
    assert sorted(one.id for one in discovery._newest([*found, after])) == [
        "00000002",
        "00000003",
        "00000004",
    ]


def test_own_addresses_can_be_connected_to():
    found = own_addresses()
    assert found
    assert len(set(found)) == len(found)


def test_loopback_of_another_machine_is_no_address(monkeypatch: pytest.MonkeyPatch):
    found = ["127.0.0.1", "::1", "fe80::1%3", "fd00::1", "10.0.0.1"]
    monkeypatch.setattr(discovery, "own_addresses", lambda: ("10.0.0.2",))
    assert discovery._reachable(found) == ["10.0.0.1", "fd00::1", "fe80::1%3"]
    assert discovery._reachable(found[:2]) == []
    monkeypatch.setattr(discovery, "own_addresses", lambda: ("127.0.0.1",))  # no network
    assert discovery._reachable(found[:2]) == found[:2]


class FakeZeroconf:
    """Keeps what was announced. `fails`: so many openings and updates do not work."""

    def __init__(self) -> None:
        self.announced: list[ServiceInfo] = []
        self.calls: list[str] = []
        self.fails = 0
        self.addresses: tuple[str, ...] = ("10.0.0.1",)
        self.is_closed = threading.Event()

    def open(self) -> FakeZeroconf:
        self._may_fail("open")
        return self

    def register_service(self, info: ServiceInfo, **options: Any) -> None:
        self.announced.append(info)

    def update_service(self, info: ServiceInfo) -> None:
        self._may_fail("update")
        self.announced.append(info)

    def update_interfaces(self) -> None:
        self.calls.append("interfaces")

    def close(self) -> None:
        self.is_closed.set()

    def _may_fail(self, call: str) -> None:
        self.calls.append(call)
        if self.fails:
            self.fails -= 1
            raise OSError("no route to host")

    @property
    def last(self) -> NearbyService | None:
        info = self.announced[-1]
        return parse(info.properties, info.port, info.parsed_addresses())


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeZeroconf:
    fake = FakeZeroconf()
    monkeypatch.setattr(discovery, "_open", fake.open)
    monkeypatch.setattr(discovery, "_LOOK_S", 0.01)
    monkeypatch.setattr(discovery, "own_addresses", lambda: fake.addresses)
    return fake


def test_an_announcement_follows_the_ranks_and_the_addresses(fake: FakeZeroconf):
    announcement = Announcement(HOME)
    until(lambda: bool(fake.announced))
    announcement.update(present=2)
    until(lambda: fake.last is not None and fake.last.present == 2)
    assert "interfaces" not in fake.calls
    fake.addresses = ("10.0.0.1", "10.1.0.1")
    until(lambda: fake.last is not None and fake.last.addresses == ("10.0.0.1", "10.1.0.1"))
    assert fake.calls.count("interfaces") == 1
    assert fake.last is not None
    assert (fake.last.id, fake.last.present, fake.last.ranks) == (HOME.id, 2, 3)
    announcement.close()
    assert fake.is_closed.wait(SOON_S)


def test_a_network_that_does_not_work_yet_is_named_and_tried_again(fake: FakeZeroconf):
    fake.fails = 10**9
    announcement = Announcement(HOME)
    until(lambda: announcement.problem is not None)
    assert announcement.problem == "multicast DNS does not work here: no route to host"
    fake.fails = 0
    until(lambda: bool(fake.announced))
    until(lambda: announcement.problem is None)
    announcement.close()


def test_it_is_announced_again_and_again(fake: FakeZeroconf, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(discovery, "_REPEAT_S", 0.05)
    announcement = Announcement(HOME)
    until(lambda: len(fake.announced) > 3)
    announcement.close()
    assert {info.host_ttl for info in fake.announced} == {30}


def test_updates_that_fail_are_sent_later(fake: FakeZeroconf):
    announcement = Announcement(HOME)
    until(lambda: bool(fake.announced))
    fake.fails = 2
    announcement.update(present=3)
    until(lambda: fake.last is not None and fake.last.present == 3)
    announcement.close()


def test_no_more_services_than_people_can_read_are_kept(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(discovery, "own_addresses", lambda: ())
    monkeypatch.setattr(discovery, "_open", lambda: FakeZeroconf())
    monkeypatch.setattr(discovery, "ServiceBrowser", lambda *args, **options: None)
    with Browser() as browser:
        for number in range(1000):
            browser._take(None, "", f"{number}", discovery.ServiceStateChange.Added)  # type: ignore[arg-type]
        assert len(browser._names) == 256
        browser._take(None, "", "7", discovery.ServiceStateChange.Removed)  # type: ignore[arg-type]
        assert "7" not in browser._names
