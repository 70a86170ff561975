"""The learning rate of every update, as a pure function of its number."""

from __future__ import annotations

import math
from collections.abc import Callable


def lr_schedule(
    kind: str, *, peak: float, steps: int, warmup_steps: int, min_ratio: float
) -> Callable[[int], float]:
    """A linear warm-up to `peak`, then `kind` (cosine, linear or constant) down to `min_ratio *
    peak` at the last update."""
    falls: dict[str, Callable[[float], float]] = {
        "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
        "linear": lambda done: 1 - done,
        "constant": lambda done: 1.0,
    }
    fall = falls[kind]

    def learning_rate(update: int) -> float:
        if update < warmup_steps:
            return peak * (update + 1) / warmup_steps
        done = (update - warmup_steps) / max(1, steps - 1 - warmup_steps)
        return peak * (min_ratio + (1 - min_ratio) * fall(min(1.0, done)))

    return learning_rate
