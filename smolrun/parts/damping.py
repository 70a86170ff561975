"""How much less a late gradient counts: factors by age, the number of updates since the weights
that it was computed with.

The factor belongs on the learning rate, not on the gradient: an optimizer such as Adam divides by
the gradient's own length, so that a shorter gradient would step as far as before.

Source: Zhang et al., "Staleness-aware Async-SGD for Distributed Deep Learning", 2016 (1/age)."""

from __future__ import annotations

from collections.abc import Callable

DAMPING: dict[str, Callable[[int], float]] = {
    "none": lambda age: 1.0,
    "inverse": lambda age: 1.0 / (1.0 + age),
    "inverse_sqrt": lambda age: (1.0 + age) ** -0.5,
}
