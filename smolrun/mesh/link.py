"""One connection: frames out of a queue into a byte pipe, bytes from the pipe into frames, and
counters.

    send(header, payload) -> queue -> pipe ~~~~ pipe -> decoder -> on_frame(frame)

A `Pipe` is a non-blocking stream of bytes; the plain one is below, the encrypted one in `tls.py`,
one with limited bandwidth in `shaping.py`. Runs on the I/O thread only. Knows nothing of ranks,
tags or matching."""

from __future__ import annotations

import functools
import math
import socket
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from smolrun.errors import BROKE_PROTOCOL, ProtocolError
from smolrun.mesh.io import READ, WRITE, IoThread
from smolrun.wire.frame import Frame, FrameDecoder, Header, encode_header

# Large buffers let the kernel move data while Python adds.
_SOCKET_BUFFER = 4 * 1024 * 1024
# After so many bytes of one connection the others get their turn.
_TURN_BYTES = 512 * 1024


class Pipe(Protocol):
    """A non-blocking stream of bytes. Methods raise BlockingIOError when they would wait, OSError
    when it is broken.

    After BlockingIOError, `send` is called again with buffers that begin with the same bytes (TLS
    insists on that); after Throttled only once its time has come. `recv_into` is called until it
    blocks, so a pipe may hold decrypted bytes that the selector does not see."""

    def fileno(self) -> int:
        """The descriptor to select on."""

    def send(self, buffers: list[memoryview]) -> int:
        """Sends a beginning of the buffers; returns how many bytes."""

    def recv_into(self, buffer: memoryview) -> int:
        """Fills a beginning of `buffer`; returns how many bytes, 0 at the end of the stream."""

    def end(self) -> None:
        """Ends the sending direction; receiving continues."""

    def close(self) -> None:
        """Closes at once."""


class Throttled(BlockingIOError):
    """Raised by a pipe with limited bandwidth: call it again after `after_s`, whatever the selector
    reports. If it `is_full`, it does not use the socket until then."""

    def __init__(self, after_s: float, *, is_full: bool) -> None:
        super().__init__()
        self.after_s = after_s
        self.is_full = is_full


class ThrottleTimers:
    """READ and WRITE of a throttled pipe, each paused until its time; then `resume(event)` is
    called, on the I/O thread."""

    def __init__(self, io: IoThread, resume: Callable[[int], None]) -> None:
        self.events = 0  # READ, WRITE: those not to be registered with the selector
        self._io = io
        self._resume = resume
        self._due_s = {READ: math.inf, WRITE: math.inf}

    def begin(self, event: int, throttled: Throttled) -> None:
        """Pauses READ or WRITE if the pipe is full; calls `resume` later in any case."""
        if throttled.is_full:
            self.events |= event
        due_s = time.monotonic() + throttled.after_s
        # Only the timer that is due first counts, so there is never more than one.
        if due_s < self._due_s[event]:
            self._due_s[event] = due_s
            self._io.call_later(throttled.after_s, functools.partial(self._end, event, due_s))

    def _end(self, event: int, due_s: float) -> None:
        if due_s == self._due_s[event]:
            self._due_s[event] = math.inf
            self.events &= ~event
            self._resume(event)


class PlainPipe:
    """A TCP socket as a pipe."""

    def __init__(self, sock: socket.socket) -> None:
        tune(sock)
        self._socket = sock
        self._can_gather = hasattr(sock, "sendmsg")  # Windows has no sendmsg

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, buffers: list[memoryview]) -> int:
        return self._socket.sendmsg(buffers) if self._can_gather else self._socket.send(buffers[0])

    def recv_into(self, buffer: memoryview) -> int:
        return self._socket.recv_into(buffer)

    def end(self) -> None:
        self._socket.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self._socket.close()


