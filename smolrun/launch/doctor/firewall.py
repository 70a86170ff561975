"""The command that lets the ranks of a run through a host's firewall. Pure.

`on_host/firewall.py` finds out which firewall there is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# For clusters that name none: one can only open ports that are known.
USUAL_PORTS = (40000, 40100)


def opening(
    firewall: Mapping[str, Any],
    os: str,
    ports: tuple[int, int] | None,
    *,
    python: str,
    source: str | None = None,
) -> str:
    """What to do on that host so that others reach its ports; `source` is their network."""
    first, last = ports or USUAL_PORTS
    lead = "" if ports else f"set `ports: {first}-{last}` in the cluster file, then there: "
    return lead + _command(firewall.get("kind"), os, f"{first}-{last}", python, source)


def _command(kind: str | None, os: str, ports: str, python: str, source: str | None) -> str:
    if os == "darwin":
        tool = "/usr/libexec/ApplicationFirewall/socketfilterfw"
        return f"sudo {tool} --add {python} && sudo {tool} --unblockapp {python}"
    if os == "windows":
        return (
            "New-NetFirewallRule -DisplayName smolrun -Direction Inbound -Protocol TCP "
            f"-LocalPort {ports} -Action Allow   (PowerShell, as administrator)"
        )
    colon = ports.replace("-", ":")
    if kind == "ufw":
        return f"sudo ufw allow from {source or 'any'} to any port {colon} proto tcp"
    if kind == "firewalld":
        return f"sudo firewall-cmd --permanent --add-port={ports}/tcp && sudo firewall-cmd --reload"
    if kind == "iptables":
        return f"sudo iptables -I INPUT -p tcp --dport {colon} -j ACCEPT"
    if kind == "nftables":
        return f"sudo nft insert rule inet filter input tcp dport {ports} accept"
    return f"let TCP ports {ports} through whatever filters packets there, or in between"
