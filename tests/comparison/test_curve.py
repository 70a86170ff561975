from __future__ import annotations

import math

import pytest

from smolrun.comparison.curve import MOST_POINTS, Curve, Point, band, reached_at


def curve(losses: list[float], step_s: float = 1.0) -> Curve:
    made = Curve()
    for step, loss in enumerate(losses):
        made.add(Point(step, step_s * (step + 1), 10 * (step + 1), 100 * (step + 1), loss))
    made.finish()
    return made


def test_a_mean_is_over_whole_windows_and_stands_at_their_ends():
    points = curve([4.0, 2.0, 6.0, 0.0]).smoothed(2)
    assert [(point.time_s, point.loss) for point in points] == [(2, 3), (3, 4), (4, 3)]
    assert reached_at(points, 3.0) == points[0]
    assert reached_at(points, 2.9) is None


def test_losses_that_are_no_numbers_do_not_count():
    assert [p.loss for p in curve([1.0, math.nan, 3.0]).smoothed(2)] == [1.0, 3.0]
    assert curve([math.nan, math.nan]).smoothed(1) == []


def test_a_long_run_keeps_few_points_and_its_sums():
    steps = 10 * MOST_POINTS + 3
    made = curve([float(step) for step in range(steps)])
    assert MOST_POINTS / 2 <= len(made.points) <= MOST_POINTS + 1
    assert made.points[-1].time_s == steps and made.points[-1].tokens == 10 * steps
    assert made.steps_per_point == 16
    assert made.points[0].loss == pytest.approx(7.5)  # the mean of 0 to 15
    assert made.points[0].time_s == 16


def test_the_scatter_of_a_mean_is_that_of_single_losses_by_the_root():
    noisy = curve([5 - 0.01 * step + (0.2 if step % 2 else -0.2) for step in range(400)])
    assert noisy.scatter(1) == pytest.approx(0.4 / math.sqrt(2), rel=0.01)
    assert noisy.scatter(4) == pytest.approx(noisy.scatter(1) / 2)
    assert curve([5 - 0.01 * step for step in range(400)]).scatter(1) < 1e-9
    assert curve([1.0]).scatter(1) == 0.0


def test_a_band_is_where_all_repeats_have_values():
    slow, fast = curve([4, 3, 2, 1], 2.0), curve([5, 4, 3, 2], 1.0)
    found = band([slow.points, fast.points], "time_s")
    assert (found.x[0], found.x[-1]) == (2.0, 4.0)
    assert (found.low[0], found.mean[0], found.high[0]) == (4.0, 4.0, 4.0)
    assert (found.low[-1], found.mean[-1], found.high[-1]) == (2.0, 2.5, 3.0)
    assert band([[], slow.points], "tokens").x[0] == 10
    assert band([slow.points[:1], fast.points[3:]], "time_s").x == []
    assert band([], "time_s").x == []
