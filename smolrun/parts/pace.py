"""How fast a rank may compute: as fast as it can, or as a slower machine would.

    computing     [ 10 ms of the processor ]
    at share 1/4  [ 10 ms of the processor ][ 30 ms of rest ]

The rest follows from the processor time of the thread that computes, not from the clock on the
wall: whoever shares its core with others is not made slower twice. So with torch on one thread, and
shares that add up to no more than there are cores, several ranks on one machine behave like as many
slower machines. Where they could not, `late` tells by how much.

Knows nothing of what is computed."""

from __future__ import annotations

import time


class Pace:
    """As fast as this machine is. `begin` before computing, `end` after it."""

    wanted_s = 0.0  # how long all computing should have taken
    late_s = 0.0  # how much longer it took, because something else had the core

    def begin(self) -> None:
        """The thread that computes is about to."""

    def end(self, took_s: float) -> float:
        """It has computed for `took_s`, waits for others not counted; returns the rest it took."""
        return 0.0

    @property
    def late(self) -> float:
        """Share of the time by which this rank was slower than it should have been."""
        return self.late_s / self.wanted_s if self.wanted_s else 0.0


FULL_SPEED = Pace()


class SharePace(Pace):
    """As fast as a machine with `share` of this one's speed."""

    def __init__(self, share: float) -> None:
        self._share = share
        self._used_s = 0.0

    def begin(self) -> None:
        """See Pace."""
        self._used_s = time.thread_time()

    def end(self, took_s: float) -> float:
        """See Pace; sleeps."""
        wanted_s = (time.thread_time() - self._used_s) / self._share
        return self.rest(wanted_s, took_s)

    def rest(self, wanted_s: float, took_s: float) -> float:
        """Sleeps until `wanted_s` have passed since computing began, `took_s` ago."""
        self.wanted_s += wanted_s
        rest_s = wanted_s - took_s
        if rest_s <= 0:
            self.late_s -= rest_s
            return 0.0
        began = time.perf_counter()
        time.sleep(rest_s)
        return time.perf_counter() - began
