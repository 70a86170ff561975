"""Who reaches whom: the script of the hosts, all of them here, on loopback addresses."""

from __future__ import annotations

import socket
import sys
import time
from typing import Any

import pytest

from smolrun.launch.doctor import links
from smolrun.launch.doctor.links import Host
from smolrun.launch.doctor.reach_test import reach_test
from smolrun.launch.doctor.this_machine import ThisMachine
from tests.waiting import SOON_S, until

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="only Linux has all of 127.0.0.0/8 without set-up"
)


def here(tmp_path: Any, *names: str) -> dict[str, ThisMachine]:
    return {name: ThisMachine(name, tmp_path) for name in names}


def test_all_reach_all_at_every_address_and_it_ends_at_once(tmp_path: Any):
    names = ("a", "b", "c")
    hosts = {
        name: Host(name, (f"127.0.0.{k}", f"127.0.1.{k}"), ()) for k, name in enumerate(names, 2)
    }
    began = time.monotonic()
    told = reach_test(here(tmp_path, *names), hosts, {}, wait_s=50.0)
    assert time.monotonic() - began < SOON_S
    for source in names:
        for to in set(names) - {source}:
            rows = told[source]["dialed"][to]
            assert [(row["address"], row["error"]) for row in rows] == [
                (address, None) for address in hosts[to].addresses
            ]
        assert len(told[source]["heard"]) == 4
    assert all(way.is_open for way in links.ways(hosts, told))


def test_an_address_where_nobody_listens_is_told_within_the_deadline(tmp_path: Any):
    # 240.0.0.0/4 is reserved: nobody has it.
    hosts = {"a": Host("a", ("127.0.0.2",), ()), "b": Host("b", ("240.0.0.1",), ())}
    told = reach_test(here(tmp_path, "a", "b"), hosts, {}, wait_s=1.0)
    (row,) = told["a"]["dialed"]["b"]
    assert row["error"]
    there, back = links.ways(hosts, told)
    assert (there.is_open, back.is_open) == (False, True)


def test_a_stranger_is_not_answered(tmp_path: Any):
    """Whoever does not know the nonce gets no proof, and is not taken for the peer."""
    from threading import Thread

    from smolrun.launch.on_host import reach

    with socket.create_server(("127.0.0.1", 0)) as taken:
        free = taken.getsockname()[1]
    request = {"me": "a", "nonce": "ab" * 16, "listen": [free], "wait_s": 2.0}
    request |= {"peers": {}, "expected": [["b", "127.0.0.1"]]}
    told: dict[str, Any] = {}
    thread = Thread(target=lambda: told.update(reach.main(request)), name="reach", daemon=True)
    thread.start()

    def listens() -> bool:
        try:
            socket.create_connection(("127.0.0.1", free), 1.0).close()
        except OSError:
            return False
        return True

    until(listens)
    with socket.create_connection(("127.0.0.1", free), 1.0) as sock:
        sock.sendall(bytes(48) + b"\x0bb\n127.0.0.1")
        assert sock.recv(1) == b""
    thread.join(10.0)
    assert told == {"port": free, "heard": [], "dialed": {}}


def test_a_port_that_is_taken_is_passed_over(tmp_path: Any):
    hosts = {name: Host(name, (f"127.0.0.{k}",), ()) for k, name in enumerate("ab", 2)}
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        ports = {"a": (port, port), "b": None}
        told = reach_test(here(tmp_path, "a", "b"), hosts, ports, wait_s=1.0)
    assert told["a"]["port"] is None
    assert told["b"]["dialed"]["a"][0]["error"] is not None
    assert told["a"]["dialed"]["b"][0]["error"] is None


def test_one_machine_has_nobody_to_reach(tmp_path: Any):
    assert reach_test(here(tmp_path, "a"), {"a": Host("a", ("127.0.0.1",), ())}, {}) == {}
