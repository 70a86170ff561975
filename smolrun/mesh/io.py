"""The I/O thread: one thread per process that drives every socket and every timer of the mesh.

Whatever runs here must not block. Other threads hand it work with `post`. Knows nothing of frames
or ranks."""

from __future__ import annotations

import heapq
import itertools
import logging
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable

_log = logging.getLogger(__name__)

READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE


class IoThread:
    """Runs callbacks for readable and writable sockets, timers and posted functions, all in one
    named thread.

    `longest_gap_s` is the longest time in which this thread did not run, because of a callback or
    of code that held the GIL: peers that seem silent during such a gap are not."""

    def __init__(self, name: str, on_error: Callable[[BaseException], None]) -> None:
        self.longest_gap_s = 0.0
        self._on_error = on_error
        self._selector = selectors.DefaultSelector()
        self._posted: deque[Callable[[], None]] = deque()
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()  # equal deadlines keep their order
        self._wake_in, self._wake_out = socket.socketpair()
        self._wake_in.setblocking(False)
        self._wake_out.setblocking(False)
        self._selector.register(self._wake_in, READ, None)
        self._is_stopping = False
        self._has_ended = False
        self.crash: BaseException | None = None  # why the thread ended, if not by `stop`
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._ident = 0

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def post(self, function: Callable[[], None]) -> None:
        """Runs `function` on this thread soon; callable from any thread, never blocks."""
        self._posted.append(function)
        if self._has_ended:
            self._run_leftovers()
        elif threading.get_ident() != self._ident:
            try:
                self._wake_out.send(b"x")
            except OSError:
                pass  # full: the thread will wake anyway; closed: it has ended

    def call_later(self, delay_s: float, function: Callable[[], None]) -> None:
        """Runs `function` once after `delay_s`; only on this thread."""
        heapq.heappush(self._timers, (time.monotonic() + delay_s, next(self._order), function))

    def register(
        self, sock: socket.socket | int, events: int, callback: Callable[[int], None]
    ) -> None:
        """Calls `callback(ready)` whenever one of `events` (READ, WRITE) holds; 0 unregisters; only
        on this thread."""
        if self._has_ended:
            return
        known = self._selector.get_map()
        if not events:
            if sock in known:
                self._selector.unregister(sock)
        elif sock in known:
            self._selector.modify(sock, events, callback)
        else:
            self._selector.register(sock, events, callback)

    def stop(self, timeout_s: float = 5.0) -> None:
        """Ends the thread after the callbacks that are due; safe to call twice."""
        self._is_stopping = True
        self.post(lambda: None)
        if self._thread.ident not in (None, threading.get_ident()):
            self._thread.join(timeout_s)

    def _run(self) -> None:
        self._ident = threading.get_ident()
        try:
            while not self._is_stopping:
                self._turn()
        except BaseException as error:
            _log.exception("the I/O thread failed")
            self.crash = error
            self._on_error(error)
        finally:
            self._has_ended = True
            self._run_leftovers()
            self._selector.close()
            self._wake_in.close()
            self._wake_out.close()

    def _run_leftovers(self) -> None:
        """Runs what was posted too late, so that a caller who waits for it sees the end."""
        while self._posted:
            try:
                self._posted.popleft()()
            except IndexError:
                return  # another thread was faster

    def _turn(self) -> None:
        """One round of the event loop: sockets, posted functions, timers."""
        if self._posted:
            timeout: float | None = 0.0
        elif self._timers:
            timeout = max(0.0, self._timers[0][0] - time.monotonic())
        else:
            timeout = None
        ready = self._selector.select(timeout)
        for key, events in ready:
            if key.data is None:
                self._wake_in.recv(4096)
            else:
                key.data(events)
        for _ in range(len(self._posted)):  # what these post runs in the next round
            self._posted.popleft()()
        while self._timers and self._timers[0][0] <= time.monotonic():
            due, _, function = heapq.heappop(self._timers)
            # An overdue timer shows how long this thread did not run.
            self.longest_gap_s = max(self.longest_gap_s, time.monotonic() - due)
            function()
