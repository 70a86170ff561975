"""One authenticated connection between a coordinator and a joined machine, with many channels.

It knows neither who authenticated it nor what is asked over it. Each side sends a frame every
second; a side that receives nothing for 15 seconds closes the connection, and all waits end.
Threads: "smolrun-nearby-NAME-read" handles frames and never blocks on sending; "-alive" sends;
"-watch" measures the silence.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from smolrun.errors import ProtocolError
from smolrun.launch.control import LEASE_LIMIT_S
from smolrun.launch.nearby.frames import (
    MAX_PAYLOAD,
    STREAMS,
    WINDOW,
    FrameSplitter,
    Kind,
    as_stream,
    credit,
    decode,
    encode,
    frame,
    read_credit,
)
from smolrun.sanitize import one_line

_ALIVE_EVERY_S = 1.0
_SILENT_S = 3.0  # not lost yet, but the end of a run should not wait for it
_TICK_S = 0.5
_FAREWELL_S = 1.0
_MOST_CHANNELS = 1024
_MOST_REASON_CHARS = 1000

Request = dict[str, Any]


class RequestChannel:
    """One request and its streams. Any thread may use it; each stream has one reader."""

    def __init__(self, transport: Transport, number: int) -> None:
        self._transport = transport
        self._number = number
        self._changed = threading.Condition()
        self._received: dict[Kind, deque[bytes]] = {stream: deque() for stream in STREAMS}
        self._waiting_bytes = dict.fromkeys(STREAMS, 0)  # received, and not read yet
        self._used = dict.fromkeys(STREAMS, 0)  # read, and not credited yet
        self._has_ended = dict.fromkeys(STREAMS, False)
        self._credit = dict.fromkeys(STREAMS, WINDOW)
        self._result: Request | None = None
        self._is_gone = False
        self._on_cancel: Callable[[], None] | None = None
        self.is_cancelled = False

    def read(self, stream: Kind) -> bytes:
        """Some bytes of a stream; empty at its end, or when the connection is gone."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._received[stream] or self._has_ended[stream] or self._is_gone
            )
            if not self._received[stream]:
                return b""
            data = self._received[stream].popleft()
            self._waiting_bytes[stream] -= len(data)
            self._used[stream] += len(data)
            used = self._used[stream]
            if used < WINDOW // 2:
                return data
            self._used[stream] = 0
        with contextlib.suppress(OSError):
            self._transport.send(credit(self._number, stream, used))
        return data

    def read_all(self, stream: Kind, most_bytes: int) -> bytes:
        """All of a stream; ProtocolError if it has more than so many bytes."""
        parts, size = [], 0
        while data := self.read(stream):
            size += len(data)
            if size > most_bytes:
                raise ProtocolError(f"sent more than {most_bytes:,} bytes")
            parts.append(data)
        return b"".join(parts)

    def write(self, stream: Kind, data: bytes) -> None:
        """All of `data` into a stream; blocks while the other side does not read. OSError when the
        channel has ended or the connection is gone."""
        rest = memoryview(data)
        while rest:
            with self._changed:
                self._changed.wait_for(lambda: self._credit[stream] or self._is_over)
                if self._is_over:
                    raise BrokenPipeError(self._transport.lost or "it has ended")
                size = min(len(rest), self._credit[stream], MAX_PAYLOAD)
                self._credit[stream] -= size
            self._transport.send(frame(stream, self._number, bytes(rest[:size])))
            rest = rest[size:]

    def end(self, stream: Kind) -> None:
        """Nothing more comes in this stream. Never raises."""
        self._say(frame(Kind.END, self._number, bytes([stream])))

    def exit(self, result: Mapping[str, Any]) -> None:
        """The request has ended, with this result; the agent's last word. Never raises."""
        self._say(frame(Kind.EXIT, self._number, encode(result)))
        self._transport.forget(self._number)
        self.lose()

    def wait(self, timeout_s: float | None = None) -> Request | None:
        """How the request ended; None at the deadline, or when the connection was lost before."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_over, timeout_s)
            return self._result

    def cancel(self) -> None:
        """Have the other side end it, whatever it does. Never raises."""
        self._say(frame(Kind.CANCEL, self._number))

    def abandon(self) -> None:
        """Wait for it no longer, and have the other side end it if it has not. Never raises."""
        if not self._is_over:
            self.cancel()
        self._transport.forget(self._number)
        self.lose()

    def on_cancel(self, callback: Callable[[], None]) -> None:
        """Call `callback` once the other side has cancelled it, or the connection is gone; it must
        not block. At once, if that is so already."""
        with self._changed:
            self._on_cancel = callback
            is_due = self.is_cancelled or self._is_gone
        if is_due:
            callback()

    @property
    def _is_over(self) -> bool:
        return self._result is not None or self._is_gone

    def _say(self, data: bytes) -> None:
        with contextlib.suppress(OSError):
            self._transport.send(data)

    # -- by the reading thread ----

    def handle(self, kind: Kind, payload: bytes) -> None:
        """Take one frame; ProtocolError."""
        callback = None
        with self._changed:
            if kind in STREAMS:
                self._waiting_bytes[kind] += len(payload)
                if self._waiting_bytes[kind] + self._used[kind] > WINDOW or self._has_ended[kind]:
                    raise ProtocolError("sent more of a stream than it may")
                self._received[kind].append(payload)
            elif kind is Kind.END:
                self._has_ended[as_stream(payload[0] if payload else 0)] = True
            elif kind is Kind.CREDIT:
                stream, num_bytes = read_credit(payload)
                self._credit[stream] = min(self._credit[stream] + num_bytes, WINDOW)
            elif kind is Kind.EXIT:
                self._result = decode(payload, Request)
                self._has_ended = dict.fromkeys(STREAMS, True)
            elif kind is Kind.CANCEL:
                self.is_cancelled, callback = True, self._on_cancel
            self._changed.notify_all()
        if callback is not None:
            callback()

    def lose(self) -> None:
        """The connection is gone: all waits end."""
        with self._changed:
            self._is_gone = True
            callback = None if self.is_cancelled else self._on_cancel
            self._changed.notify_all()
        if callback is not None:
            callback()


class Transport:
    """Channels over a stream that is authenticated already. `on_open(channel, request)` is called
    in a thread of its own for each request of the other side; without it none is accepted."""

    def __init__(
        self,
        sock: socket.socket,
        name: str,
        *,
        on_open: Callable[[RequestChannel, Request], None] | None = None,
        silence_limit_s: float = LEASE_LIMIT_S,
    ) -> None:
        """Own `sock`, an ssl.SSLSocket or a plain socket; nothing runs before `start`."""
        self.name = name
        self.lost: str | None = None
        self.said_goodbye = False  # whether the other side has ended it in order
        self._wire = _Wire(sock)
        self._on_open = on_open
        self._silence_limit_s = silence_limit_s
        self._silence_s = 0.0
        self._lock = threading.Lock()
        self._send_lock = threading.Lock()
        self._channels: dict[int, RequestChannel] = {}
        self._number = 0
        self._has_received = threading.Event()
        self._hello: bytes | None = None
        self._hello_came = threading.Event()
        self._ended = threading.Event()
        self._is_closed = False

    def start(self) -> None:
        """Begin to read; requests may come from now on."""
        for what, target in (("read", self._read), ("watch", self._watch), ("alive", self._say)):
            self._thread(what, target).start()

    def say_hello(self, mine: Any) -> None:
        """Send who this side is; OSError."""
        self.send(frame(Kind.HELLO, 0, encode(mine)))

    def receive_hello(self, theirs: type[Any], timeout_s: float) -> Any:
        """Who the other side is; ProtocolError, or OSError where the connection is lost or the
        deadline comes first."""
        if not self._hello_came.wait(timeout_s):
            self.close("it did not say who it is")
        if self._hello is None:
            raise ConnectionError(self.lost or "the connection was closed")
        return decode(self._hello, theirs)

    def open(self, request: Request) -> RequestChannel:
        """Send a request; OSError when the connection is gone."""
        with self._lock:
            if self._ended.is_set():
                raise ConnectionError(self.lost or "the connection is closed")
            self._number += 1
            channel = self._channels[self._number] = RequestChannel(self, self._number)
            number = self._number
        self.send(frame(Kind.OPEN, number, encode(request)))
        return channel

    @property
    def is_silent(self) -> bool:
        """Whether nothing has come from the other side for seconds, or it was lost for that."""
        return self._silence_s >= _SILENT_S

    @property
    def is_open(self) -> bool:
        """Whether frames still go both ways."""
        return not self._ended.is_set()

    def wait_end(self, timeout_s: float | None = None) -> bool:
        """Whether the connection has ended within the time."""
        return self._ended.wait(timeout_s)

    def send(self, data: bytes) -> None:
        """Send a frame; blocks while the other side takes no bytes, as long as it is not silent for
        too long. OSError."""
        with self._send_lock:
            if self._ended.is_set():
                raise ConnectionError(self.lost or "the connection is closed")
            self._wire.write(data)

    def forget(self, number: int) -> None:
        """The channel is over."""
        with self._lock:
            self._channels.pop(number, None)

    def close(self, reason: str = "") -> None:
        """End the connection; the other side is given the reason, if it can be. Never raises."""
        with self._lock:
            if self._is_closed or self._ended.is_set():
                return
            self._is_closed = True
        # A writer that waits for a frozen other side holds the lock: then there is no farewell.
        if self._send_lock.acquire(timeout=_FAREWELL_S):
            try:
                with contextlib.suppress(OSError):
                    text = encode(reason[:_MOST_REASON_CHARS])
                    self._wire.write(frame(Kind.BYE, 0, text), timeout_s=_FAREWELL_S)
                    # It closes then. What is closed here with bytes unread would lose the farewell.
                    self._ended.wait(_FAREWELL_S)
            finally:
                self._send_lock.release()
        self._finish(None)

    def give_up(self, reason: str) -> None:
        """Close it as lost, now."""
        self._finish(reason)

    def _thread(self, what: str, target: Callable[..., None], *args: Any) -> threading.Thread:
        name = f"smolrun-nearby-{self.name}-{what}"
        return threading.Thread(target=target, args=args, name=name, daemon=True)

    def _finish(self, reason: str | None) -> None:
        """The connection has ended; only the first call counts."""
        with self._lock:
            if self._ended.is_set():
                return
            self.lost = None if self._is_closed else reason
            self._ended.set()
            channels, self._channels = list(self._channels.values()), {}
        self._wire.hang_up()
        self._hello_came.set()
        for channel in channels:
            channel.lose()

    def _read(self) -> None:
        splitter = FrameSplitter()
        reason = "the other side ended the connection"
        try:
            while data := self._wire.read():
                self._has_received.set()
                for kind, number, payload in splitter.feed(data):
                    if kind is Kind.BYE:
                        self.said_goodbye = True
                        said = one_line(decode(payload, str))[:_MOST_REASON_CHARS]
                        self._finish(said or reason)
                        return
                    self._take(kind, number, payload)
        except ProtocolError as error:
            reason = f"it {error}"
        except OSError as error:
            reason = f"the connection was lost ({error.strerror or error})"
        finally:
            self._finish(reason)
            self._wire.close()

    def _take(self, kind: Kind, number: int, payload: bytes) -> None:
        if kind is Kind.HELLO:
            if self._hello is not None:
                raise ProtocolError("said twice who it is")
            self._hello = payload
            self._hello_came.set()
        elif kind is Kind.OPEN:
            self._opened(number, decode(payload, Request))
        elif kind is not Kind.ALIVE:
            with self._lock:
                channel = self._channels.get(number)
                if kind is Kind.EXIT:
                    self._channels.pop(number, None)
            if channel is not None:  # else it has ended, and the other side did not know that yet
                channel.handle(kind, payload)

    def _opened(self, number: int, request: Request) -> None:
        with self._lock:
            if self._on_open is None or number in self._channels:
                raise ProtocolError("sent a request that it may not send")
            if len(self._channels) >= _MOST_CHANNELS:
                raise ProtocolError(f"sent more than {_MOST_CHANNELS} requests at a time")
            channel = self._channels[number] = RequestChannel(self, number)
        self._thread(f"request{number}", self._on_open, channel, request).start()

    def _say(self) -> None:
        """Send a frame each second, so that the other side knows that this one is there."""
        while not self._ended.wait(_ALIVE_EVERY_S):
            with contextlib.suppress(OSError):  # the reading thread finds out why
                self.send(frame(Kind.ALIVE))

    def _watch(self) -> None:
        """End a connection that is silent for too long.

        The silence is summed in ticks of this thread: a machine that was suspended itself must not
        count that time as the other side's silence."""
        before = time.monotonic()
        while not self._ended.wait(_TICK_S):
            now = time.monotonic()
            passed_s, before = min(now - before, 2 * _TICK_S), now
            if self._has_received.is_set():
                self._has_received.clear()
                self._silence_s = 0.0
            else:
                self._silence_s += passed_s
            if self._silence_s >= self._silence_limit_s:
                self.give_up(f"no answer for {self._silence_s:.0f} s")


