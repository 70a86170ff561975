"""Host names and IP addresses: resolving a name, this host's own addresses, and
what must be added to a link-local one.

Names are resolved once, on the driver; everything else here works on numeric addresses."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Sequence

import psutil

from smolrun.errors import HostError

SocketAddress = tuple[str, int] | tuple[str, int, int, int]
_ANYWHERE = ("198.51.100.1", 9)  # of the range for documentation: nobody's


def resolve(host: str, names: Sequence[str]) -> list[str]:
    """The addresses behind `names` of a host, each once, in order of preference; raises HostError
    if a name is unknown. May block as long as the system's resolver does."""
    found: dict[str, None] = {}
    for name in names:
        try:
            answers = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise HostError(
                host,
                f"its address {name!r} cannot be resolved ({getattr(error, 'strerror', error)})",
                "check the spelling, or give an IP address as `address:` in the cluster file",
            ) from None
        found.update(dict.fromkeys(str(answer[4][0]) for answer in answers))
    return list(found)


def is_loopback(address: str) -> bool:
    """Whether it is a loopback address."""
    try:
        return ipaddress.ip_address(address.partition("%")[0]).is_loopback
    except ValueError:
        return False


def own_addresses() -> list[str]:
    """All addresses of this host; link-local IPv6 ones with their interface, as fe80::1%eth0."""
    families = (socket.AF_INET, socket.AF_INET6)
    return [
        _with_scope(one.address, name)
        for name, addresses in psutil.net_if_addrs().items()
        for one in addresses
        if one.family in families
    ]


def outgoing_address() -> str | None:
    """This host's IPv4 address on the interface of the default route; None without one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect(_ANYWHERE)  # of UDP: it sends nothing
        except OSError:
            return None
        return str(sock.getsockname()[0])


def reachable_as(address: str, *, own: bool = False) -> list[str]:
    """The addresses to pass to the system for this one: itself, unless it is link-local.

    A link-local address means nothing without an interface, and the interface of the host that
    named it means nothing here: each of ours that could lead there is tried, or, for one of our
    `own`, the one that has it."""
    bare = address.partition("%")[0]
    if not _is_link_local_v6(bare):
        return [address]
    mine = [one for one in own_addresses() if _is_link_local_v6(one.partition("%")[0])]
    if own:
        return [one for one in mine if one.partition("%")[0] == bare] or [address]
    scopes = dict.fromkeys(one.partition("%")[2] for one in mine)
    return [f"{bare}%{scope}" for scope in scopes if scope] or [address]


def socket_address(address: str, port: int) -> tuple[socket.AddressFamily, SocketAddress]:
    """Family and address as a socket wants them; OSError if the address is not numeric."""
    flags = socket.AI_NUMERICHOST | socket.AI_NUMERICSERV
    found = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM, flags=flags)
    family, _, _, _, where = found[0]
    return family, where  # type: ignore[return-value]  # never an address of raw bytes


def shown(address: str, port: int) -> str:
    """Address and port as text: 10.0.0.1:4000, [fe80::1]:4000."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def _is_link_local_v6(address: str) -> bool:
    try:
        number = ipaddress.ip_address(address)
    except ValueError:
        return False
    return number.version == 6 and number.is_link_local


def _with_scope(address: str, interface: str) -> str:
    needs_scope = "%" not in address and _is_link_local_v6(address)
    return f"{address}%{interface}" if needs_scope else address
