"""Ports for processes that have to listen where a test says."""

from __future__ import annotations

import contextlib
import random
import socket

# Below the ports that a system gives to sockets without one of their own (32768 and above on Linux,
# 49152 and above elsewhere): nothing else takes them before the process listens.
_FIRST, _LAST = 20_000, 29_000


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that no socket has."""
    dice = random.SystemRandom()
    found: set[int] = set()
    while len(found) < count:
        port = dice.randint(_FIRST, _LAST)
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind(("127.0.0.1", port))
            found.add(port)
    return list(found)