class _Wire:
    """A socket that one thread reads while another writes. OpenSSL's objects allow one call at a
    time, so each call is short, and what waits does so without the lock."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        with contextlib.suppress(OSError):  # a socket pair of a test has none
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sock = sock
        self._lock = threading.Lock()
        self._readable = selectors.DefaultSelector()
        self._readable.register(sock, selectors.EVENT_READ)
        self._writable = selectors.DefaultSelector()
        self._writable.register(sock, selectors.EVENT_WRITE)
        self._is_closed = False

    def read(self) -> bytes:
        """Some bytes, waited for; empty at the end."""
        while not self._is_closed:
            with self._lock:
                try:
                    return self._sock.recv(MAX_PAYLOAD)
                except (ssl.SSLWantReadError, BlockingIOError):
                    selector = self._readable
                except ssl.SSLWantWriteError:
                    selector = self._writable
            selector.select(_TICK_S)
        return b""

    def write(self, data: bytes, timeout_s: float | None = None) -> None:
        """All of `data`. After `timeout_s` the connection is ended and OSError is raised, as half a
        frame is of no use."""
        rest = memoryview(data)
        give_up = None if timeout_s is None else time.monotonic() + timeout_s
        while rest:
            with self._lock:
                if self._is_closed:
                    raise ConnectionError("the connection is closed")
                try:
                    rest = rest[self._sock.send(rest) :]
                    continue
                except (ssl.SSLWantWriteError, BlockingIOError):
                    selector = self._writable
                except ssl.SSLWantReadError:
                    selector = self._readable
            with contextlib.suppress(ValueError, OSError):  # it was closed meanwhile
                selector.select(_TICK_S)
            if give_up is not None and time.monotonic() > give_up:
                self.hang_up()
                raise TimeoutError("the other side takes no bytes")

    def hang_up(self) -> None:
        """End it for both directions; the reader closes it."""
        self._is_closed = True
        # Of the plain socket: SSLSocket's own would make a concurrent `recv` return what is
        # encrypted.
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self._sock, socket.SHUT_RDWR)

    def close(self) -> None:
        """Free the socket; by the thread that reads."""
        self._is_closed = True
        with self._lock:
            for selector in (self._readable, self._writable):
                selector.close()
            self._sock.close()
