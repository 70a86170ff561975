"""Runs on a host: its network interfaces, with kind, link speed and addresses. Changes nothing.

Only the standard library, Python >= 3.8. A kind is one of thunderbolt, ethernet, wifi, vpn,
virtual, loopback, other; a speed that the system does not tell is None.
"""

from __future__ import annotations

import glob
import ipaddress
import json
import os
import platform
import re
import shutil
from typing import Any

from smolrun.launch.on_host.prelude import powershell, read, run

_NET = "/sys/class/net"
_VPN = re.compile(r"^(tun|tap|wg|utun|ipsec|ppp|tailscale|zt|nordlynx)")
_VIRTUAL = re.compile(r"^(docker|br-|virbr|lxc|vmnet|vEthernet|awdl|llw|anpi|ap\d|gif|stf)")


def main(request: dict[str, Any]) -> dict[str, Any]:
    """`interfaces`: those that are up and have an address."""
    kind = platform.system().lower()
    if kind == "darwin":
        ports = mac_ports(run("networksetup", "-listallhardwareports") or "")
        found = from_ifconfig(run("ifconfig") or "", ports)
    elif kind == "windows":
        found = from_powershell(powershell(_POWERSHELL))
    else:
        found = _linux()
    return {"interfaces": [one for one in found if one["addresses"]]}


def interface(
    name: str, kind: str, speed_mbps: float | None, addresses: list[str]
) -> dict[str, Any]:
    """One interface; an address is written with the length of its network, as 10.0.0.1/24."""
    return {"name": name, "kind": kind, "speed_mbps": speed_mbps, "addresses": addresses}


# -- Linux ----


def _linux() -> list[dict[str, Any]]:
    tool = shutil.which("ip") or next(filter(os.path.exists, ("/usr/sbin/ip", "/sbin/ip")), None)
    text = run(tool, "-o", "addr", "show", "up") if tool else None
    addresses = from_ip(text) if text else _by_ioctl()
    return [
        interface(name, _linux_kind(name), _linux_speed(name), found)
        for name, found in addresses.items()
    ]


def from_ip(text: str) -> dict[str, list[str]]:
    """Addresses by interface, from `ip -o addr show`."""
    found: dict[str, list[str]] = {}
    pattern = r"^\d+:\s+([^\s@:]+)\S*\s+inet6?\s+(\S+)(?:\s+peer\s+(\S+))?"
    for name, address, peer in re.findall(pattern, text, re.MULTILINE):
        length = peer.partition("/")[2] if peer else ""
        full = address if "/" in address else f"{address}/{length or 32}"
        found.setdefault(name, []).append(full)
    return found


def _by_ioctl() -> dict[str, list[str]]:
    """Without iproute2: one IPv4 address of each interface, and all of IPv6."""
    import fcntl
    import socket
    import struct

    found: dict[str, list[str]] = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                address = fcntl.ioctl(sock, 0x8915, request)[20:24]  # SIOCGIFADDR
                mask = fcntl.ioctl(sock, 0x891B, request)[20:24]  # SIOCGIFNETMASK
            except OSError:
                continue
            length = bin(int.from_bytes(mask, "big")).count("1")
            found[name] = [f"{socket.inet_ntoa(address)}/{length}"]
    for line in read("/proc/net/if_inet6").splitlines():
        digits, _, length6, _, _, name = line.split()
        address6 = ipaddress.IPv6Address(bytes.fromhex(digits))
        found.setdefault(name, []).append(f"{address6}/{int(length6, 16)}")
    return found


def _linux_kind(name: str) -> str:
    folder = os.path.join(_NET, name)
    driver = os.path.basename(os.path.realpath(folder + "/device/driver"))
    if name == "lo" or read(folder + "/type").strip() == "772":
        return "loopback"
    if os.path.isdir(folder + "/wireless") or os.path.exists(folder + "/phy80211"):
        return "wifi"
    if "thunderbolt" in driver or name.startswith("thunderbolt"):
        return "thunderbolt"
    if _VPN.match(name) or read(folder + "/type").strip() == "65534":
        return "vpn"
    if os.path.isdir(folder + "/bridge"):
        members = [os.path.basename(path) for path in glob.glob(folder + "/brif/*")]
        kinds = {_linux_kind(member) for member in members}
        return next((kind for kind in ("thunderbolt", "ethernet") if kind in kinds), "virtual")
    return "virtual" if _VIRTUAL.match(name) else "ethernet"


