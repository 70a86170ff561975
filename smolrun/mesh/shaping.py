"""Emulated links: a host that emulates a slower network shapes what its own I/O thread sends and
receives.

    send   frames -> [ bucket of the host, out ] -> socket
    recv   frames <- [ delay ] <- [ bucket of the host, in ] <- socket

TokenBucket and DelayQueue decide, with time as an argument; ShapedPipe, a pipe around a pipe, moves
the bytes. All links of a host share its two buckets, as they share its cable; each link has its own
delay. Bytes beyond the limit are not lost: the pipe raises Throttled with the time to call again,
and TCP slows the other end down.

Source: the token bucket is that of Turner, "New Directions in Communications", 1986, and of Linux's
tbf, which tests/hosts compares it with."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable

from smolrun.mesh.link import Pipe, Throttled

# Share of payload in the bytes of a cable: each packet has TCP, IP and Ethernet headers.
_PAYLOAD = 1448 / 1514
# Fewer bytes are not worth a turn of the I/O thread.
_QUANTUM = 16 * 1024
# What may pass at once after a pause. A timer of the I/O thread is a millisecond or two late.
_BURST_S = 0.005
_READ_BYTES = 256 * 1024
# After so many bytes of one link the others get their turn.
_TURN_BYTES = 4 * 1024 * 1024


class TokenBucket:
    """`bytes_per_s`, and at most `burst` bytes at once after a pause."""

    def __init__(self, bytes_per_s: float, burst: int) -> None:
        self.bytes_per_s = bytes_per_s
        self.burst = burst
        self._tokens = float(burst)
        self._now = -math.inf

    def allowed(self, now: float) -> int:
        """How many bytes may pass now."""
        if now > self._now:
            self._tokens = min(
                float(self.burst), self._tokens + (now - self._now) * self.bytes_per_s
            )
            self._now = now
        return max(0, int(self._tokens))

    def take(self, count: int) -> None:
        """Records that `count` bytes have passed."""
        self._tokens -= count

    def wait_s(self, count: int) -> float:
        """Seconds from the last `allowed` until `count` bytes (at most a burst) may pass."""
        return max(0.0, (min(count, self.burst) - self._tokens) / self.bytes_per_s)


class DelayQueue:
    """Bytes that come out `delay_s` after they went in, in their order."""

    def __init__(self, delay_s: float) -> None:
        self._delay_s = delay_s
        self._parts: deque[tuple[float, memoryview]] = deque()

    def __bool__(self) -> bool:
        return bool(self._parts)

    def put(self, data: bytes, now: float) -> None:
        """Appends bytes."""
        self._parts.append((now + self._delay_s, memoryview(data)))

    def take_into(self, buffer: memoryview, now: float) -> int:
        """Fills a beginning of `buffer` with what is due; returns how many bytes."""
        count = 0
        while self._parts and self._parts[0][0] <= now and count < len(buffer):
            due, part = self._parts.popleft()
            taken = min(len(part), len(buffer) - count)
            buffer[count : count + taken] = part[:taken]
            count += taken
            if taken < len(part):
                self._parts.appendleft((due, part[taken:]))
        return count

    def wait_s(self, now: float) -> float:
        """Seconds until the first bytes are due; must not be empty."""
        return max(0.0, self._parts[0][0] - now)


class Shape:
    """The links of one host: `bandwidth_mbps` in each direction (None: not limited), and
    `latency_ms` of delay for incoming bytes."""

    def __init__(
        self,
        bandwidth_mbps: float | None,
        latency_ms: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._buckets = (_bucket(bandwidth_mbps), _bucket(bandwidth_mbps))
        self._latency_s = latency_ms / 1000
        self._clock = clock

    def wrap(self, pipe: Pipe, rank: int, channel: str) -> Pipe:
        """The shaped pipe; the `wrap` argument of `connect`."""
        return ShapedPipe(pipe, *self._buckets, self._latency_s, self._clock)


def _bucket(bandwidth_mbps: float | None) -> TokenBucket | None:
    if bandwidth_mbps is None:
        return None
    bytes_per_s = bandwidth_mbps * 1e6 / 8 * _PAYLOAD
    return TokenBucket(bytes_per_s, max(2 * _QUANTUM, int(_BURST_S * bytes_per_s)))


class ShapedPipe:
    """A pipe limited by the buckets in both directions, with delayed input."""

    def __init__(
        self,
        pipe: Pipe,
        out: TokenBucket | None,
        into: TokenBucket | None,
        delay_s: float,
        clock: Callable[[], float],
    ) -> None:
        self._pipe = pipe
        self._out = out
        self._into = into
        self._delayed = DelayQueue(delay_s) if delay_s else None
        self._scratch = memoryview(bytearray(_READ_BYTES if delay_s else 0))
        self._clock = clock
        self._end: OSError | None = None  # how the pipe ended, after what is still delayed
        self._has_ended = False

    def fileno(self) -> int:
        return self._pipe.fileno()

    def end(self) -> None:
        self._pipe.end()

    def close(self) -> None:
        self._pipe.close()

    def send(self, buffers: list[memoryview]) -> int:
        """Throttled where the bucket is empty."""
        if self._out is None:
            return self._pipe.send(buffers)
        allowed = _allowed(self._out, sum(len(buffer) for buffer in buffers), self._clock())
        sent = self._pipe.send(_beginning(buffers, allowed))
        self._out.take(sent)
        return sent

    def recv_into(self, buffer: memoryview) -> int:
        """Throttled where the bucket is empty, or what has come is not due."""
        if self._delayed is None:
            return self._receive(buffer)
        pause = self._fetch(self._delayed)
        count = self._delayed.take_into(buffer, self._clock())
        if count or (self._has_ended and not self._delayed):
            if not count and self._end is not None:
                raise self._end
            return count
        if self._delayed:
            wait_s = self._delayed.wait_s(self._clock())
            if isinstance(pause, Throttled):
                raise Throttled(min(wait_s, pause.after_s), is_full=True)
            raise Throttled(wait_s, is_full=self._has_ended)
        raise pause or BlockingIOError

    def _receive(self, buffer: memoryview) -> int:
        """Reads as much as the bucket allows."""
        if self._into is None:
            return self._pipe.recv_into(buffer)
        allowed = _allowed(self._into, len(buffer), self._clock())
        count = self._pipe.recv_into(buffer[:allowed])
        self._into.take(count)
        return count

    def _fetch(self, delayed: DelayQueue) -> BlockingIOError | None:
        """Moves all that has arrived into the delay queue; returns why there is no more."""
        budget = _TURN_BYTES
        while budget > 0 and not self._has_ended:
            try:
                count = self._receive(self._scratch)
            except BlockingIOError as pause:
                return pause
            except OSError as error:
                self._has_ended, self._end = True, error
                return None
            self._has_ended = count == 0
            budget -= count
            if count:
                delayed.put(bytes(self._scratch[:count]), self._clock())
        return None


def _allowed(bucket: TokenBucket, wanted: int, now: float) -> int:
    """How many of the `wanted` bytes may pass now; Throttled if too few to be worth it."""
    allowed = bucket.allowed(now)
    if allowed < min(wanted, _QUANTUM):
        raise Throttled(bucket.wait_s(min(wanted, _QUANTUM)), is_full=True)
    return allowed


def _beginning(buffers: list[memoryview], count: int) -> list[memoryview]:
    """The first `count` bytes of the buffers."""
    found = []
    for buffer in buffers:
        if count <= 0:
            break
        found.append(buffer[:count])
        count -= len(buffer)
    return found
