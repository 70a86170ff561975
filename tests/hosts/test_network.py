"""The cables of the lab: they carry what they say, and break without a word."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager

import pytest

from tests.hosts.conftest import Maker
from tests.hosts.host import Host
from tests.hosts.lab import Lab, lab
from tests.hosts.network import LabError, Network
from tests.waiting import until

pytestmark = pytest.mark.hosts


@contextmanager
def connection(sender: Host, receiver: Host) -> Iterator[tuple[socket.socket, socket.socket]]:
    """A TCP connection between two hosts, both ends in our hand."""
    listener = receiver.call(lambda: socket.create_server((receiver.address, 0)))
    with closing(listener):
        target = listener.getsockname()
        outgoing = sender.call(lambda: socket.create_connection(target, timeout=10))
        incoming, _ = listener.accept()
    incoming.settimeout(10)
    with closing(outgoing), closing(incoming):
        yield outgoing, incoming


def megabits_per_second(sender: Host, receiver: Host, size: int) -> float:
    with connection(sender, receiver) as (outgoing, incoming):
        outgoing.setblocking(False)
        incoming.setblocking(False)
        sent = received = 0
        data, began, deadline = bytes(65536), time.monotonic(), time.monotonic() + 30
        while received < size and time.monotonic() < deadline:
            try:
                if sent < size:
                    sent += outgoing.send(data[: size - sent])
            except BlockingIOError:
                pass
            try:
                received += len(incoming.recv(1 << 20))
            except BlockingIOError:
                pass
        assert received == size
        return size * 8e-6 / (time.monotonic() - began)


@pytest.fixture
def pair(lab3: Lab) -> Iterator[tuple[Host, Host]]:
    first, second, _ = lab3.hosts
    yield first, second
    for host in lab3.hosts:
        host.heal()


def hears(sender: Host, receiver: Host, timeout_s: float = 5.0) -> bool:
    """Whether a datagram gets through, of several, from one host to the other."""
    address = (receiver.address, 0)
    with closing(receiver.call(lambda: socket.socket(type=socket.SOCK_DGRAM))) as incoming:
        incoming.bind(address)
        incoming.settimeout(0.05)
        with closing(sender.call(lambda: socket.socket(type=socket.SOCK_DGRAM))) as outgoing:
            deadline = time.monotonic() + timeout_s
            while time.monotonic() < deadline:
                outgoing.sendto(b"x", incoming.getsockname())
                try:
                    return incoming.recv(10) == b"x"
                except TimeoutError:
                    continue
    return False


def carries(sender: Host, receiver: Host, rate: float, size: int) -> bool:
    """Whether it is `rate` Mbit/s within 15 %; again if this machine had no time to look."""
    for _ in range(4):
        measured = megabits_per_second(sender, receiver, size)
        assert measured < 1.15 * rate
        if measured > 0.85 * rate:
            return True
    return False


def test_the_rate_is_what_it_says_in_both_directions(make_lab: Maker):
    first, second = make_lab(hosts=2, rate="200mbit").hosts
    assert carries(first, second, 200, 16_000_000)
    assert carries(second, first, 200, 16_000_000)
    second.rate("8mbit")  # one slow cable is enough, whoever sends
    assert carries(first, second, 8, 600_000)
    assert carries(second, first, 8, 600_000)
    second.heal()
    assert carries(first, second, 200, 16_000_000)


def test_a_cut_is_silent_and_heals(pair: tuple[Host, Host]):
    with connection(*pair) as (outgoing, incoming):
        outgoing.sendall(b"before")
        assert incoming.recv(100) == b"before"
        pair[1].cut()
        outgoing.sendall(b"after")
        outgoing.close()
        incoming.settimeout(0.5)
        with pytest.raises(TimeoutError):  # neither data nor the end
            incoming.recv(100)
        pair[1].heal()
        incoming.settimeout(10)
        assert incoming.recv(100) == b"after"
        assert incoming.recv(100) == b""


def test_a_cut_of_one_direction(pair: tuple[Host, Host]):
    first, second = pair
    assert hears(first, second)
    assert hears(second, first)
    second.cut_in()
    assert not hears(first, second, timeout_s=0.5)
    assert hears(second, first)
    second.heal()
    second.cut_out()
    assert hears(first, second)
    assert not hears(second, first, timeout_s=0.5)


def test_a_cut_between_two_leaves_the_others(lab3: Lab, pair: tuple[Host, Host]):
    first, second = pair
    third = lab3.hosts[2]
    first.cut_from(second)
    assert not hears(first, second, timeout_s=0.5)
    assert not hears(second, first, timeout_s=0.5)
    assert hears(first, third)
    assert hears(third, second)
    assert lab3.run_ssh(first, "true").returncode == 0
    first.cut_from(lab3)
    assert not can_connect((first.address, 22), timeout_s=0.5)
    assert hears(third, first)


def can_connect(address: tuple[str, int], timeout_s: float) -> bool:
    try:
        socket.create_connection(address, timeout=timeout_s).close()
    except OSError:
        return False
    return True


def test_a_blocked_port(pair: tuple[Host, Host]):
    first, _ = pair
    first.block_port(22)
    assert not can_connect((first.address, 22), timeout_s=0.5)
    with closing(first.call(lambda: socket.create_server((first.address, 0)))) as listener:
        assert can_connect(listener.getsockname(), timeout_s=5)


def test_so_many_packets_are_lost(pair: tuple[Host, Host]):
    first, second = pair
    first.lose(20)
    with closing(second.call(lambda: socket.socket(type=socket.SOCK_DGRAM))) as incoming:
        incoming.bind((second.address, 0))
        incoming.setblocking(False)
        arrived = []

        def read() -> None:
            try:
                while True:
                    arrived.append(incoming.recv(10))
            except BlockingIOError:
                pass

        with closing(first.call(lambda: socket.socket(type=socket.SOCK_DGRAM))) as outgoing:
            for _ in range(2000):
                outgoing.sendto(b"x", incoming.getsockname())
                read()

            def has_the_last_come() -> bool:
                outgoing.sendto(b"last", incoming.getsockname())
                read()
                return b"last" in arrived

            until(has_the_last_come)
    # 1,600 of 2,000 with a deviation of 18; 8 of them is once in a lifetime of the universe.
    assert 1450 < arrived.count(b"x") < 1750


def test_a_lossy_cable_still_carries_a_stream(pair: tuple[Host, Host]):
    pair[0].lose(5)  # the test above proves that packets are lost
    assert megabits_per_second(*pair, 2_000_000) > 0.5


@pytest.mark.parametrize("rate", ["fast", "10", "10mb", "-1mbit"])
def test_a_rate_that_is_none_is_told_before_anything_is_built(
    rate: str, possible: None, tmp_path_factory: pytest.TempPathFactory
):
    folder = tmp_path_factory.mktemp("none")
    with pytest.raises(LabError, match="is no rate"), lab(rate=rate, folder=folder):
        raise AssertionError("no lab")


def test_networks_of_many_labs_are_apart():
    networks = [Network(number) for number in range(1024)]
    assert len({one.subnet for one in networks}) == len({one.address6(1) for one in networks})
    assert networks[1023].subnet == "10.190.255.0/24"
    assert networks[300].address(7) == "10.188.44.7"
    assert max(len(one.name) for one in networks) <= 15  # the kernel's limit for an interface
