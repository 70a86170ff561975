"""Interfaces, as each system tells of them."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest

from smolrun.launch.on_host import network

IP = """\
1: lo    inet 127.0.0.1/8 scope host lo\\       valid_lft forever preferred_lft forever
2: eth0    inet 192.168.1.5/24 brd 192.168.1.255 scope global dynamic eth0\\       valid_lft 85s
2: eth0    inet6 fe80::1/64 scope link \\       valid_lft forever preferred_lft forever
3: wg0    inet 10.8.0.2 peer 10.8.0.1/32 scope global wg0\\       valid_lft forever
4: veth1@if5    inet 10.0.0.1/24 scope global veth1\\       valid_lft forever preferred_lft forever
"""
PORTS = """\

Hardware Port: Ethernet
Device: en0
Ethernet Address: aa:bb

Hardware Port: Wi-Fi
Device: en1
Ethernet Address: cc:dd

Hardware Port: Thunderbolt Bridge
Device: bridge0
Ethernet Address: ee:ff

Hardware Port: Thunderbolt Ethernet Slot 1
Device: en5
Ethernet Address: 11:22
"""
IFCONFIG = """\
lo0: flags=8049<UP,LOOPBACK,RUNNING,MULTICAST> mtu 16384
\tinet 127.0.0.1 netmask 0xff000000
\tinet6 ::1 prefixlen 128
en0: flags=8863<UP,BROADCAST,SMART,RUNNING,SIMPLEX,MULTICAST> mtu 1500
\tinet 192.168.1.10 netmask 0xffffff00 broadcast 192.168.1.255
\tinet6 fe80::1c%en0 prefixlen 64 secured scopeid 0x4
\tmedia: autoselect (1000baseT <full-duplex>)
\tstatus: active
en1: flags=8863<UP,BROADCAST> mtu 1500
\tinet 192.168.1.11 netmask 0xffffff00 broadcast 192.168.1.255
\tmedia: autoselect
\tstatus: active
en5: flags=8863<UP> mtu 1500
\tinet 10.1.0.1 netmask 0xffff0000 broadcast 10.1.255.255
\tmedia: autoselect (10Gbase-T <full-duplex>)
\tstatus: active
en6: flags=8863<UP> mtu 1500
\tinet 10.2.0.1 netmask 0xffff0000 broadcast 10.2.255.255
\tstatus: inactive
bridge0: flags=8863<UP> mtu 1500
\tinet 10.10.0.1 netmask 0xffffff00 broadcast 10.10.0.255
\tstatus: active
utun3: flags=8051<UP,POINTOPOINT> mtu 1380
\tinet 100.64.0.2 --> 100.64.0.2 netmask 0xffffffff
"""
WINDOWS: dict[str, Any] = {
    "adapters": [
        {
            "Name": "Ethernet",
            "InterfaceDescription": "Intel(R) Ethernet I219-V",
            "InterfaceIndex": 4,
            "PhysicalMediaType": "802.3",
            "ReceiveLinkSpeed": 1000000000,
        },
        {
            "Name": "WLAN",
            "InterfaceDescription": "Intel(R) Wi-Fi 6 AX201",
            "InterfaceIndex": 7,
            "PhysicalMediaType": "Native 802.11",
            "ReceiveLinkSpeed": 866700000,
        },
    ],
    "addresses": [
        {"IPAddress": "127.0.0.1", "PrefixLength": 8, "InterfaceIndex": 1},
        {"IPAddress": "192.168.1.13", "PrefixLength": 24, "InterfaceIndex": 4},
        {"IPAddress": "fe80::2%4", "PrefixLength": 64, "InterfaceIndex": 4},
        {"IPAddress": "192.168.2.13", "PrefixLength": 24, "InterfaceIndex": 7},
    ],
}


def test_linux_by_iproute2():
    assert network.from_ip(IP) == {
        "lo": ["127.0.0.1/8"],
        "eth0": ["192.168.1.5/24", "fe80::1/64"],
        "wg0": ["10.8.0.2/32"],
        "veth1": ["10.0.0.1/24"],
    }


def test_macos():
    found = network.from_ifconfig(IFCONFIG, network.mac_ports(PORTS))
    told = {one["name"]: (one["kind"], one["speed_mbps"], one["addresses"]) for one in found}
    assert told == {
        "lo0": ("loopback", None, ["127.0.0.1/8", "::1/128"]),
        "en0": ("ethernet", 1000.0, ["192.168.1.10/24", "fe80::1c/64"]),
        "en1": ("wifi", None, ["192.168.1.11/24"]),
        "en5": ("ethernet", 10000.0, ["10.1.0.1/16"]),
        "bridge0": ("thunderbolt", None, ["10.10.0.1/24"]),
        "utun3": ("vpn", None, ["100.64.0.2/32"]),
    }


def test_windows():
    found = network.from_powershell(json.dumps(WINDOWS))
    told = {one["name"]: (one["kind"], one["speed_mbps"], one["addresses"]) for one in found}
    assert told == {
        "Loopback": ("loopback", None, ["127.0.0.1/8"]),
        "Ethernet": ("ethernet", 1000.0, ["192.168.1.13/24", "fe80::2/64"]),
        "WLAN": ("wifi", 866.7, ["192.168.2.13/24"]),
    }
    assert network.from_powershell("Get-NetAdapter : not known") == []


@pytest.mark.skipif(sys.platform != "linux", reason="reads what Linux keeps of its interfaces")
def test_this_linux_has_a_loopback_with_and_without_iproute2(monkeypatch: pytest.MonkeyPatch):
    def loopback() -> dict[str, Any]:
        return next(one for one in network.main({})["interfaces"] if one["name"] == "lo")

    assert loopback()["kind"] == "loopback"
    monkeypatch.setattr(network, "run", lambda *argv: None)
    assert loopback()["addresses"][0] == "127.0.0.1/8"
