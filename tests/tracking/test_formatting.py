"""Numbers and times as people write them."""

from __future__ import annotations

import pytest

from smolrun.tracking.formatting import counted, duration


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (0.35, "0.35 s"),
        (5.74, "5.7 s"),
        (59.4, "59 s"),
        (60, "1 min"),
        (90, "1.5 min"),
        (3600, "1 h"),
        (36.25 * 3600, "36 h"),
        (6195.5 * 60, "4.3 d"),
        (86_400 * 40, "40 d"),
    ],
)
def test_a_time_is_in_its_largest_unit(seconds: float, text: str):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("number", "what", "text"),
    [(1, "rank", "1 rank"), (2, "rank", "2 ranks"), (16, "micro-batch", "16 micro-batches")],
)
def test_plurals(number: int, what: str, text: str):
    assert counted(number, what) == text