def _linux_speed(name: str) -> float | None:
    text = read(os.path.join(_NET, name, "speed")).strip()
    if text.isdigit() and int(text) > 0:
        return float(text)
    if shutil.which("iw"):
        rate = re.search(r"tx bitrate:\s*([\d.]+) MBit", run("iw", "dev", name, "link") or "")
        return float(rate.group(1)) if rate else None
    return None


# -- macOS ----


def mac_ports(text: str) -> dict[str, str]:
    """Device -> what Apple calls it, from `networksetup -listallhardwareports`."""
    pairs = re.findall(r"Hardware Port: (.+)\nDevice: (\S+)", text)
    return {device: port for port, device in pairs}


def from_ifconfig(text: str, ports: dict[str, str]) -> list[dict[str, Any]]:
    """From `ifconfig`, with the names of the ports."""
    found = []
    for block in re.split(r"^(?=\S)", text, flags=re.MULTILINE):
        name = block.partition(":")[0]
        # A loopback has no status; an unplugged cable says inactive.
        if not name or "status: inactive" in block:
            continue
        addresses = []
        for address, mask in re.findall(r"\binet (\S+) .*?netmask (0x[0-9a-f]{8})", block):
            addresses.append("{}/{}".format(address, bin(int(mask, 16)).count("1")))
        for address, length in re.findall(r"\binet6 (\S+?)(?:%\S+)? prefixlen (\d+)", block):
            addresses.append(f"{address}/{length}")
        found.append(interface(name, _mac_kind(name, ports), _mac_speed(block), addresses))
    return found


def _mac_kind(name: str, ports: dict[str, str]) -> str:
    port = ports.get(name, "").lower()
    if name.startswith("lo"):
        return "loopback"
    if "wi-fi" in port or "airport" in port:
        return "wifi"
    # The Apple adapter "Thunderbolt Ethernet" is Ethernet, whatever the plug.
    if "ethernet" in port or "lan" in port:
        return "ethernet"
    if "thunderbolt" in port:
        return "thunderbolt"
    if _VPN.match(name):
        return "vpn"
    return "virtual" if _VIRTUAL.match(name) or name.startswith("bridge") else "other"


def _mac_speed(block: str) -> float | None:
    told = re.search(r"media: .*?\(?(\d+(?:\.\d+)?)(G?)base", block, re.IGNORECASE)
    if told is None:
        return None
    return float(told.group(1)) * (1000 if told.group(2) else 1)


# -- Windows ----

_POWERSHELL = (
    "ConvertTo-Json -Depth 3 @{"
    "adapters=@(Get-NetAdapter | Where-Object Status -eq 'Up' | Select-Object Name,"
    "InterfaceDescription,InterfaceIndex,PhysicalMediaType,ReceiveLinkSpeed);"
    "addresses=@(Get-NetIPAddress | Select-Object IPAddress,PrefixLength,InterfaceIndex)}"
)


def from_powershell(text: str) -> list[dict[str, Any]]:
    """From Get-NetAdapter and Get-NetIPAddress, as JSON."""
    try:
        told = json.loads(text)
    except ValueError:
        return []
    addresses: dict[int, list[str]] = {}
    for one in told["addresses"]:
        plain = one["IPAddress"].partition("%")[0]
        addresses.setdefault(one["InterfaceIndex"], []).append(
            "{}/{}".format(plain, one["PrefixLength"])
        )
    found = [interface("Loopback", "loopback", None, addresses.pop(1, []))]
    for one in told["adapters"]:
        speed = one.get("ReceiveLinkSpeed")
        found.append(
            interface(
                one["Name"],
                _windows_kind(one),
                speed / 1e6 if speed else None,
                addresses.get(one["InterfaceIndex"], []),
            )
        )
    return found


def _windows_kind(adapter: dict[str, Any]) -> str:
    words = "{Name} {InterfaceDescription} {PhysicalMediaType}".format(**adapter).lower()
    if "thunderbolt" in words and "ethernet" not in adapter["InterfaceDescription"].lower():
        return "thunderbolt"
    if "802.11" in words or "wi-fi" in words or "wireless" in words:
        return "wifi"
    if any(word in words for word in ("wireguard", "tap-", "openvpn", "tailscale", "wintun")):
        return "vpn"
    if "hyper-v" in words or "virtual" in words or "vmware" in words:
        return "virtual"
    return "ethernet" if "802.3" in words or "ethernet" in words else "other"
