"""The samples of one rank where the data is a stream: asked for steps ahead, given step after step.

Who reads the stream, and how its rows come here, is not known here: see `Rows`.
"""

from __future__ import annotations

from typing import Protocol

from smolrun.algorithms.contract import BatchPart
from smolrun.data.base import Batch
from smolrun.data.stream_batch import token_batch
from smolrun.training.feed import Planned


class Rows(Protocol):
    """Ranges of the stream's rows, given in the order in which they were asked for."""

    def request(self, first: int, stop: int, next_first: int | None) -> None:
        """Ask for rows first .. stop - 1; the next request begins at next_first (None: never)."""

    def take(self, first: int, stop: int, timeout_s: float) -> bytes:
        """The rows of the oldest request not taken yet; DataError if they do not come in time."""


def steps_ahead(prefetch_steps: int) -> int:
    """How many steps beyond the next one can have no other plan any more: their rows have been
    asked for, and it was said where those of the step after them begin."""
    return prefetch_steps + 1


class StreamFeed:
    """This rank's micro-batches of every global batch up to step `steps`: sample i is row i."""

    def __init__(
        self,
        rows: Rows,
        plan: Planned,
        *,
        sequence_length: int,
        steps: int,
        prefetch_steps: int,
        timeout_s: float,
    ) -> None:
        """Asks for rows `prefetch_steps` steps ahead of the step that needs them."""
        self._rows = rows
        self._plan = plan
        self._sequence_length = sequence_length
        self._steps = steps
        self._prefetch_steps = prefetch_steps
        self._timeout_s = timeout_s
        self._next_step: int | None = None
        self._next_request = 0

    def step(self, step: int, part: BatchPart | None = None) -> list[Batch]:
        """The micro-batches of one step, some perhaps empty; waits for them. Parts that go to
        whoever asks first cannot be asked for ahead, so there are none here.

        The first step may be any, the others follow in order. Raises DataError when the rows do
        not come in time.
        """
        if part is not None:
            raise ValueError("a stream has no parts")
        if self._next_step is None:
            self._next_request = step
        elif step != self._next_step:
            raise ValueError(f"step {step} of a stream, where step {self._next_step} comes next")
        self._next_step = step + 1
        self._ask_ahead(step + 1 + self._prefetch_steps)
        wanted = self._range(step)
        batch = token_batch(
            self._rows.take(wanted.start, wanted.stop, self._timeout_s), self._sequence_length
        )
        return [
            Batch(batch.inputs[begin:end], batch.targets[begin:end], wanted.start + begin)
            for begin, end in (
                (part.start - wanted.start, part.stop - wanted.start)
                for part in self._plan.at(step).positions(step)
            )
        ]

    def _ask_ahead(self, stop_step: int) -> None:
        while self._next_request < min(stop_step, self._steps):
            wanted = self._range(self._next_request)
            self._next_request += 1
            is_last = self._next_request == self._steps
            next_first = None if is_last else self._range(self._next_request).start
            self._rows.request(wanted.start, wanted.stop, next_first)

    def _range(self, step: int) -> range:
        """This rank's rows of a step: its micro-batches lie side by side."""
        positions = self._plan.at(step).positions(step)
        return range(positions[0].start, positions[-1].stop)
