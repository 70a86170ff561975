"""serving.bind=lan: what this machine is called in its network, and how a phone opens the page.

    http://NAME.local:PORT     where this machine announces its name: macOS, Windows, Avahi
    http://ADDRESS:PORT        the IPv4 address of the interface that leads into the network

The link with the API key, and its QR code, go to a terminal and nowhere else.
"""

from __future__ import annotations

import ipaddress
import itertools
import platform
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.text import Text

from smolrun.config.suggest import problem
from smolrun.errors import ConfigError
from smolrun.launch.on_host.network import main as interfaces
from smolrun.launch.on_host.prelude import run
from smolrun.mesh.addresses import outgoing_address
from smolrun.tracking.console import Screen

# What people's devices are in; not VPNs, virtual machines, and cables between two hosts.
_KINDS = ("wifi", "ethernet", "other")
_AVAHI = Path("/run/avahi-daemon/socket")
_LABEL = re.compile(r"[A-Za-z0-9-]{1,63}")
_MOST_ADDRESSES = 3
_BORDER = 2  # modules of a QR code; the standard's 4 would not fit on 24 lines
# Light modules are drawn: without colours the code is right on a dark terminal.
_BLOCKS = {(0, 0): "█", (0, 1): "▀", (1, 0): "▄", (1, 1): " "}
_FIREWALLS = {
    "Darwin": "if macOS asks whether Python may accept incoming connections, allow it",
    "Windows": "if Windows asks whether Python may use the network, allow private networks",
    "Linux": "if a firewall runs, open the port: sudo ufw allow {port}/tcp, or sudo firewall-cmd "
    "--add-port={port}/tcp",
}


@dataclass(frozen=True)
class LanNames:
    """What this machine is called in its network. `addresses`: of IPv4, the likeliest first."""

    addresses: tuple[str, ...]
    announced: str | None  # NAME.local

    @property
    def hosts(self) -> list[str]:
        """What a Host header may be, beside the address that a connection came to."""
        node = platform.node().partition(".")[0]
        return [*filter(None, (self.announced, node)), *self.addresses]

    def urls(self, port: int) -> list[str]:
        """Of the page, the best first."""
        return [f"http://{name}:{port}" for name in (self.announced, *self.addresses) if name]

    def notes(self, port: int) -> Iterator[str]:
        """What to tell people who want to open the page."""
        urls = self.urls(port)
        yield f"from other devices of this network: {' or '.join(urls)}"
        firewall = _FIREWALLS.get(platform.system(), "").format(port=port)
        yield (
            "they must be in the same Wi-Fi or cable network, not in its guest network, and use "
            f"no VPN{f'; {firewall}' if firewall else ''}"
        )
        if public := [one for one in self.addresses if ipaddress.ip_address(one).is_global]:
            yield (
                f"warning: {public[0]} is a public address: anyone with the key may ask from the "
                "internet, and requests are not encrypted"
            )


def lan_names() -> LanNames:
    """The names of this machine; ConfigError where it is in no network."""
    found = _addresses(interfaces({})["interfaces"], outgoing_address())
    if not found:
        what = "this machine has no address in a network of other devices"
        allowed = "lan once it is in a Wi-Fi or cable network, or the address to listen on"
        raise ConfigError(problem("serving.bind", "lan", what, allowed=allowed))
    return LanNames(tuple(found[:_MOST_ADDRESSES]), _announced_name())


def _addresses(found: Sequence[Mapping[str, Any]], outgoing: str | None) -> list[str]:
    """IPv4 addresses for other devices: the one that the default route leaves by, then Wi-Fi."""
    pairs = [
        (str(address), one["kind"])
        for one in found
        if one["kind"] in _KINDS
        for address in (ipaddress.ip_interface(text).ip for text in one["addresses"])
        if address.version == 4 and not address.is_link_local
    ]
    pairs.sort(key=lambda pair: (pair[0] != outgoing, _KINDS.index(pair[1])))
    return [address for address, _ in pairs]


def _announced_name() -> str | None:
    """NAME.local where this system answers for it (mDNS); None where it does not."""
    system = platform.system()
    name: str | None = platform.node().partition(".")[0]
    if system == "Darwin":
        name = run("scutil", "--get", "LocalHostName")
    elif system != "Windows" and not _AVAHI.exists():
        return None
    return f"{name.lower()}.local" if name and _LABEL.fullmatch(name) else None


def show_link(link: str) -> None:
    """Print a link with its QR code on this terminal."""
    screen = Screen(file=sys.stdout, highlight=False, markup=False, emoji=False)
    screen.print(link, soft_wrap=True)
    code = qr_code(link)
    width = code.index("\n")
    if width > screen.width:
        screen.print(f"(a terminal of {width} columns shows a QR code of it)", soft_wrap=True)
    elif screen.encoding.startswith("utf"):
        screen.print(Text(code, style="#ffffff on #000000"), soft_wrap=True)


def qr_code(text: str) -> str:
    """A QR code as lines of half blocks, two rows of modules a line."""
    import segno  # not above: a host that was set up earlier may not have it, and does without

    rows = [[*row] for row in segno.make(text, error="l", micro=False).matrix_iter(border=_BORDER)]
    below = itertools.chain(rows[1::2], [[0] * len(rows)])
    pairs = zip(rows[::2], below, strict=False)
    return "\n".join("".join(map(_BLOCKS.__getitem__, zip(*pair, strict=True))) for pair in pairs)
