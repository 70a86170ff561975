"""Who reaches whom, over which network, and what is said about it."""

from __future__ import annotations

from typing import Any

from smolrun.launch.doctor import links
from smolrun.launch.doctor.links import HostAddresses, NetworkInterface, Route
from smolrun.launch.doctor.reachability import HostFirewall, network_findings, unreachable_findings

UFW = {"kind": "ufw", "is_on": True}


def host(name: str, k: int, *, addresses: tuple[str, ...] = (), bolt: bool = True) -> HostAddresses:
    """A machine with Wi-Fi, and a Thunderbolt cable."""
    wifi = NetworkInterface("en1", "wifi", None, (f"192.168.1.{k}/24", f"fe80::{k}/64"))
    cable = NetworkInterface("bridge0", "thunderbolt", None, (f"10.10.0.{k}/24",))
    docker = NetworkInterface("docker0", "virtual", 10_000.0, ("172.17.0.1/16",))
    own = (wifi, docker, *([cable] if bolt else []))
    return HostAddresses(name, addresses or (f"192.168.1.{k}",), own)


def row(address: str, error: str | None = None, local: str = "192.168.1.1") -> dict[str, Any]:
    return {"address": address, "error": error, "local": local}


def open_ways(*pairs: tuple[str, str]) -> list[Route]:
    names = sorted({name for pair in pairs for name in pair})
    return [
        Route(a, b, "x" if (a, b) in pairs else None, None, ())
        for a in names
        for b in names
        if a != b
    ]


def test_hosts_are_dialled_where_configured_and_on_every_network_they_share():
    one, two = host("one", 1), host("two", 2)
    assert links.to_dial(one, two) == ["192.168.1.2", "10.10.0.2"]
    assert links.to_dial(one, host("three", 3, bolt=False)) == ["192.168.1.3"]


def test_a_way_is_open_at_a_configured_address_only():
    hosts = {"one": host("one", 1), "two": host("two", 2)}
    reach = {
        "one": {"dialed": {"two": [row("192.168.1.2", "timed out"), row("10.10.0.2")]}},
        "two": {"dialed": {"one": [row("192.168.1.1")]}},
    }
    there, back = links.routes(hosts, reach)
    assert (there.is_open, there.errors) == (False, (("192.168.1.2", "timed out"),))
    assert (back.is_open, back.local) == (True, "192.168.1.1")
    assert links.unreachable_hosts([there, back]) == []


def test_the_one_that_nobody_reaches_is_to_blame_and_nobody_else():
    found = open_ways(("a", "b"), ("b", "a"))
    found += [
        Route(x, y, None, None, ()) for x, y in [("a", "c"), ("c", "a"), ("b", "c"), ("c", "b")]
    ]
    assert links.unreachable_hosts(found) == ["c"]


def test_of_two_that_do_not_reach_each_other_both_are_named():
    assert links.unreachable_hosts(
        [Route("a", "b", None, None, ()), Route("b", "a", None, None, ())]
    ) == [
        "a",
        "b",
    ]


def two_hosts(there: dict[str, Any], back: dict[str, Any]) -> dict[str, Any]:
    hosts = {"one": host("one", 1), "two": host("two", 2)}
    reach = {"one": {"dialed": {"two": [there]}}, "two": {"dialed": {"one": [back]}}}
    firewalls = {name: HostFirewall(UFW, "linux", "/py", (40000, 40100)) for name in hosts}
    return unreachable_findings(hosts, links.routes(hosts, reach), firewalls)


def test_a_blocked_direction_limits_and_names_the_command():
    found = two_hosts(row("192.168.1.2", "timed out"), row("192.168.1.1"))
    (one,) = found.pop("two")
    assert found == {}
    assert one.severity == "warning"
    assert one.what == ("one cannot reach two (192.168.1.2: timed out); the other direction works")
    assert one.hint == (
        "on two: sudo ufw allow from 192.168.1.0/24 to any port 40000:40100 proto tcp"
    )


def test_both_directions_blocked_keeps_both_from_running():
    found = two_hosts(row("192.168.1.2", "timed out"), row("192.168.1.1", "timed out"))
    assert {name: one.severity for name, (one,) in found.items()} == {
        "one": "error",
        "two": "error",
    }


def test_a_refusal_and_an_address_of_nobody_are_no_firewall():
    (one,) = two_hosts(row("192.168.1.2", "refused"), row("192.168.1.1"))["two"]
    assert "another machine" in str(one.hint)
    hosts = {"one": host("one", 1), "two": host("two", 2, addresses=("192.168.9.2",))}
    reach = {
        "one": {"dialed": {"two": [row("192.168.9.2", "timed out")]}},
        "two": {"dialed": {"one": [row("192.168.1.1")]}},
    }
    firewalls = {name: HostFirewall(UFW, "linux", "/py", None) for name in hosts}
    (one,) = unreachable_findings(hosts, links.routes(hosts, reach), firewalls)["two"]
    assert "it has no such address" in str(one.hint)
    assert "10.10.0.2" in str(one.hint)


def wifi_and_bolt(bolt_error: str | None) -> tuple[dict[str, HostAddresses], dict[str, Any]]:
    hosts = {"one": host("one", 1), "two": host("two", 2)}
    reach = {
        "one": {"dialed": {"two": [row("192.168.1.2"), row("10.10.0.2", bolt_error)]}},
        "two": {"dialed": {"one": [row("192.168.1.1", None, "192.168.1.2"), row("10.10.0.1")]}},
    }
    return hosts, reach


def test_a_faster_network_that_lies_idle_is_told_with_its_address():
    hosts, reach = wifi_and_bolt(None)
    found = links.faster_networks(hosts, links.routes(hosts, reach), reach)
    told = network_findings(found)
    (one,) = told["two"]
    assert one.what == "one reaches two over Wi-Fi (en1); both are on Thunderbolt (bridge0)"
    assert one.hint == "in the cluster file, two: `address: 10.10.0.2`"
    hosts, reach = wifi_and_bolt("timed out")
    silent = links.faster_networks(hosts, links.routes(hosts, reach), reach)
    assert "does not answer there" in network_findings(silent)["two"][0].what


def test_the_fastest_address_at_which_all_answered_is_the_best():
    hosts, reach = wifi_and_bolt(None)
    assert links.best_addresses(hosts, "two", reach) == ["10.10.0.2", "192.168.1.2"]
    hosts, reach = wifi_and_bolt("timed out")
    assert links.best_addresses(hosts, "two", reach) == ["192.168.1.2"]
    assert links.best_addresses(hosts, "two", {}) == []


def test_an_interface_says_what_it_is():
    told = {"name": "eth0", "kind": "ethernet", "speed_mbps": 2500, "addresses": []}
    assert str(NetworkInterface.from_json(told)) == "Ethernet (eth0, 2,500 Mbit/s)"
    assert (
        NetworkInterface("x", "thunderbolt", None, ()).speed
        > NetworkInterface("y", "wifi", None, ()).speed
    )
