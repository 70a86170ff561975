"""What one rank saves, and how it goes on from what was saved: the trainer and the algorithm put
their state together here. Random generators have none to save: see training/randomness.py.

The rank writes tensors and tells the driver; the driver makes the checkpoint of it (committer.py).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from smolrun.algorithms.base import Algorithm
from smolrun.checkpoints.find import checkpoints_in
from smolrun.checkpoints.reader import Checkpoint
from smolrun.checkpoints.saver import Saver
from smolrun.errors import CheckpointError
from smolrun.events import Event
from smolrun.launch.control import Saving
from smolrun.training.trainer import Trainer


class RankCheckpoints:
    """Saves and restores one rank of a run."""

    _trainer: Trainer

    def __init__(
        self,
        saving: Saving,
        algorithm: Algorithm,
        emit: Callable[[Event], None],
        *,
        data_sha256: str,
    ) -> None:
        self.saves = saving.every > 0
        self._saving = saving
        self._algorithm = algorithm
        self._data_sha256 = data_sha256
        self._rank = algorithm.context.mesh.rank
        self._saver = Saver(Path(saving.folder), saving.token, self._rank, emit)

    def begin(self, trainer: Trainer) -> None:
        """Looks for room on the disk, and goes on from the checkpoint if there is one; on all ranks
        alike. CheckpointError if the run cannot begin."""
        self._trainer = trainer
        if self.saves:
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

    def save(self, updates: int) -> None:
        """Starts to save what is true after so many updates; on all ranks alike."""
        if not self._algorithm.has_checkpoint_state:
            return
        pieces = self._algorithm.pieces()
        state = {
            "training": self._trainer.state(),
            "algorithm": self._algorithm.state(),
            "data": {"sha256": self._data_sha256},
        }
        self._saver.save(updates, pieces, {"run": state} if self._rank == 0 else {})

    def _restore(self) -> None:
        """Goes on from the checkpoint, if there is one to go on from; on all ranks alike."""
        if self._saving.resume is None:
            return
        with Checkpoint(Path(self._saving.resume)) as checkpoint:
            state = checkpoint.manifest.state
            try:
                self._algorithm.restore(checkpoint, state["algorithm"])
                self._trainer.restore(state["training"])
            except (KeyError, TypeError, ValueError) as error:
                raise CheckpointError(
                    f"the state in {checkpoint.folder} cannot be used: {error!r}"
                ) from None
