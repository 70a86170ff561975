"""What one rank saves, and how it goes on from what was saved: the trainer, the algorithm, and the
random generators put their state together here.

The rank writes tensors and tells the driver; the driver makes the checkpoint of it (keeper.py).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from smolrun.algorithms.base import Algorithm
from smolrun.checkpoints.reader import Checkpoint
from smolrun.checkpoints.saver import Saver
from smolrun.errors import CheckpointError
from smolrun.events import Event
from smolrun.launch.control import Saving
from smolrun.training.randomness import random_state, restore_random_state, seed_everything
from smolrun.training.trainer import Outcome, Trainer


class RankCheckpoints:
    """Saves and restores one rank of a run."""

    _trainer: Trainer

    def __init__(
        self,
        saving: Saving,
        algorithm: Algorithm,
        emit: Callable[[Event], None],
        *,
        seed: int,
        data_sha256: str,
    ) -> None:
        self._saving = saving
        self._algorithm = algorithm
        self._seed = seed
        self._data_sha256 = data_sha256
        self._rank = algorithm.context.mesh.rank
        self._saver = Saver(Path(saving.folder), saving.token, self._rank, emit)

    def fit(self, trainer: Trainer) -> Outcome:
        """Trains from the checkpoint on, if there is one to go on from; the last save is written
        when this returns."""
        self._trainer = trainer
        self._check_space()
        self._restore()
        outcome = trainer.fit()
        self._saver.finish()
        return outcome

    def _check_space(self) -> None:
        """CheckpointError if this host's disk has no room for what will be kept."""
        folder = Path(self._saving.folder)
        there = next(path for path in (folder, *folder.parents) if path.exists())
        free = shutil.disk_usage(there).free
        kept = sum(file.stat().st_size for file in folder.glob("*/*") if file.is_file())
        # One more than are kept, as a new one is whole before an old one goes.
        needed = self._algorithm.checkpoint_bytes() * (self._saving.keep + 1) - kept
        if needed > free:
            raise CheckpointError(
                f"checkpoints need {needed / 1e9:.1f} GB more in {folder}, the disk has "
                f"{free / 1e9:.1f} GB free; `smolrun task=clean` deletes old runs, or set "
                "checkpoint.keep=1, or checkpoint=none"
            )

    def save(self, updates: int) -> None:
        """Starts to save what is true after so many updates; on all ranks alike."""
        pieces = self._algorithm.pieces()
        state = {"rank": {"random": random_state(self._algorithm.context.device)}}
        if self._rank == 0:
            state["run"] = {
                "training": self._trainer.state(),
                "algorithm": self._algorithm.state(),
                "data": {"sha256": self._data_sha256},
            }
        self._saver.save(updates, pieces, state)

    def _restore(self) -> None:
        """Goes on from the checkpoint, if there is one to go on from; on all ranks alike.

        As many ranks as before get their own random states back. Another number of ranks has none
        to get back: each is seeded anew from the run's seed, its rank and the step.
        """
        if self._saving.resume is None:
            return
        with Checkpoint(Path(self._saving.resume)) as checkpoint:
            state = checkpoint.manifest.state
            try:
                self._algorithm.restore(checkpoint, state["algorithm"])
                self._trainer.restore(state["training"])
                if checkpoint.manifest.world_size == self._algorithm.context.mesh.world_size:
                    mine = state["ranks"][str(self._rank)]["random"]
                    restore_random_state(mine, self._algorithm.context.device)
                else:
                    seed_everything(self._seed, self._rank, checkpoint.manifest.step)
            except KeyError as error:
                raise CheckpointError(f"{checkpoint.folder} lacks {error}") from None
