"""The time of a step on one rank: seconds computed, seconds waited for other ranks, spans of the
run's timeline, and the emulation of a slower machine.

    computing     [ 10 ms of processor time ]
    at 0.25x      [ 10 ms of processor time ][ 30 ms asleep ]

The emulation follows the processor time of the thread that computes, not the wall clock, so ranks
that share a core are not slowed down twice. With torch on one thread, and speeds that add up to
less than there are cores, several ranks on one machine behave like as many slower machines; where
something else had the core, `Pace.late` is by how much they did not.

One thread uses a clock: the one that computes. Knows nothing of what is computed."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from smolrun.mesh.mesh import Work

# (what, lane, begin, end), in seconds of time.perf_counter; lanes: compute, wait, network
OnSpan = Callable[[str, str, float, float], None]


class Pace:
    """As fast as this machine is. `waited_s` is the total time waited for other ranks so far, which
    is not computing."""

    wanted_s = 0.0  # how long all computing should have taken
    late_s = 0.0  # how much longer it took, because something else had the core

    def begin(self, waited_s: float) -> None:
        """Computing begins, in this thread."""

    def rest(self, waited_s: float) -> None:
        """Something is about to be sent: not before a slower machine would have computed it."""

    def end(self, waited_s: float) -> None:
        """Computing has ended."""

    @property
    def late(self) -> float:
        """Share of the time by which this rank was slower than it should have been."""
        return self.late_s / self.wanted_s if self.wanted_s else 0.0


FULL_SPEED = Pace()


class EmulatedPace(Pace):
    """As fast as a machine with `share` of this one's speed: sleeps in `rest` and `end`. With a
    chance of `straggler_chance`, what is computed between `begin` and `end` takes
    `straggler_factor` times as long; `seed` decides when."""

    def __init__(
        self,
        share: float,
        *,
        straggler_chance: float = 0.0,
        straggler_factor: float = 1.0,
        seed: str = "",
    ) -> None:
        self._shares = (share, share / straggler_factor)
        self._straggler_chance = straggler_chance
        self._random = random.Random(seed)  # noqa: S311  (emulation, no secret)
        self._share = share
        self._began_s = self._used_s = self._waited_s = 0.0

    def wanted(self) -> float:
        """How long what was computed since `begin` should have taken."""
        return (time.thread_time() - self._used_s) / self._share

    def begin(self, waited_s: float) -> None:
        self._began_s, self._used_s = time.perf_counter(), time.thread_time()
        self._waited_s = waited_s
        self._share = self._shares[self._random.random() < self._straggler_chance]

    def rest(self, waited_s: float) -> None:
        time.sleep(max(0.0, self.wanted() - self.took(waited_s)))

    def end(self, waited_s: float) -> None:
        wanted_s = self.wanted()
        self.wanted_s += wanted_s
        self.late_s += max(0.0, self.took(waited_s) - wanted_s)
        time.sleep(max(0.0, wanted_s - self.took(waited_s)))

    def took(self, waited_s: float) -> float:
        """How long computing has taken since `begin`, sleep included."""
        return time.perf_counter() - self._began_s - (waited_s - self._waited_s)


class StepClock:
    """Counts seconds since the last `take`. `on_span`, where it is set, is called with every span;
    without it spans cost nothing."""

    def __init__(self, pace: Pace = FULL_SPEED) -> None:
        self.compute_s = 0.0
        self.wait_s = 0.0
        self.on_span: OnSpan | None = None
        self._pace = pace

    @contextmanager
    def compute(self) -> Iterator[None]:
        """Counts the time inside as computing, waits excepted; an emulated machine takes longer."""
        began_s, waited_s = time.perf_counter(), self.wait_s
        self._pace.begin(waited_s)
        yield
        self._pace.end(self.wait_s)
        self.compute_s += time.perf_counter() - began_s - (self.wait_s - waited_s)

    def before_send(self) -> None:
        """An emulated machine sleeps until it would have computed what is sent next."""
        self._pace.rest(self.wait_s)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time inside as waiting for other ranks."""
        began_s = time.perf_counter()
        try:
            yield
        finally:
            self.wait_s += time.perf_counter() - began_s

    def wait(self, work: Work) -> None:
        """Blocks until `work` is done; raises its error."""
        began_s, waited_s = time.perf_counter(), self.wait_s
        with self.waiting():
            work.wait()
        if self.on_span:
            what = work.label.split(" of stream")[0]
            self.on_span(what, "wait", began_s, began_s + self.wait_s - waited_s)
            self.on_span(what, "network", work.posted_s, work.done_s)

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """A named span in the lane "compute" of the timeline; counts nothing."""
        began_s = time.perf_counter() if self.on_span else 0.0
        yield
        if self.on_span and began_s:
            self.on_span(name, "compute", began_s, time.perf_counter())

    def take(self) -> tuple[float, float]:
        """Seconds computed and seconds waited; both count from 0 again."""
        taken = self.compute_s, self.wait_s
        self.compute_s = self.wait_s = 0.0
        return taken
