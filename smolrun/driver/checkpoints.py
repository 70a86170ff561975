"""The checkpoints of a training run, on the driver: shards are fetched from the hosts of the ranks,
and become a checkpoint when all ranks have reported theirs."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smolrun.checkpoints.committer import CheckpointCommitter
from smolrun.config import RunConfig, config_hash, savers, world_size
from smolrun.driver.fleet import Fleet
from smolrun.driver.resume import ResumePoint
from smolrun.events import Event
from smolrun.launch.control import EXIT_FAILED, Saving
from smolrun.launch.driver import Driver, Subscriber
from smolrun.launch.supervisor_events import RunOutcome
from smolrun.tracking.run_folder import RunFolder

if TYPE_CHECKING:
    from smolrun.launch.delivery.shards import ShardFetcher

# The last checkpoint of a run over a slow link: as many bytes as a Wi-Fi of 5 MB/s brings of 3 GB.
_LAST_S = 600.0


class RunCheckpoints(Subscriber):
    """Commits the checkpoints of one start of a run. A shard saved on another host is reported to
    the committer once its files are here. `saving` is what the ranks need to save and restore."""

    def __init__(
        self,
        config: RunConfig,
        folder: RunFolder,
        fleet: Fleet,
        *,
        resume: ResumePoint | None,
        weights: Path | None,
        driver_state: Callable[[int], Mapping[str, Any]],
        emit: Callable[[Event], None],
        say: Callable[[str], None],
    ) -> None:
        """`weights` is the checkpoint whose weights a new run begins with. `driver_state(updates)`
        is what the driver itself has to store, as JSON."""
        token = secrets.token_hex(4)
        checkpoint = resume.checkpoint if resume else None
        self._folder = folder.checkpoints
        self._fleet = fleet
        self._say = say
        self._fetcher: ShardFetcher | None = None
        self._num_fetching = 0
        self._committer = CheckpointCommitter(
            self._folder,
            token,
            world_size=world_size(config),
            run_id=folder.unique_id,
            config_hash=config_hash(config),
            keep=config.checkpoint.keep,
            keep_best=config.checkpoint.keep_best,
            newest=checkpoint,
            emit=emit,
            driver_state=lambda updates: dict(driver_state(updates)),
            savers=savers(config),
        )
        self.saving: Saving | None = None
        loaded = checkpoint or weights
        if config.checkpoint.every or resume is not None or weights is not None:
            self.saving = Saving(
                str(self._folder.absolute()),
                token,
                every=config.checkpoint.every,
                keep=config.checkpoint.keep,
                keep_best=config.checkpoint.keep_best,
                resume=str(loaded.absolute()) if loaded is not None else None,
                weights_only=checkpoint is None and weights is not None,
            )

    def on_start(self, driver: Driver) -> None:
        """The hosts are equipped: fetch from those that are not this machine."""
        self._fetcher = self._fleet.fetcher(self._folder, self.saving)

    def on_poll(self) -> None:
        """Commit the shards that have arrived."""
        if self._fetcher is not None and self._num_fetching:
            self._commit(self._fetcher.arrived())

    def on_event(self, event: Event) -> None:
        """Fetch a shard of another host; count one that is here."""
        if self._fetcher is not None and self._fetcher.take(event):
            self._num_fetching += 1
        else:
            self._committer.record(event)

    def on_end(self) -> None:
        """Wait for the shards still being fetched; a Ctrl-C ends that wait."""
        if self._fetcher is None:
            return
        self.on_poll()
        if self._num_fetching:
            self._say("fetching the last checkpoint from the hosts")
        try:
            events = self._fetcher.finish(_LAST_S)
        except KeyboardInterrupt:  # the hosts still have to be cleaned
            self._say("fetching stopped; steps after the last checkpoint here are lost")
            events = self._fetcher.finish(0.0)
        self._commit(events)

    def close(self) -> None:
        """Delete unfinished saves."""
        self._committer.close()

    def checked(self, outcome: RunOutcome) -> RunOutcome:
        """A run whose last checkpoint could not be written has failed, however well it trained."""
        if self._committer.failure is None or outcome.status == "failed":
            return outcome
        return dataclasses.replace(
            outcome, status="failed", exit_code=EXIT_FAILED, reason=self._committer.failure
        )

    def _commit(self, events: list[Event]) -> None:
        self._num_fetching -= len(events)
        for event in events:
            self._committer.record(event)
