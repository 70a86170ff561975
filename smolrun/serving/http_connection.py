"""HTTP/1.1 connections with limits that uvicorn's own lack: on their number, and on silence.

    opened -- no whole header within header_timeout_s --> 408, closed
    idle   -- more than max_connections are open -------> the one that is idle longest is closed
    busy   -- none is idle -----------------------------> the new one is answered 503
    sending -- what waits for the client is not taken within write_timeout_s --> aborted

So connections that send nothing, or read nothing, keep no one else out.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import h11
import msgspec
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from smolrun.serving.api_errors import ApiError, json_response

_LINGER_S = 2.0


@dataclass(frozen=True)
class ConnectionLimits:
    """Of all connections together, and of each. `write_timeout_s`: for a client to take most of
    what waits for it, once that is more than asyncio's 64 KiB."""

    max_connections: int = 256
    header_timeout_s: float = 10.0
    write_timeout_s: float = 30.0


async def _refuse(scope: Any, receive: Any, send: Any) -> None:
    """The application of a connection that is one too many."""
    error = ApiError(
        503,
        "too many connections are open; try again later",
        code="too_many_connections",
        headers={"retry-after": "1", "connection": "close"},
    )
    await json_response(error.body, error.status, error.headers)(scope, receive, send)


class LimitedConnection(H11Protocol):
    """One connection; on the event loop's thread."""

    def __init__(self, *, limits: ConnectionLimits, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._limits = limits
        self._idle_since = 0.0
        self._header_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._is_ending = False

    @property
    def is_idle(self) -> bool:
        """Whether no request of it is being answered."""
        cycle = cast(RequestResponseCycle | None, self.cycle)  # None before the first request
        return cycle is None or cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Closes the connection that is idle longest where there are too many."""
        super().connection_made(transport)
        # asyncio does it only for sockets made with this protocol number. Without it a small event
        # after another waits for the client's delayed ACK, 40 ms.
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._idle_since = self.loop.time()
        self._await_header()
        # A connection that is being closed leaves the set only later.
        is_open = [c for c in self.connections if not c.transport.is_closing()]
        if len(is_open) <= self._limits.max_connections:
            return
        others = [c for c in is_open if isinstance(c, LimitedConnection) and c is not self]
        idle = [other for other in others if other.is_idle]
        if idle:
            min(idle, key=lambda other: other._idle_since).transport.close()
        else:
            self.app = _refuse

    def on_response_complete(self) -> None:
        """It is idle from now on, until another request comes."""
        self._idle_since = self.loop.time()
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing may be left that fires later."""
        for timer in (self._header_timer, self._write_timer):
            if timer is not None:
                timer.cancel()
        self._header_timer = self._write_timer = None
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Watches the time of a header, of the first request and of later ones."""
        if self._is_ending:
            return
        super().data_received(data)
        if self.conn.their_state is h11.IDLE:
            self._await_header()
        elif self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _await_header(self) -> None:
        if self._header_timer is None:
            delay = self._limits.header_timeout_s
            self._header_timer = self.loop.call_later(delay, self._header_late)

    def _header_late(self) -> None:
        self._header_timer = None
        if self.is_idle and not self.transport.is_closing():
            seconds = self._limits.header_timeout_s
            self._answer(ApiError(408, f"no request came within {seconds:g} s", code="timeout"))

    def send_400_response(self, msg: str) -> None:
        """What h11 does not understand is answered in the shape of all errors."""
        if self.is_idle:
            self._answer(ApiError(400, msg, code="invalid_http"))
        else:
            self.transport.close()

    def _answer(self, error: ApiError) -> None:
        """Write an error by hand, as there is no request that an application could answer."""
        body = msgspec.json.encode(error.body)
        reason = {400: "Bad Request", 408: "Request Timeout"}[error.status]
        head = (
            f"HTTP/1.1 {error.status} {reason}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        # What the client still sends is read, or else the system would reset the connection, and
        # the client might never see the answer.
        self._is_ending = True
        self.transport.write_eof()
        self.loop.call_later(_LINGER_S, self.transport.close)

    def pause_writing(self) -> None:
        """The client does not take what is sent to it."""
        super().pause_writing()
        if self._write_timer is None:
            delay = self._limits.write_timeout_s
            self._write_timer = self.loop.call_later(delay, self.transport.abort)

    def resume_writing(self) -> None:
        """It does again."""
        super().resume_writing()
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None


def connections(limits: ConnectionLimits) -> Callable[..., asyncio.Protocol]:
    """What uvicorn makes a connection by."""

    def connection(**kwargs: Any) -> asyncio.Protocol:
        return LimitedConnection(limits=limits, **kwargs)

    return connection
