"""Names, numeric addresses, and the scope of link-local ones."""

from __future__ import annotations

import pytest

from smolrun.errors import HostError
from smolrun.mesh import addresses
from smolrun.mesh.addresses import is_loopback, own_addresses, reachable_as, resolve, shown


def test_numbers_stand_for_themselves_each_once_and_in_order() -> None:
    assert resolve("a", ["10.0.0.2", "fd00::1", "10.0.0.2"]) == ["10.0.0.2", "fd00::1"]


def test_a_name_stands_for_all_its_addresses() -> None:
    assert "127.0.0.1" in resolve("a", ["localhost"])


@pytest.mark.parametrize("name", ["no-such-host.invalid", "x" * 70, "a..b"])
def test_an_unknown_name_is_an_error_with_its_host(name: str) -> None:
    with pytest.raises(HostError, match=r"^mini2: its address .* cannot be resolved"):
        resolve("mini2", [name])


@pytest.mark.parametrize(
    ("address", "expected"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("10.0.0.1", False),
     ("::", False), ("localhost", False), ("fe80::1%lo", False)],
)  # fmt: skip
def test_loopback_addresses(address: str, expected: bool) -> None:
    assert is_loopback(address) == expected


def test_a_link_local_address_is_tried_over_each_of_our_interfaces(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ours = ["10.0.0.1", "fe80::1%eth0", "fe80::2%wlan0", "::1"]
    monkeypatch.setattr(addresses, "own_addresses", lambda: ours)
    assert reachable_as("fe80::9%en7") == ["fe80::9%eth0", "fe80::9%wlan0"]
    assert reachable_as("fe80::2", own=True) == ["fe80::2%wlan0"]
    assert reachable_as("10.0.0.9") == ["10.0.0.9"]
    assert reachable_as("fd00::9") == ["fd00::9"]


def test_this_machine_has_a_loopback() -> None:
    assert "127.0.0.1" in own_addresses()


def test_addresses_as_text() -> None:
    assert shown("10.0.0.1", 4000) == "10.0.0.1:4000"
    assert shown("fe80::1%eth0", 4000) == "[fe80::1%eth0]:4000"
