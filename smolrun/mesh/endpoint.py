"""The listening sockets of a rank while the mesh is built: one for each address it was given, and
none once the mesh is complete."""

from __future__ import annotations

import errno
import logging
import socket
from collections.abc import Sequence

from smolrun.errors import HostError
from smolrun.mesh.addresses import own_addresses, reachable_as, shown, socket_address

_log = logging.getLogger(__name__)

_BACKLOG = 128
_NOT_OURS = {errno.EADDRNOTAVAIL, getattr(errno, "WSAEADDRNOTAVAIL", errno.EADDRNOTAVAIL)}
_IN_USE = {errno.EADDRINUSE, getattr(errno, "WSAEADDRINUSE", errno.EADDRINUSE)}


class Endpoint:
    """Listening sockets; `addresses` are theirs, with the actual ports, best first."""

    def __init__(
        self,
        addresses: Sequence[str],
        ports: tuple[int, int] | None = None,
        *,
        host: str = "this host",
    ) -> None:
        """Listens on every one of `addresses` that is this host's own, on the first free port of
        `ports` (first and last) or on any. Raises HostError if it can listen on none of them."""
        self.sockets: list[socket.socket] = []
        self.addresses: list[tuple[str, int]] = []
        problems: list[HostError] = []
        for address in addresses:
            try:
                sock = _listen(address, ports, host)
            except HostError as error:
                problems.append(error)
                continue
            self.sockets.append(sock)
            self.addresses.append((address, sock.getsockname()[1]))
        if not self.sockets:
            nowhere = HostError(host, "it was given no address to listen on")
            raise problems[0] if problems else nowhere
        for problem in problems:
            listening = ", ".join(shown(*one) for one in self.addresses)
            _log.warning("%s; using %s", problem, listening)

    def close(self) -> None:
        """Stops listening."""
        for sock in self.sockets:
            sock.close()


def _listen(address: str, ports: tuple[int, int] | None, host: str) -> socket.socket:
    first, last = ports or (0, 0)
    for port in range(first, last + 1):
        try:
            family, where = socket_address(reachable_as(address, own=True)[0], port)
            sock = socket.create_server(where, family=family, backlog=_BACKLOG)
        except OSError as error:
            if error.errno in _IN_USE and port < last:
                continue
            raise _problem(error, address, ports, host) from None
        sock.setblocking(False)
        return sock
    raise HostError(host, f"{first}-{last} is no range of ports")


def _problem(error: OSError, address: str, ports: tuple[int, int] | None, host: str) -> HostError:
    """The HostError for a failed listen."""
    if error.errno in _IN_USE and ports is not None:
        return HostError(
            host,
            f"every port of {ports[0]}-{ports[1]} is in use on {address}",
            "widen `ports:` in the cluster file, or end what listens there",
        )
    if error.errno in _NOT_OURS:
        return HostError(
            host,
            f"{address} is not one of its own addresses, which are {', '.join(own_addresses())}",
            "mend `address:` in the cluster file",
        )
    if isinstance(error, socket.gaierror):
        return HostError(host, f"{address} is not an IP address as numbers")
    return HostError(host, f"cannot listen on {address}: {error.strerror or error}")
