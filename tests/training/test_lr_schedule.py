"""The learning rate rises, falls, and ends where it should, for every kind and length."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smolrun.training.lr_schedule import lr_schedule


@given(
    st.sampled_from(["cosine", "linear", "constant"]),
    st.integers(1, 500),
    st.integers(0, 500),
    st.floats(0.0, 1.0),
)
def test_it_stays_within_bounds_and_peaks_after_the_warm_up(
    kind: str, steps: int, warmup: int, ratio: float
) -> None:
    rate = lr_schedule(
        kind, peak=2.0, steps=steps, warmup_steps=min(warmup, steps), min_ratio=ratio
    )
    rates = [rate(update) for update in range(steps)]
    assert all(0 < r <= 2.0 + 1e-9 for r in rates) or ratio == 0
    rising, falling = rates[: min(warmup, steps)], rates[min(warmup, steps) :]
    assert rising == sorted(rising) and falling == sorted(falling, reverse=True)


@pytest.mark.parametrize(
    ("kind", "middle", "last"),
    [("cosine", 0.55, 0.1), ("linear", 0.55, 0.1), ("constant", 1.0, 1.0)],
)
def test_it_ends_at_the_smallest_rate(kind: str, middle: float, last: float) -> None:
    rate = lr_schedule(kind, peak=1.0, steps=111, warmup_steps=10, min_ratio=0.1)
    assert rate(0) == pytest.approx(0.1) and rate(9) == rate(10) == 1.0
    assert rate(60) == pytest.approx(middle) and rate(110) == pytest.approx(last)
