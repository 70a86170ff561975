"""Replicas that drift apart: seen, told and ended, every so many updates.

Machines of different kinds round differently, so the same update of the same numbers may end in
other last bits, and training makes small differences larger. Rank 0's replica is the one that
counts; what optimizers remember stays each rank's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

from smolrun.algorithms.base import Algorithm
from smolrun.events import Drift, Event
from smolrun.parts.replicas import make_equal

_EVERY = 100  # updates; one broadcast of the model is then 1 % of what classicdp sends anyway


class Resync:
    """Makes all replicas rank 0's; due after `every` updates, 0: never."""

    def __init__(
        self, algorithm: Algorithm, every: int | Literal["auto"], emit: Callable[[Event], None]
    ) -> None:
        self._algorithm = algorithm
        self._emit = emit
        if every == "auto":
            every = _EVERY if algorithm.replicas_may_differ else 0
        self.every = every

    def run(self, step: int) -> None:
        """Right after the update of `step`; collective."""
        collectives = self._algorithm.collectives
        differences = make_equal(collectives, list(self._algorithm.replica_tensors().values()))
        apart = {
            rank: difference
            for rank, difference in zip(collectives.ranks, differences, strict=False)
            if difference != 0
        }
        # What is not a number is the farthest of all.
        most = max(apart.values(), default=0.0, key=lambda found: (math.isnan(found), found))
        self._emit(Drift(step, most, list(apart)))
