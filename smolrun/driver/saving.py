"""Saves and restores one rank of a run: the state of its algorithm and of its trainer. Random
generators have no state to save: see `seed_everything` in smolrun/worker/train.py.

The rank writes tensors and tells the driver; the driver makes the checkpoint of it (committer.py).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from smolrun.algorithms.base import Algorithm
from smolrun.checkpoints.find import checkpoints_in
from smolrun.checkpoints.reader import CheckpointReader
from smolrun.checkpoints.writer import Saver, partition_keys
from smolrun.errors import CheckpointError
from smolrun.events import Event
from smolrun.launch.control import Saving
from smolrun.training.trainer import Periodic, Trainer, TrainOutcome


class RankCheckpoints(Periodic):
    """Saves every `saving.every` updates and at the end; restores before the first step."""

    _trainer: Trainer

    def __init__(
        self,
        saving: Saving,
        algorithm: Algorithm,
        emit: Callable[[Event], None],
        steps: int,
        data_sha256: str,
    ) -> None:
        super().__init__(saving.every)
        self._steps = steps
        self._saved_at = 0  # updates
        self._saving = saving
        self._algorithm = algorithm
        self._data_sha256 = data_sha256
        self._rank = algorithm.context.mesh.rank
        self._saver = Saver(Path(saving.folder), saving.token, self._rank, emit)

    def begin(self, trainer: Trainer) -> None:
        """Looks for room on the disk, and goes on from the checkpoint if there is one; on all ranks
        alike. CheckpointError if the run cannot begin."""
        self._trainer = trainer
        if self.every:
            self._check_space()
        self._restore()
        # What the driver does next to the run's folder must not come before all ranks are ready.
        self._algorithm.start_barrier()

    def finish(self) -> None:
        """Waits until the last save is written."""
        self._saver.finish()

    def _check_space(self) -> None:
        """CheckpointError if this host's disk has no room for what will be kept."""
        saving, folder = self._saving, Path(self._saving.folder)
        there = next(path for path in (folder, *folder.parents) if path.exists())
        free = shutil.disk_usage(there).free
        kept = [path for _, path in checkpoints_in(folder)][: saving.keep]
        held = sum(file.stat().st_size for path in kept for file in path.iterdir())
        # One more than are kept, as a new one is whole before an old one goes.
        needed = self._algorithm.checkpoint_bytes() * (saving.keep + saving.keep_best + 1) - held
        if needed > free:
            raise CheckpointError(
                f"checkpoints need {needed / 1e9:.1f} GB more in {folder}, the disk has "
                f"{free / 1e9:.1f} GB free; `smolrun task=clean` deletes old runs, or set "
                "checkpoint.keep=1, or checkpoint=none"
            )

    def run(self, step: int, due: int) -> None:
        """Saves under the number `due`, which is the same on all ranks."""
        if step + 1 < self._steps:  # the last one is saved after the final evaluation
            self._saved_at = step + 1
            self._save(due)

    def after_training(self, outcome: TrainOutcome) -> None:
        """Saves, unless it did after the last update."""
        if self.every and self._saved_at != outcome.steps:
            self._save(outcome.steps)

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continues the count of updates."""
        super().restore(state)
        self._saved_at = self._updates

    def _save(self, updates: int) -> None:
        """Starts to save the state after so many updates; on all ranks alike."""
        if not self._algorithm.has_checkpoint_state:
            return
        group = self._algorithm.collectives
        slices = partition_keys(self._algorithm.owned(), group.size, group.index)
        state = {
            "training": self._trainer.state(),
            "algorithm": self._algorithm.state(),
            "data": {"sha256": self._data_sha256},
        }
        self._saver.save(updates, slices, {"run": state} if self._rank == 0 else {})

    def _restore(self) -> None:
        """Goes on from the checkpoint, if there is one to go on from; on all ranks alike."""
        if self._saving.resume is None:
            return
        with CheckpointReader(Path(self._saving.resume)) as checkpoint:
            state = checkpoint.manifest.state
            try:
                self._algorithm.restore(checkpoint, state["algorithm"])
                self._trainer.restore(state["training"])
            except (KeyError, TypeError, ValueError) as error:
                raise CheckpointError(
                    f"the state in {checkpoint.folder} cannot be used: {error!r}"
                ) from None
