"""Wakes a thread that waits for whichever of several works is done next."""

from __future__ import annotations

import threading


class Bell:
    """Rung on the I/O thread. Whoever waits clears it, looks, and then waits: nothing is missed."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def ring(self) -> None:
        """Something is done."""
        self._event.set()

    def clear(self) -> None:
        """From now on only what comes next counts."""
        self._event.clear()

    def wait(self, timeout_s: float) -> None:
        """Until it has rung, or so long."""
        self._event.wait(timeout_s)
