"""Bars, sparklines and curves, in characters."""

from __future__ import annotations

import math

import pytest

from smolrun.ui.drawing import ASCII, UNICODE, Glyphs, curve, progress, shares_bar, sparkline


def test_a_sparkline_has_the_last_values() -> None:
    assert sparkline([9, 0, 1, 2, 3, 4, 5, 6, 7], 8, UNICODE) == "▁▂▃▄▅▆▇█"
    assert sparkline([1, 1, math.nan, 1], 8, UNICODE) == "▁▁▁"
    assert sparkline([], 8, UNICODE) == sparkline([1.0], 0, ASCII) == ""
    assert sparkline([0, 1], 8, ASCII) == "_@"


@pytest.mark.parametrize("share", [-1, 0, 0.5, 1, 7])
def test_progress_has_its_width(share: float) -> None:
    bar = progress(share, 10, ASCII).plain
    assert len(bar) == 10 and bar.count("#") == 10 * min(1, max(0, share))


def test_shares_fill_the_bar() -> None:
    assert shares_bar((0.5, 0.25, 0.0, 0.25, 0.0), 8, UNICODE).plain == "████▓▓░░"
    assert shares_bar((0.5, 0.25, 0.0, 0.25, 0.0), 8, ASCII).plain == "####==--"
    assert shares_bar((), 4, ASCII).plain == "    "


def test_a_falling_curve() -> None:
    drawn = curve([(0, 4), (1, 3), (2, 2), (3, 1)], 4, 4, ASCII)
    assert [line.find(next(c for c in line if c != " ")) for line in drawn] == [0, 1, 2, 3]
    braille = curve([(0, 1), (100, 0)], 10, 3, UNICODE)
    assert [len(line) for line in braille] == [10, 10, 10]
    assert braille[0][0] != " " and braille[2][9] != " " and braille[2][0] == " "


@pytest.mark.parametrize("glyphs", [UNICODE, ASCII])
@pytest.mark.parametrize(
    "points",
    [
        [],
        [(0, math.nan)],
        [(5, 1.0)],
        [(0, 2.0), (1, 2.0)],
        [(3, 1.0), (1, 2.0), (2, 0.5)],
        [(0, -1e300), (2.0**53, 1e300), (7, 0.0)],
    ],
)
def test_any_points_fill_just_the_place(points: list[tuple[float, float]], glyphs: Glyphs) -> None:
    assert [len(line) for line in curve(points, 7, 3, glyphs)] == [7, 7, 7]
    assert curve(points, 0, 3, glyphs) == ["", "", ""] and curve(points, 5, 0, glyphs) == []
