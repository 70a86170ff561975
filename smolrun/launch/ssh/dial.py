"""A TCP connection to the first address of a name that answers, in time."""

from __future__ import annotations

import socket
import time

from smolrun.launch.ssh.failure import not_found, not_reached
from smolrun.launch.ssh.hop import Failed


def dial(host: str, port: int, timeout_s: float) -> socket.socket:
    """Connect; every address of the name gets its share of the time. Raises Failed."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:  # UnicodeError: a name that cannot be one
        raise not_found(host, getattr(error, "strerror", None) or str(error)) from None
    deadline = time.monotonic() + timeout_s
    failed: Failed = not_found(host, "none")
    for place, (family, kind, protocol, _, address) in enumerate(found):
        dialled = socket.socket(family, kind, protocol)
        try:
            left = max(deadline - time.monotonic(), 0.1)
            dialled.settimeout(left / (len(found) - place))
            dialled.connect(address)
            # The control protocol is short lines, each waited for.
            dialled.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return dialled
        except OSError as error:
            dialled.close()
            failed = not_reached(_named(host, str(address[0]), port), error)
        except BaseException:
            dialled.close()
            raise
    raise failed


def _named(host: str, address: str, port: int) -> str:
    return f"{host} port {port}" if address == host else f"{host} ({address}) port {port}"