def tune(sock: socket.socket) -> None:
    """Non-blocking, no Nagle, large buffers, and a kernel that notices a dead path by itself where
    it can."""
    sock.setblocking(False)
    options = [
        (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    ]
    if _may_set_buffers():
        options.append((socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BUFFER))
        options.append((socket.SOL_SOCKET, socket.SO_RCVBUF, _SOCKET_BUFFER))
    # Not every system has these (macOS calls the first TCP_KEEPALIVE): heartbeats find a dead path
    # without them too.
    for name, value in (("TCP_KEEPIDLE", 5), ("TCP_KEEPINTVL", 2), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):
            options.append((socket.IPPROTO_TCP, getattr(socket, name), value))
    for level, option, value in options:
        try:
            sock.setsockopt(level, option, value)
        except OSError:
            continue  # options are best effort


@functools.cache
def _may_set_buffers() -> bool:
    """False on a Linux whose limits are smaller: its own buffers then grow larger than these."""
    try:
        limits = [Path(f"/proc/sys/net/core/{side}mem_max").read_text() for side in "rw"]
    except OSError:
        return True  # not Linux
    return all(int(limit) >= _SOCKET_BUFFER for limit in limits)


class FrameConnection:
    """A pipe with a queue of frames to send and a decoder for those that arrive.

    `on_frame` gets every complete frame, `on_closed(reason)` is called once when the pipe ends or
    breaks or the peer breaks the protocol. `refill` is called when the queue is empty and may call
    `send`, so a sender with many frames decides late which is next."""

    def __init__(
        self,
        io: IoThread,
        pipe: Pipe,
        *,
        place: Callable[[Header], memoryview],
        on_frame: Callable[[Frame], None],
        on_closed: Callable[[str], None],
        refill: Callable[[], None] | None = None,
    ) -> None:
        self.bytes_sent = 0
        self.bytes_received = 0
        self.is_open = True
        self._io = io
        self._pipe = pipe
        self._fd = pipe.fileno()
        self._decoder = FrameDecoder(place)
        self._on_frame = on_frame
        self._on_closed = on_closed
        self._refill = refill
        self._queue: deque[tuple[list[memoryview], Callable[[], None] | None]] = deque()
        self._sequence = 0
        self._wanted = self._events = 0
        self._throttle = ThrottleTimers(io, self._resume)
        self._is_flushing = False
        self._is_finishing = False
        self._has_ended = False
        self._listen(READ)
        # Frames may have come with the last bytes of the handshake, and be in the pipe already.
        io.post(lambda: self._ready(READ))

    @property
    def is_idle(self) -> bool:
        """Whether everything queued has been handed to the kernel."""
        return not self._queue

    def send(
        self,
        header: Header,
        payload: memoryview | None = None,
        on_sent: Callable[[], None] | None = None,
    ) -> None:
        """Queues a frame; `on_sent` runs when the kernel has all of it, and only then may the
        payload change."""
        head = encode_header(header._replace(sequence=self._sequence))
        self._sequence += 1
        buffers = (
            [memoryview(head), payload]
            if payload is not None and len(payload)
            else [memoryview(head)]
        )
        self._queue.append((buffers, on_sent))
        if not self._events & WRITE:
            self.flush()

    def flush(self) -> None:
        """Sends what the kernel takes now, and registers for WRITE if more is queued."""
        if self._is_flushing or not self.is_open or self._throttle.events & WRITE:
            return  # on_sent or refill called send: the loop below continues with it
        self._is_flushing = True
        try:
            self._flush()
        except Throttled as throttled:
            self._throttle.begin(WRITE, throttled)
            self._listen(READ | WRITE)
        except BlockingIOError:
            self._listen(READ | WRITE)
        except OSError as error:
            self._end(f"sending failed: {error.strerror or error}")
        finally:
            self._is_flushing = False

    def _flush(self) -> None:
        budget = _TURN_BYTES
        while self.is_open:  # on_sent may have led to the end of it
            if not self._queue and self._refill is not None:
                self._refill()
            if not self._queue or budget <= 0:
                self._listen(READ | WRITE if self._queue else READ)
                if self._is_finishing and not self._queue and not self._has_ended:
                    self._pipe.end()  # or BlockingIOError: then it is called again
                    self._has_ended = True
                return
            buffers, on_sent = self._queue[0]
            sent = self._pipe.send(buffers)
            self.bytes_sent += sent
            budget -= sent
            while buffers and sent >= len(buffers[0]):
                sent -= len(buffers.pop(0))
            if buffers:
                buffers[0] = buffers[0][sent:]
                continue
            self._queue.popleft()
            if on_sent is not None:
                on_sent()

    def _ready(self, events: int) -> None:
        if events & READ and self.is_open:
            self._read()
        if events & WRITE and self.is_open:
            self.flush()

    def _read(self) -> None:
        try:
            self._read_frames()
        except Throttled as throttled:
            self._throttle.begin(READ, throttled)
            self._listen(self._wanted)
        except BlockingIOError:
            return  # all that was there has been read
        except OSError as error:
            self._end(f"receiving failed: {error.strerror or error}")
        except ProtocolError as error:
            self._end(f"{BROKE_PROTOCOL}: {error}")
        else:
            # The pipe may hold more, even bytes that the selector cannot see.
            self._io.post(lambda: self._ready(READ))

    def _read_frames(self) -> None:
        """Reads until the pipe is empty (BlockingIOError), it ends, or the budget is used up."""
        budget = _TURN_BYTES
        while budget > 0 and self.is_open:
            count = self._pipe.recv_into(self._decoder.buffer())
            if count == 0:
                self._end("the connection was closed")
                return
            self.bytes_received += count
            budget -= count
            frame = self._decoder.filled(count)
            if frame is not None:
                self._on_frame(frame)

    def finish(self) -> None:
        """Ends the sending direction once the queue is empty; the other end then ends its own."""
        if not self._is_finishing:
            self._is_finishing = True
            self.flush()

    def close(self) -> None:
        """Closes at once, without `on_closed`."""
        if self.is_open:
            self.is_open = False
            self._listen(0)
            self._pipe.close()
            self._queue.clear()

    def _end(self, reason: str) -> None:
        if self.is_open:
            self.close()
            self._on_closed(reason)

    def _resume(self, event: int) -> None:
        if self.is_open:
            self._listen(self._wanted)
            self._ready(event)

    def _listen(self, events: int) -> None:
        self._wanted = events
        events &= ~self._throttle.events
        if events != self._events:
            self._events = events
            self._io.register(self._fd, events, self._ready)
