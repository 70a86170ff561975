"""The HTTP server of the driver: uvicorn on a thread of its own, "smolrun-http".

server = HttpServer(app, frontend, host="127.0.0.1", port=7665)
url = server.start()      # OSError if the port is taken
...
server.stop(drain_s=30)   # refuses new requests, lets the running ones end
"""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import uvicorn

from smolrun.serving.frontend import Frontend

_START_TIMEOUT_S = 30.0
_CLOSE_S = 5.0  # for connections to be closed after the last request has ended


class HttpServer:
    """Serves an ASGI app. `start` and `stop` are called by one thread, and block."""

    def __init__(
        self, app: Callable[..., Awaitable[Any]], frontend: Frontend, *, host: str, port: int
    ) -> None:
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
                http="h11",
                ws="none",
                lifespan="off",
                server_header=False,
                proxy_headers=False,
                timeout_graceful_shutdown=int(_CLOSE_S),
            )
        )
        self._thread = threading.Thread(target=self._run, name="smolrun-http", daemon=True)
        self._listener: socket.socket | None = None

    def start(self) -> str:
        """Bind and serve; returns the URL. Raises OSError where the port is taken."""
        family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
        self._listener = socket.create_server(
            (self._host, self._port), family=family, backlog=512, reuse_port=False
        )
        port = self._listener.getsockname()[1]
        self._thread.start()
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"http://{host}:{port}"

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        assert self._listener is not None
        try:
            self._loop.run_until_complete(self._server.serve(sockets=[self._listener]))
        finally:
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.close()

    def stop(self, drain_s: float) -> None:
        """Refuse new requests, wait `drain_s` seconds for those that run, end the rest with an
        error, and close. Blocks until the thread has ended."""
        if not self._thread.is_alive():
            return
        asyncio.run_coroutine_threadsafe(self._drain(drain_s), self._loop)
        self._thread.join(drain_s + _CLOSE_S + _START_TIMEOUT_S)

    async def _drain(self, drain_s: float) -> None:
        self._frontend.drain()
        if not await self._frontend.wait_idle(drain_s):
            self._frontend.abort("the server is being shut down")
            await self._frontend.wait_idle(_CLOSE_S)
        self._server.should_exit = True
