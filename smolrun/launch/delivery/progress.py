"""How far several transfers are, added up: hosts are served at once, people read one line."""

from __future__ import annotations

import threading
from collections.abc import Callable

# progress(what is being done, how much is done, how much there is), in bytes.
Progress = Callable[[str, int, int], None]


def silent(what: str, done: int, total: int) -> None:
    """Nobody wants to know."""


class Told:
    """Adds up for `progress`; any thread may call, and only one at a time reaches `progress`."""

    def __init__(self, what: str, progress: Progress = silent) -> None:
        self._what = what
        self._progress = progress
        self._lock = threading.Lock()
        self._done = self._total = 0

    def add(self, num_bytes: int) -> None:
        """So much more is to be copied."""
        with self._lock:
            self._total += num_bytes

    def on_bytes(self, num_bytes: int) -> None:
        """So much more was copied."""
        with self._lock:
            self._done += num_bytes
            self._progress(self._what, self._done, self._total)
