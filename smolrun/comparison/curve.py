"""A run's loss over its steps, in bounded memory; and the mean of several such curves.

Pure.
"""

from __future__ import annotations

import bisect
import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

Axis = Literal["time_s", "tokens", "bytes_sent"]
MOST_POINTS = 1024  # a curve keeps between this many and half as many; then neighbours are merged
_GRID = 200  # points of a mean curve; a plot is about 300 points wide


class Point(NamedTuple):
    """The end of one step, or of a few that were merged: sums from the beginning of training, and
    the mean loss of these steps (NaN: none of them had a finite one)."""

    step: int
    time_s: float
    tokens: float
    bytes_sent: float
    loss: float


@dataclass
class Curve:
    """Points in order of their steps."""

    points: list[Point] = field(default_factory=list)
    steps_per_point: int = 1
    _open: list[Point] = field(default_factory=list)

    def add(self, point: Point) -> None:
        """Append one step."""
        self._open.append(point)
        if len(self._open) == self.steps_per_point:
            self.finish()
            if len(self.points) > MOST_POINTS:
                pairs = zip(self.points[::2], self.points[1::2], strict=False)
                self.points = [_merged(pair) for pair in pairs]
                self.steps_per_point *= 2

    def finish(self) -> None:
        """Close the last point, of fewer steps than the others."""
        if self._open:
            self.points.append(_merged(self._open))
            self._open = []

    def smoothed(self, steps: int) -> list[Point]:
        """The same points, each with the mean loss of the last `steps` steps; those before the
        first full window, and those without any finite loss in it, are left out."""
        width = max(1, round(steps / self.steps_per_point))
        finite = [math.isfinite(point.loss) for point in self.points]
        losses = [p.loss if known else 0.0 for p, known in zip(self.points, finite, strict=True)]
        sums = [0.0, *itertools.accumulate(losses)]
        counts = [0, *itertools.accumulate(finite)]
        return [
            self.points[end - 1]._replace(loss=(sums[end] - sums[end - width]) / count)
            for end in range(width, len(self.points) + 1)
            if (count := counts[end] - counts[end - width])
        ]

    def scatter(self, steps: int) -> float:
        """Standard error of a mean loss over `steps` steps, by how far neighbouring points lie
        apart; 0 where there are too few."""
        losses = [point.loss for point in self.points if math.isfinite(point.loss)]
        changes = [after - before for before, after in itertools.pairwise(losses)]
        if len(changes) < 2:
            return 0.0
        # The difference of two independent losses scatters sqrt(2) times as much as one.
        of_one = statistics.pstdev(changes) / math.sqrt(2)
        return of_one / math.sqrt(max(1, round(steps / self.steps_per_point)))


def _merged(points: Sequence[Point]) -> Point:
    last = points[-1]
    loss = _mean([point.loss for point in points])
    return Point(last.step, last.time_s, last.tokens, last.bytes_sent, loss)


def _mean(losses: Sequence[float]) -> float:
    finite = [loss for loss in losses if math.isfinite(loss)]
    return sum(finite) / len(finite) if finite else math.nan


def reached_at(points: Sequence[Point], loss: float) -> Point | None:
    """The first point at or below a loss."""
    return next((point for point in points if point.loss <= loss), None)


@dataclass(frozen=True)
class Band:
    """A mean curve: x, and mean, least and greatest loss of the repeats there."""

    x: list[float]
    mean: list[float]
    low: list[float]
    high: list[float]


def band(curves: Sequence[Sequence[Point]], axis: Axis) -> Band:
    """The mean over repeats, where all of them have a value. Empty curves are left out."""
    lines = [([getattr(p, axis) for p in curve], [p.loss for p in curve]) for curve in curves]
    lines = [(x, y) for x, y in lines if x]
    if not lines:
        return Band([], [], [], [])
    first, last = max(x[0] for x, _ in lines), min(x[-1] for x, _ in lines)
    if last <= first:
        return Band([], [], [], [])
    grid = [first + (last - first) * index / (_GRID - 1) for index in range(_GRID)]
    rows = [[_at(x, y, place) for x, y in lines] for place in grid]
    return Band(
        grid, [sum(row) / len(row) for row in rows], [min(r) for r in rows], [max(r) for r in rows]
    )


def _at(x: Sequence[float], y: Sequence[float], place: float) -> float:
    """Linear between the points."""
    right = min(max(1, bisect.bisect_left(x, place)), len(x) - 1)
    if len(x) == 1:
        return y[0]
    left = right - 1
    width = x[right] - x[left]
    share = (place - x[left]) / width if width > 0 else 1.0
    return y[left] + (y[right] - y[left]) * min(1.0, max(0.0, share))
