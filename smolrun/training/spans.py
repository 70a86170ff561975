"""What one rank did during a few steps, second by second: for the run's timeline.json.

    compute   [forward_backward ][synchronize]               [update]
    wait                                      [all_reduce 17]
    network         [all_reduce 16   ][all_reduce 17         ]

For these steps the algorithm's clock (parts/step_clock.py) reports spans. All ranks begin at a
barrier, and the moment when it ends is the common zero of their clocks, so spans of different
machines stand side by side, as exactly as a barrier takes.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from smolrun.algorithms.base import Algorithm
from smolrun.events import Event, Span, Timeline

FIRST_STEP = 5  # the steps before it warm up
_MOST_SPANS = 100_000  # they travel in one line of 16 MiB at most, and one takes about 80 bytes
_SHORTEST_S = 1e-5  # a wait for what is done already is not worth a rectangle


class SpanRecorder:
    """Records `steps` steps of `algorithm` and emits one `Timeline`. `before` is called before
    every step, on all ranks alike."""

    def __init__(self, algorithm: Algorithm, *, steps: int, emit: Callable[[Event], None]) -> None:
        self._algorithm = algorithm
        self._left = steps
        self._emit = emit
        self._is_on = False
        self._first = -1
        self._step = -1
        self._zero_s = 0.0
        self._spans: list[Span] = []
        self._begun = 0

    def before(self, step: int, steps: int) -> None:
        """Tells that `step` of `steps` begins; collective at the first step that is recorded."""
        self._step = step
        self._begun += 1
        if self._is_on:
            self._left -= 1
            if self._left == 0 or len(self._spans) >= _MOST_SPANS:
                self.finish()
        # A short run shows its last steps; a resumed one counts from where it goes on.
        elif self._left and (self._begun > FIRST_STEP or step + self._left >= steps):
            self._begin(step)

    def finish(self) -> None:
        """Stops recording and hands over what there is; harmless when there is nothing."""
        if not self._is_on:
            return
        self._is_on, self._left = False, 0
        self._algorithm.clock.on_span = None
        rank = self._algorithm.context.mesh.rank
        self._emit(Timeline(self._first, rank, self._spans))

    def _begin(self, step: int) -> None:
        self._is_on, self._first = True, step
        self._algorithm.clock.on_span = self._add
        self._algorithm.collectives.barrier()
        self._zero_s = time.perf_counter()

    def _add(self, name: str, lane: str, began_s: float, ended_s: float) -> None:
        began_s = max(began_s, self._zero_s)  # a late gradient may have left before the zero
        if ended_s - began_s >= _SHORTEST_S:
            start_s, duration_s = (round(s, 7) for s in (began_s - self._zero_s, ended_s - began_s))
            self._spans.append((name, lane, self._step, start_s, duration_s))
