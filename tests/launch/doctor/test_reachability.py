"""The command for each firewall."""

from __future__ import annotations

import socket
import sys
import time
from typing import Any

import pytest

from smolrun.launch.doctor import links
from smolrun.launch.doctor.host_report import LocalMachine
from smolrun.launch.doctor.links import HostAddresses
from smolrun.launch.doctor.reachability import allow_command, probe_reachability
from tests.waiting import SOON_S, until


@pytest.mark.parametrize(
    ("kind", "os", "words"),
    [
        ("ufw", "linux", "sudo ufw allow from 10.0.0.0/24 to any port 40000:40100 proto tcp"),
        ("firewalld", "linux", "firewall-cmd --permanent --add-port=40000-40100/tcp"),
        ("nftables", "linux", "nft insert rule inet filter input tcp dport 40000-40100 accept"),
        ("iptables", "linux", "iptables -I INPUT -p tcp --dport 40000:40100"),
        (None, "linux", "let TCP ports 40000-40100 through"),
        ("macos", "darwin", "socketfilterfw --add /py"),
        ("windows", "windows", "New-NetFirewallRule -DisplayName smolrun -Direction Inbound"),
    ],
)
def test_every_firewall_has_its_command(kind: str | None, os: str, words: str):
    hint = allow_command({"kind": kind}, os, (40000, 40100), python="/py", source="10.0.0.0/24")
    assert words in hint
    assert "set `ports:" not in hint


def test_without_ports_there_is_nothing_to_open_yet():
    hint = allow_command({"kind": "ufw"}, "linux", None, python="/py")
    assert hint.startswith("set `ports: 40000-40100` in the cluster file, then there: sudo ufw")


pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="only Linux has all of 127.0.0.0/8 without set-up"
)


def here(tmp_path: Any, *names: str) -> dict[str, LocalMachine]:
    return {name: LocalMachine(name, tmp_path) for name in names}


def test_all_reach_all_at_every_address_and_it_ends_at_once(tmp_path: Any):
    names = ("a", "b", "c")
    hosts = {
        name: HostAddresses(name, (f"127.0.0.{k}", f"127.0.1.{k}"), ())
        for k, name in enumerate(names, 2)
    }
    began = time.monotonic()
    told = probe_reachability(here(tmp_path, *names), hosts, {}, wait_s=50.0)
    assert time.monotonic() - began < SOON_S
    for source in names:
        for to in set(names) - {source}:
            rows = told[source]["dialed"][to]
            assert [(row["address"], row["error"]) for row in rows] == [
                (address, None) for address in hosts[to].addresses
            ]
        assert len(told[source]["heard"]) == 4
    assert all(route.is_open for route in links.routes(hosts, told))


def test_an_address_where_nobody_listens_is_told_within_the_deadline(tmp_path: Any):
    # 240.0.0.0/4 is reserved: nobody has it.
    hosts = {
        "a": HostAddresses("a", ("127.0.0.2",), ()),
        "b": HostAddresses("b", ("240.0.0.1",), ()),
    }
    told = probe_reachability(here(tmp_path, "a", "b"), hosts, {}, wait_s=1.0)
    (row,) = told["a"]["dialed"]["b"]
    assert row["error"]
    there, back = links.routes(hosts, told)
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
    hosts = {name: HostAddresses(name, (f"127.0.0.{k}",), ()) for k, name in enumerate("ab", 2)}
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        ports = {"a": (port, port), "b": None}
        told = probe_reachability(here(tmp_path, "a", "b"), hosts, ports, wait_s=1.0)
    assert told["a"]["port"] is None
    assert told["b"]["dialed"]["a"][0]["error"] is not None
    assert told["a"]["dialed"]["b"][0]["error"] is None


def test_one_machine_has_nobody_to_reach(tmp_path: Any):
    assert (
        probe_reachability(here(tmp_path, "a"), {"a": HostAddresses("a", ("127.0.0.1",), ())}, {})
        == {}
    )
