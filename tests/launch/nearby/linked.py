"""Both ends of a connection to a joined machine, in this process."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from smolrun.launch.nearby.machine_key import MachineKey, client_context
from smolrun.launch.nearby.transport import Transport


def tls_pair() -> tuple[ssl.SSLSocket, ssl.SSLSocket]:
    """A server's and a client's socket after TLS's handshake."""
    here, there = socket.socketpair()
    found: list[ssl.SSLSocket] = []
    context = MachineKey.make().server_context()
    accepting = threading.Thread(
        target=lambda: found.append(context.wrap_socket(here, server_side=True)), daemon=True
    )
    accepting.start()
    client = client_context().wrap_socket(there)
    accepting.join(20.0)
    return found[0], client


@contextmanager
def linked(
    on_open: Any = None, *, tls: bool = False, **options: Any
) -> Iterator[tuple[Transport, Transport]]:
    """The coordinator's end and the agent's, which answers requests by `on_open`."""
    one, other = tls_pair() if tls else socket.socketpair()
    coordinator = Transport(one, "pi5", **options)
    agent = Transport(other, "laptop", on_open=on_open, **options)
    coordinator.start()
    agent.start()
    try:
        yield coordinator, agent
    finally:
        coordinator.close()
        agent.close()
