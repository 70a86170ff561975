"""The coordinator's port for machines that want to join: codes, limits, and a thread for each.

    server = PairingServer(ThisMachine.load(), cluster="home", on_code=print, on_paired=take)
    server.port, server.code
    server.close()

A stranger gets 10 seconds, and can make the code change after three wrong tries, which the waiting
times of its address slow down. It cannot stop others: of each address few connections are open at
a time, and when all are taken the oldest is closed.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
import time
from collections import OrderedDict
from collections.abc import Callable

from smolrun.errors import SmolrunError
from smolrun.launch.nearby.codes import CodeKeeper
from smolrun.launch.nearby.pairing import Paired, ThisMachine, pair_as_coordinator

_OPEN = 32  # connections that are not paired yet
_OPEN_PER_ADDRESS = 4
_TIMEOUT_S = 10.0
_PAUSE_S = 0.1  # after accept() has failed: out of descriptors, others will be free again


class PairingServer:
    """Listens on all addresses of this machine, IPv4 and IPv6, from now until `close`.

    `on_paired` is called with each machine in a thread of its own, which it may keep; it owns the
    connection. `on_refused` is called with a sentence, at most once a second.
    """

    def __init__(
        self,
        me: ThisMachine,
        *,
        cluster: str,
        on_code: Callable[[str], None],
        on_paired: Callable[[Paired], None],
        on_refused: Callable[[str], None] = lambda why: None,
        may_remember: bool = True,
        port: int = 0,
        timeout_s: float = _TIMEOUT_S,
    ) -> None:
        self._me = me
        self._cluster = cluster
        self._on_paired = on_paired
        self._on_refused = on_refused
        self._may_remember = may_remember
        self._timeout_s = timeout_s
        self._context = me.key.server_context()
        self._lock = threading.Lock()
        self._open: OrderedDict[ssl.SSLSocket, str] = OrderedDict()  # oldest first -> its address
        self._last_refusal = float("-inf")
        self._is_closed = False
        self._listener = _listen(port)
        self.port: int = self._listener.getsockname()[1]
        self._codes = CodeKeeper(on_code)
        self._thread = threading.Thread(
            target=self._accept, name="smolrun-pairing-server", daemon=True
        )
        self._thread.start()

    @property
    def code(self) -> str:
        """The one that is valid now."""
        return self._codes.code

    def close(self) -> None:
        """Nobody new gets in; connections that are not paired yet are closed. Never raises."""
        with self._lock:
            self._is_closed = True
            doomed = list(self._open)
        # What ends a blocked accept() differs: on Linux a shutdown, elsewhere a connection.
        _shut(self._listener)
        with contextlib.suppress(OSError):
            socket.create_connection(("localhost", self.port), timeout=1.0).close()
        self._listener.close()
        for sock in doomed:
            _shut(sock)
        self._thread.join(2.0)

    def _accept(self) -> None:
        while not self._is_closed:
            try:
                plain, address = self._listener.accept()
            except OSError:
                time.sleep(_PAUSE_S)
                continue
            host = _readable(str(address[0]))
            with contextlib.suppress(OSError):
                plain.settimeout(self._timeout_s)
                sock = self._context.wrap_socket(
                    plain, server_side=True, do_handshake_on_connect=False
                )
                if self._admit(sock, host):
                    threading.Thread(
                        target=self._pair, args=(sock, host), name="smolrun-pairing", daemon=True
                    ).start()
                    continue
                sock.close()
            plain.close()

    def _admit(self, sock: ssl.SSLSocket, host: str) -> bool:
        with self._lock:
            open_of_it = sum(other == host for other in self._open.values())
            if self._is_closed or open_of_it >= _OPEN_PER_ADDRESS:
                return False
            if len(self._open) >= _OPEN:
                oldest, _ = self._open.popitem(last=False)
                _shut(oldest)  # its thread sees the end, and closes it
            self._open[sock] = host
            return True

    def _pair(self, sock: ssl.SSLSocket, host: str) -> None:
        try:
            sock.do_handshake()
            paired = pair_as_coordinator(
                sock,
                self._me,
                cluster=self._cluster,
                codes=self._codes,
                may_remember=self._may_remember,
                address=host,
                timeout_s=self._timeout_s,
            )
        except (SmolrunError, OSError) as error:
            sock.close()
            self._refused(f"{host}: {error}" if isinstance(error, SmolrunError) else "")
            return
        finally:
            with self._lock:
                self._open.pop(sock, None)
        self._on_paired(paired)

    def _refused(self, why: str) -> None:
        with self._lock:
            is_due = why and time.monotonic() - self._last_refusal >= 1.0
            if is_due:
                self._last_refusal = time.monotonic()
        if is_due:
            self._on_refused(why)


def _listen(port: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


def _readable(address: str) -> str:
    """An IPv4 address that came through an IPv6 socket (::ffff:192.0.2.1) as people write it."""
    return address.removeprefix("::ffff:")


def _shut(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        socket.socket.shutdown(sock, socket.SHUT_RDWR)
