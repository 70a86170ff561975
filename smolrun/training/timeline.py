"""Records what one rank did during a few steps, for the run's timeline.json.

    compute   [forward_backward ][synchronize]               [update]
    wait                                      [all_reduce 17]
    network         [all_reduce 16   ][all_reduce 17         ]

For these steps the algorithm's clock (parts/step_clock.py) reports spans. All ranks begin at a
barrier, whose end is the common zero of their clocks: spans of different machines are aligned to
within the duration of a barrier.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from smolrun.algorithms.base import Algorithm
from smolrun.events import Event, Span, Timeline
from smolrun.training.trainer import Callback, TrainOutcome

FIRST_STEP = 5  # the steps before it warm up
_MOST_SPANS = 100_000  # they are sent in one line of 16 MiB at most, and one takes about 80 bytes
_SHORTEST_S = 1e-5  # shorter spans, such as waits for finished work, are left out


class TimelineRecorder(Callback):
    """Records `steps` steps of `algorithm` and emits one `Timeline`. A run of `total_steps` that is
    too short for the warm-up shows its last ones."""

    def __init__(
        self, algorithm: Algorithm, steps: int, total_steps: int, emit: Callable[[Event], None]
    ) -> None:
        self._algorithm = algorithm
        self._left = steps
        self._total_steps = total_steps
        self._emit = emit
        self._is_on = False
        self._first = -1
        self._step = -1
        self._zero_s = 0.0
        self._spans: list[Span] = []
        self._begun = 0

    def before_step(self, step: int) -> None:
        """Collective at the first step that is recorded."""
        self._step = step
        self._begun += 1
        if self._is_on:
            self._left -= 1
            if self._left == 0 or len(self._spans) >= _MOST_SPANS:
                self._finish()
        # A resumed run warms up again, so its own steps are counted.
        elif self._left and (self._begun > FIRST_STEP or step + self._left >= self._total_steps):
            self._begin(step)

    def after_training(self, outcome: TrainOutcome) -> None:
        """Ends a recording that is still on."""
        if self._is_on:
            self._finish()

    def _finish(self) -> None:
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
        began_s = max(began_s, self._zero_s)  # a stale gradient may have been sent before the zero
        if ended_s - began_s >= _SHORTEST_S:
            start_s, duration_s = (round(s, 7) for s in (began_s - self._zero_s, ended_s - began_s))
            self._spans.append((name, lane, self._step, start_s, duration_s))
