"""Bars, sparklines and curves out of characters, for terminals with and without UTF-8.

Pure. Numbers that are not finite are left out.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from rich.text import Text

from smolrun.tracking import run_end

_BRAILLE = 0x2800
# The bit of a dot, by its column and row in a character of 2 x 4.
_HALVES = ((1, 2),)  # without braille: the upper and the lower half
_DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))


@dataclass(frozen=True)
class Glyphs:
    """The characters of a terminal. `dots` (columns, rows): points of a curve in one character."""

    levels: str
    shares: str
    full: str
    empty: str
    dots: tuple[int, int]
    has_blocks: bool

    def cell(self, bits: int) -> str:
        """The character with these dots."""
        return (chr(_BRAILLE + bits) if bits else " ") if self.has_blocks else " '.:"[bits]


UNICODE = Glyphs("▁▂▃▄▅▆▇█", "█▓▒░·", "━", "─", (2, 4), True)
ASCII = Glyphs("_.-=+*#@", "#=+-.", "#", "-", (1, 2), False)


def sparkline(values: Sequence[float], width: int, glyphs: Glyphs) -> str:
    """The last `width` values, the least as the lowest character, the greatest as the highest."""
    shown = [value for value in values if math.isfinite(value)]
    shown = shown[max(0, len(shown) - width) :]
    if not shown or width < 1:
        return ""
    low, high = min(shown), max(shown)
    top = len(glyphs.levels) - 1
    scale = top / (high - low) if high > low else 0.0
    return "".join(glyphs.levels[round((value - low) * scale)] for value in shown)


def progress(share: float, width: int, glyphs: Glyphs) -> Text:
    """A bar of `width` columns of which `share` is done."""
    done = round(min(1.0, max(0.0, share)) * width)
    return Text(glyphs.full * done, "green").append(glyphs.empty * (width - done), "bright_black")


def shares_bar(shares: Sequence[float], width: int, glyphs: Glyphs) -> Text:
    """Shares that add up to 1, as the end of a run shows them; blank where there are none."""
    if not shares or width < 1:
        return Text(" " * max(0, width))
    return run_end.bar([(share, "") for share in shares], width, glyphs.shares)


def curve(
    points: Sequence[tuple[float, float]], width: int, height: int, glyphs: Glyphs
) -> list[str]:
    """Points (x, y) as `height` lines of `width` columns."""
    wide, tall = glyphs.dots[0] * width, glyphs.dots[1] * height
    finite = sorted(point for point in points if all(map(math.isfinite, point)))
    if not finite or width < 1 or height < 1:
        return [" " * width] * height
    columns = _columns(finite, wide)
    low, high = min(columns.values()), max(columns.values())
    scale = (tall - 1) / (high - low) if high > low else 0.0
    bits = _DOTS if glyphs.has_blocks else _HALVES
    cells = [[0] * width for _ in range(height)]
    before = None
    for x, y in sorted(columns.items()):
        row = tall - 1 - round((y - low) * scale)
        # A line without gaps: down or up to the height of the column before.
        step = 0 if before is None or before == row else (1 if before > row else -1)
        column, x_in = divmod(x, glyphs.dots[0])
        for dot in range(row, before, step) if step and before is not None else (row,):
            line, y_in = divmod(dot, glyphs.dots[1])
            cells[line][column] |= bits[x_in][y_in]
        before = row
    return ["".join(map(glyphs.cell, line)) for line in cells]


def _columns(points: Sequence[tuple[float, float]], wide: int) -> dict[int, float]:
    """By column of dots: the mean y of its points; columns between two points are interpolated."""
    first, last = points[0][0], points[-1][0]
    scale = (wide - 1) / (last - first) if last > first else 0.0
    found: dict[int, list[float]] = {}
    for x, y in points:
        found.setdefault(round((x - first) * scale), []).append(y)
    means = {column: sum(ys) / len(ys) for column, ys in found.items()}
    columns = dict(means)
    for (left, before), (right, after) in itertools.pairwise(means.items()):
        slope = (after - before) / (right - left)
        columns |= {x: before + slope * (x - left) for x in range(left + 1, right)}
    return columns
