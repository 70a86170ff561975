"""A rank listens on its given addresses, on a port of the range, or raises HostError."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from smolrun.errors import HostError
from smolrun.mesh.addresses import own_addresses
from smolrun.mesh.endpoint import Endpoint

LOOPBACK = "127.0.0.1"
NOT_OURS = "192.0.2.77"  # RFC 5737: nobody has this


@pytest.fixture
def two_ports() -> Iterator[tuple[int, int]]:
    """Two ports in a row that were free a moment ago."""
    for _ in range(100):
        with socket.create_server((LOOPBACK, 0)) as sock:
            first = sock.getsockname()[1]
            try:
                socket.create_server((LOOPBACK, first + 1)).close()
            except OSError:
                continue
        yield first, first + 1
        return
    pytest.fail("no two free ports in a row")


def test_the_first_free_port_of_a_range_is_used(two_ports: tuple[int, int]) -> None:
    one, other = Endpoint([LOOPBACK], two_ports), Endpoint([LOOPBACK], two_ports)
    assert one.addresses == [(LOOPBACK, two_ports[0])]
    assert other.addresses == [(LOOPBACK, two_ports[1])]
    one.close()
    other.close()


def test_a_full_range_is_an_error_with_host_range_and_hint(two_ports: tuple[int, int]) -> None:
    taken = [Endpoint([LOOPBACK], two_ports) for _ in range(2)]
    with pytest.raises(HostError) as caught:
        Endpoint([LOOPBACK], two_ports, host="mini2")
    assert str(caught.value) == (
        f"mini2: every port of {two_ports[0]}-{two_ports[1]} is in use on 127.0.0.1; "
        "widen `ports:` in the cluster file, or end what listens there"
    )
    for one in taken:
        one.close()


def test_a_port_is_free_again_at_once(two_ports: tuple[int, int]) -> None:
    only = (two_ports[0], two_ports[0])
    for _ in range(3):
        endpoint = Endpoint([LOOPBACK], only)
        with socket.create_connection(endpoint.addresses[0]):
            accepted, _ = endpoint.sockets[0].accept()
            accepted.close()  # this side closes first, so it stays in TIME_WAIT
        endpoint.close()


def test_an_address_of_another_machine_is_an_error_with_our_own() -> None:
    with pytest.raises(HostError, match=r"^mini2: 192\.0\.2\.77 is not one of its own") as caught:
        Endpoint([NOT_OURS], host="mini2")
    assert all(address in str(caught.value) for address in own_addresses())
    assert LOOPBACK in str(caught.value)


def test_one_address_is_enough(caplog: pytest.LogCaptureFixture) -> None:
    endpoint = Endpoint([NOT_OURS, LOOPBACK])
    assert [address for address, _ in endpoint.addresses] == [LOOPBACK]
    assert "192.0.2.77 is not one of its own" in caplog.text
    endpoint.close()


@pytest.mark.parametrize("address", ["localhost", "", "10.0.0.300", "mini1.local"])
def test_a_name_is_not_an_address(address: str) -> None:
    with pytest.raises(HostError, match="is not an IP address as numbers"):
        Endpoint([address])


def test_no_address_does_not_mean_all_addresses() -> None:
    with pytest.raises(HostError, match="given no address to listen on"):
        Endpoint([])


def test_it_is_reached_on_its_address_only() -> None:
    endpoint = Endpoint([LOOPBACK])
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", endpoint.addresses[0][1]), timeout=5)
    endpoint.close()
