"""How fast a rank may compute: as fast as it can, or as a slower machine would.

    computing     [ 10 ms of the processor ]
    at share 1/4  [ 10 ms of the processor ][ 30 ms of rest ]

The rest follows from the processor time of the thread that computes, not from the clock on the
wall: whoever shares its core with others is not made slower twice. So with torch on one thread, and
shares that add up to less than there are cores, several ranks on one machine behave like as many
slower machines. Where they could not, `late` tells by how much.

Knows nothing of what is computed."""

from __future__ import annotations

import time


class Pace:
    """As fast as this machine is. `waited_s` counts all waiting for others, from whenever on: it is
    no computing."""

    wanted_s = 0.0  # how long all computing should have taken
    late_s = 0.0  # how much longer it took, because something else had the core

    def begin(self, waited_s: float) -> None:
        """The thread that computes is about to."""

    def rest(self, waited_s: float) -> None:
        """Something is about to leave: not before a slower machine would have had it ready."""

    def end(self, waited_s: float) -> None:
        """It has computed, and rests for the last time."""

    @property
    def late(self) -> float:
        """Share of the time by which this rank was slower than it should have been."""
        return self.late_s / self.wanted_s if self.wanted_s else 0.0


FULL_SPEED = Pace()


class SharePace(Pace):
    """As fast as a machine with `share` of this one's speed."""

    def __init__(self, share: float) -> None:
        self._share = share
        self._began_s = self._used_s = self._waited_s = 0.0

    def wanted(self) -> float:
        """How long what was computed since `begin` should have taken."""
        return (time.thread_time() - self._used_s) / self._share

    def begin(self, waited_s: float) -> None:
        """See Pace."""
        self._began_s, self._used_s = time.perf_counter(), time.thread_time()
        self._waited_s = waited_s

    def rest(self, waited_s: float) -> None:
        """See Pace; sleeps."""
        time.sleep(max(0.0, self.wanted() - self.took(waited_s)))

    def end(self, waited_s: float) -> None:
        """See Pace; sleeps."""
        wanted_s = self.wanted()
        self.wanted_s += wanted_s
        self.late_s += max(0.0, self.took(waited_s) - wanted_s)
        time.sleep(max(0.0, wanted_s - self.took(waited_s)))

    def took(self, waited_s: float) -> float:
        """How long computing has taken since `begin`, rests included."""
        return time.perf_counter() - self._began_s - (waited_s - self._waited_s)
