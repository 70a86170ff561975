"""Listens to a cable of the lab: what an eavesdropper in the network would read."""

from __future__ import annotations

import socket
import threading
from types import TracebackType

from tests.hosts.host import Host

_ALL_PROTOCOLS = 0x0003
_BEGINNING = 400  # of a packet: headers and the first words of a message


class Tap:
    """Between enter and exit, `num_bytes` counts what passed, and `beginnings` keeps the first
    bytes of every packet."""

    def __init__(self, host: Host) -> None:
        self.num_bytes = 0
        self._kept: list[bytes] = []
        self._socket = host.call(_listener)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="tap")

    @property
    def beginnings(self) -> bytes:
        """The first bytes of all packets, one after the other."""
        return b"".join(self._kept)

    def __enter__(self) -> Tap:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()
        self._thread.join(10.0)
        self._socket.close()

    def _listen(self) -> None:
        while not self._over.is_set():
            try:
                packet = self._socket.recv(65536)
            except TimeoutError:
                continue
            self.num_bytes += len(packet)
            self._kept.append(packet[:_BEGINNING])


def _listener() -> socket.socket:
    sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ALL_PROTOCOLS))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32 << 20)
    sock.settimeout(0.2)
    return sock
