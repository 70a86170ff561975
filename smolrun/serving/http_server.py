"""The HTTP server of the driver: uvicorn on a thread of its own, "smolrun-http".

server = HttpServer(app, frontend, host="127.0.0.1", port=7665)
url = server.start()      # OSError if the port is taken
...
server.stop(drain_s=30)   # refuses new requests, lets the running ones end
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import psutil
import uvicorn

from smolrun.serving.frontend import Frontend
from smolrun.serving.http_connection import ConnectionLimits, connections

_CLOSE_S = 5.0  # for connections to be closed after the last request has ended
_JOIN_S = 10.0
# Longer than clients keep a connection for later, so that they are the ones who close it.
_KEEP_ALIVE_S = 75


class HttpServer:
    """Serves an ASGI app. `start` and `stop` are called by one thread, and block."""

    def __init__(
        self,
        app: Callable[..., Awaitable[Any]],
        frontend: Frontend,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        limits: ConnectionLimits | None = None,
    ) -> None:
        """`port` 0 takes a free one. The frontend's event loop is made here."""
        self._frontend = frontend
        self._host = host
        self._port = port
        self._loop = asyncio.new_event_loop()
        frontend.attach(self._loop)
        self._server = uvicorn.Server(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                http=connections(limits or ConnectionLimits()),  # type: ignore[arg-type]
                ws="none",
                lifespan="off",
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=_KEEP_ALIVE_S,
                timeout_graceful_shutdown=int(_CLOSE_S),
            )
        )
        self._thread = threading.Thread(target=self._run, name="smolrun-http", daemon=True)
        self._listener: socket.socket | None = None

    def start(self) -> str:
        """Bind and serve; returns the URL. Raises OSError where the port is taken."""
        # Its warnings are about what clients send, who get an answer; its errors are defects here.
        # asyncio warns of every write to a client that has left.
        for name in ("uvicorn.error", "asyncio"):
            logging.getLogger(name).setLevel(logging.ERROR)
        family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
        try:
            self._listener = socket.create_server(
                (self._host, self._port), family=family, backlog=512
            )
        except OSError as error:
            raise OSError(error.errno, _reason(self._host, self._port, error)) from None
        port = self._listener.getsockname()[1]
        self._thread.start()
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"http://{host}:{port}"

    def _run(self) -> None:
        assert self._listener is not None
        # The runner cancels what is left on the loop in the end, and closes it.
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._server.serve(sockets=[self._listener]))

    def stop(self, drain_s: float) -> None:
        """Refuse new requests, wait `drain_s` seconds for those that run, end the rest with an
        error, and close. Blocks until the thread has ended."""
        if not self._thread.is_alive():
            if not self._loop.is_closed():
                self._loop.close()
            return
        draining = self._drain(drain_s)
        try:
            asyncio.run_coroutine_threadsafe(draining, self._loop)
        except RuntimeError:  # another thread stops it too, and has just closed the loop
            draining.close()
        self._thread.join(drain_s + 2 * _CLOSE_S + _JOIN_S)

    async def _drain(self, drain_s: float) -> None:
        self._frontend.drain()
        if not await self._frontend.wait_idle(drain_s):
            self._frontend.abort("the server is being shut down")
            await self._frontend.wait_idle(_CLOSE_S)
        self._server.should_exit = True


def _reason(host: str, port: int, error: OSError) -> str:
    """Why the port cannot be bound, with the process that has it where that can be found out."""
    owner = ""
    try:
        for connection in psutil.net_connections("tcp"):
            is_listening = connection.status == psutil.CONN_LISTEN
            if (
                is_listening
                and connection.laddr
                and connection.laddr.port == port
                and connection.pid
            ):
                name = psutil.Process(connection.pid).name()
                owner = f": process {connection.pid} ({name}) listens there"
    except (psutil.Error, OSError):  # another user's, or macOS without root
        pass
    what = f"cannot listen on {host} port {port}{owner}: {error.strerror or error}"
    if error.errno == errno.EADDRINUSE:
        return f"{what}; end that process, or set serving.port (0 takes a free one)"
    return what
