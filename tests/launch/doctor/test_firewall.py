"""The command for each firewall."""

from __future__ import annotations

import pytest

from smolrun.launch.doctor.firewall import opening


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
    todo = opening({"kind": kind}, os, (40000, 40100), python="/py", source="10.0.0.0/24")
    assert words in todo
    assert "set `ports:" not in todo


def test_without_ports_there_is_nothing_to_open_yet():
    todo = opening({"kind": "ufw"}, "linux", None, python="/py")
    assert todo.startswith("set `ports: 40000-40100` in the cluster file, then there: sudo ufw")
