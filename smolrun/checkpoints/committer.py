"""Commits checkpoints from the reports of the ranks, and prunes old ones.

It runs on the driver, which alone knows when all ranks have written: only then a manifest makes
their files a checkpoint. Knows no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from smolrun.checkpoints import folder
from smolrun.checkpoints.find import checkpoints_in, read_manifest
from smolrun.checkpoints.manifest import merge
from smolrun.errors import CheckpointError
from smolrun.events import CheckpointSaved, EvalDone, Event, Note, ShardFailed, ShardSaved

_MOST_LOSSES = 100_000  # of evaluations, of which the best may be kept
# Checkpoints that some ranks have reported and others not yet. Ranks are a few steps apart at most,
# and each writes one after the other.
_MOST_OPEN = 8


@dataclass
class _Attempt:
    """The reports about one checkpoint."""

    shards: list[ShardSaved] = field(default_factory=list)
    failures: list[ShardFailed] = field(default_factory=list)


class CheckpointCommitter:
    """A subscriber of the ranks' events. `failure`: why the latest checkpoint failed, if it did."""

    def __init__(
        self,
        path: Path,
        token: str,
        *,
        world_size: int,
        run_id: str,
        config_hash: str,
        keep: int,
        keep_best: bool,
        newest: Path | None = None,
        emit: Callable[[Event], None],
        driver_state: Callable[[int], dict[str, Any]] = lambda updates: {},
        savers: int | None = None,
    ) -> None:
        """`savers` ranks write, all if it is None; `driver_state(updates)` is what
        the driver itself must remember, as JSON."""
        self.newest = newest
        self.failure: str | None = None
        self._path = path
        self._token = token
        self._world_size = world_size
        self._savers = savers or world_size
        self._facts = {"run_id": run_id, "config_hash": config_hash}
        self._keep = keep
        self._keep_best = keep_best
        self._emit = emit
        self._driver_state = driver_state
        self._attempts: dict[int, _Attempt] = {}
        self._eval_losses: dict[int, float] = _known_losses(path)

    def record(self, event: Event) -> bool:
        """Handle an event; True if it is consumed here."""
        if isinstance(event, EvalDone) and event.loss is not None:
            self._eval_losses[event.step + 1] = event.loss
            if len(self._eval_losses) > _MOST_LOSSES:
                del self._eval_losses[next(iter(self._eval_losses))]
        if not isinstance(event, ShardSaved | ShardFailed):
            return False
        attempt = self._attempts.setdefault(event.updates, _Attempt())
        if len(self._attempts) > _MOST_OPEN:
            oldest = min(self._attempts)
            del self._attempts[oldest]
            folder.abandon(folder.part_folder(self._path, oldest, self._token))
        if isinstance(event, ShardSaved):
            attempt.shards.append(event)
        else:
            attempt.failures.append(event)
        if len(attempt.shards) + len(attempt.failures) == self._savers:
            del self._attempts[event.updates]
            self._complete(event.updates, attempt)
        return True

    def close(self) -> None:
        """Remove the files of unfinished saves."""
        for updates in self._attempts:
            folder.abandon(folder.part_folder(self._path, updates, self._token))

    def _complete(self, updates: int, attempt: _Attempt) -> None:
        part = folder.part_folder(self._path, updates, self._token)
        self.failure = None
        if attempt.failures:
            worst = attempt.failures[0]
            self._give_up(part, updates, f"rank {worst.rank}: {worst.reason}")
            return
        try:
            manifest = merge(
                [shard.report for shard in attempt.shards],
                step=updates,
                world_size=self._world_size,
                state=self._state(updates, attempt.shards),
                **self._facts,
            )
            self.newest = folder.commit(part, manifest)
        except (OSError, CheckpointError) as error:
            self._give_up(part, updates, str(error))
            return
        except RecursionError:
            self._give_up(part, updates, "the state of a rank is nested too deep")
            return
        self._emit(
            CheckpointSaved(
                updates - 1,
                self.newest.name,
                bytes=sum(entry.bytes for entry in manifest.files.values()),
                waited_s=max(shard.waited_s for shard in attempt.shards),
                write_s=max(shard.write_s for shard in attempt.shards),
            )
        )
        self._prune()

    def _state(self, updates: int, shards: list[ShardSaved]) -> dict[str, Any]:
        """The state of rank 0 about the run, and the driver's own."""
        return {
            **{k: v for shard in shards for k, v in shard.state.get("run", {}).items()},
            "driver": self._driver_state(updates),
            "eval_loss": self._eval_losses.get(updates),
        }

    def _give_up(self, part: Path, updates: int, why: str) -> None:
        folder.abandon(part)
        self.failure = f"the checkpoint after {updates} steps could not be written: {why}"
        kept = f"the last one is {self.newest.name}" if self.newest else "there is none yet"
        self._emit(Note("warning", f"{self.failure}; training continues, {kept}"))

    def _prune(self) -> None:
        best = self._best() if self._keep_best else None
        try:
            folder.prune(
                self._path,
                keep=self._keep,
                protect=() if best is None else (best,),
                good=self.newest,
            )
        except (OSError, CheckpointError) as error:
            self._emit(Note("warning", f"an old checkpoint could not be deleted: {error}"))

    def _best(self) -> int | None:
        losses = {
            step: self._eval_losses[step]
            for step, _ in checkpoints_in(self._path)
            if step in self._eval_losses
        }
        return min(losses, key=lambda step: losses[step], default=None)


def _known_losses(path: Path) -> dict[int, float]:
    """Evaluation losses in the checkpoints of an earlier part of the run, by step."""
    losses = {}
    for _, found in checkpoints_in(path):
        try:
            manifest = read_manifest(found)
        except CheckpointError:
            continue  # reported when it is loaded
        loss = manifest.state.get("eval_loss")
        if isinstance(loss, float):
            losses[manifest.step] = loss
    return losses
