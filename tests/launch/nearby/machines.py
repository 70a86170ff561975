"""Machines that pair in tests: each with a key and a folder of remembered machines of its own."""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from smolrun.errors import SmolrunError
from smolrun.launch.nearby.machine_key import MachineKey, client_context
from smolrun.launch.nearby.messages import Messages
from smolrun.launch.nearby.pairing import Paired, ThisMachine
from smolrun.launch.nearby.pairing_server import PairingServer
from smolrun.launch.nearby.remembered import RememberedMachines
from tests.waiting import SOON_S


def machine(folder: Path, name: str) -> ThisMachine:
    return ThisMachine(MachineKey.make(), RememberedMachines(folder / name), f"anna@{name}")


class Coordinator(PairingServer):
    """A server that keeps what it reported: machines, codes and sentences."""

    def __init__(self, me: ThisMachine, **options: Any) -> None:
        self.paired: queue.Queue[Paired] = queue.Queue()
        self.codes: list[str] = []
        self.refused: list[str] = []
        super().__init__(
            me,
            cluster="home",
            on_code=self.codes.append,
            on_paired=self.paired.put,
            on_refused=self.refused.append,
            **{"timeout_s": SOON_S, **options},
        )


@contextmanager
def coordinator(folder: Path, **options: Any) -> Iterator[Coordinator]:
    server = Coordinator(machine(folder, "mini"), **options)
    try:
        yield server
    finally:
        server.close()
        while not server.paired.empty():
            server.paired.get().socket.close()


@contextmanager
def tls_to(port: int, host: str = "127.0.0.1") -> Iterator[tuple[Any, Messages]]:
    """A TLS connection of a stranger, who may send what it likes, and its messages."""
    plain = socket.create_connection((host, port), timeout=SOON_S)
    with client_context().wrap_socket(plain) as sock:
        yield sock, Messages(sock, SOON_S)


def is_closed(sock: socket.socket) -> bool:
    """Whether the other side ends the connection, in either way, without a byte."""
    sock.settimeout(SOON_S)
    try:
        return sock.recv(1) == b""
    except ConnectionResetError:
        return True


@contextmanager
def tls_server(key: MachineKey, talk: Callable[[Messages], None]) -> Iterator[int]:
    """A port where whoever connects gets TLS with that key, and then `talk`; errors end a
    connection."""
    context = key.server_context()
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                plain, _ = listener.accept()
                plain.settimeout(SOON_S)
                with (
                    contextlib.suppress(OSError, SmolrunError),
                    context.wrap_socket(plain, server_side=True) as sock,
                ):
                    talk(Messages(sock, SOON_S))
                    sock.recv(1)  # until the other side closes

    thread = threading.Thread(target=serve, name="tls_server", daemon=True)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.close()
