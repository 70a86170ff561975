"""Replicas that may differ: compared, and made equal again.

Machines of different kinds round differently, so the same update of the same numbers may end in
other last bits, and training makes small differences larger. `ReplicaSync` copies rank 0's replica
to all ranks every so many updates; optimizer states stay each rank's own. `ReplicaCheck` ends a run
whose replicas differ where they must not.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from smolrun.algorithms.base import Algorithm, StepResult
from smolrun.errors import TrainingError
from smolrun.events import Drift, Event, ReplicaHash
from smolrun.parts.replicas import first_difference, gather_hashes, parameter_hash, sync_replicas
from smolrun.training.trainer import Callback, Periodic

_AUTO_EVERY = 100  # updates; one broadcast of the model is then 1 % of what classicdp sends anyway


class ReplicaSync(Periodic):
    """Makes all replicas equal to rank 0's and emits `Drift`, every `every` updates. "auto": every
    100 where the algorithm's replicas may differ, else never."""

    def __init__(
        self, algorithm: Algorithm, every: int | Literal["auto"], emit: Callable[[Event], None]
    ) -> None:
        if every == "auto":
            every = _AUTO_EVERY if algorithm.replicas_may_differ else 0
        super().__init__(every)
        self._algorithm = algorithm
        self._emit = emit

    def run(self, step: int, due: int) -> None:
        """Collective."""
        collectives = self._algorithm.replica_group
        differences = sync_replicas(collectives, list(self._algorithm.replica_tensors().values()))
        apart = {
            rank: difference
            for rank, difference in zip(collectives.ranks, differences, strict=False)
            if difference != 0
        }
        # NaN counts as the largest difference.
        most = max(apart.values(), default=0.0, key=lambda found: (math.isnan(found), found))
        self._emit(Drift(step, most, list(apart)))


@dataclass(frozen=True)
class ReplicaCheck(Callback):
    """Compares hashes of all replicas after every update."""

    algorithm: Algorithm
    emit: Callable[[Event], None]

    def after_update(self, result: StepResult) -> None:
        """TrainingError if any tensor that must be equal on all replicas is not; collective."""
        group, tensors = self.algorithm.replica_group, self.algorithm.replica_tensors()
        if not tensors:
            return
        hashes = gather_hashes(self.algorithm.collectives, parameter_hash(tensors.values()))
        self.emit(ReplicaHash(result.step, hashes))
        if len({hashes[rank] for rank in group.ranks}) > 1:
            name = first_difference(group, tensors)
            raise TrainingError(
                f"replicas differ after step {result.step} in {name}: {', '.join(hashes)}"
            )
