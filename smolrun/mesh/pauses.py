"""What a connection does not do for a while, because its pipe is slower than the socket below it.

Runs on the I/O thread only. Knows nothing of pipes or frames."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable

from smolrun.mesh.io import READ, WRITE, IoThread


class NotYet(BlockingIOError):
    """A pipe that is slower than its socket would wait `after_s`, whatever the selector says. If it
    `is_full`, it takes nothing from the socket until then."""

    def __init__(self, after_s: float, *, is_full: bool) -> None:
        super().__init__()
        self.after_s = after_s
        self.is_full = is_full


class Pauses:
    """Reading and writing, each paused until its time; then `resume(event)` is called."""

    def __init__(self, io: IoThread, resume: Callable[[int], None]) -> None:
        self.events = 0  # READ, WRITE: the selector is not to be asked for these
        self._io = io
        self._resume = resume
        self._due_s = {READ: math.inf, WRITE: math.inf}

    def begin(self, event: int, pause: NotYet) -> None:
        """Pauses READ or WRITE, if the pipe is full, and tries again later in any case."""
        if pause.is_full:
            self.events |= event
        due_s = time.monotonic() + pause.after_s
        # The timer that is due first is the one that counts, so there is never more than that one.
        if due_s < self._due_s[event]:
            self._due_s[event] = due_s
            self._io.call_later(pause.after_s, functools.partial(self._end, event, due_s))

    def _end(self, event: int, due_s: float) -> None:
        if due_s == self._due_s[event]:
            self._due_s[event] = math.inf
            self.events &= ~event
            self._resume(event)
