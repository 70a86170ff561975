"""One start of a training run on the driver: its folder, data, checkpoints and trackers."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smolrun.config import RunConfig, world_size
from smolrun.data.cache import cache_folder
from smolrun.driver.checkpoints import RunCheckpoints
from smolrun.driver.detach import begin_driving
from smolrun.driver.fleet import open_fleet
from smolrun.driver.outputs import become_latest, make_folder, nothing_started
from smolrun.driver.preflight import (
    check_model_fits,
    check_weights,
    memory_warning,
    stages_note,
    start_notes,
)
from smolrun.driver.prepare import prepare_data
from smolrun.driver.resume import (
    ResumePoint,
    check_data,
    discard_backup,
    find_resume_point,
    find_weights,
    restore_folder,
)
from smolrun.driver.run_on_ranks import run_on_ranks
from smolrun.driver.run_summary import RunSummary, not_equipped, with_advice
from smolrun.driver.trackers import RunTrackers
from smolrun.errors import HostError, HostErrors
from smolrun.events import Event, RunStarted, StepDone
from smolrun.launch.driver import Subscriber
from smolrun.launch.rank_log import DriverLog
from smolrun.launch.streams import StreamServer
from smolrun.launch.supervisor import Limits
from smolrun.launch.supervisor_events import RunOutcome
from smolrun.targets import load_target
from smolrun.tracking.console import Console
from smolrun.tracking.formatting import counted
from smolrun.tracking.run_folder import RunFolder

if TYPE_CHECKING:
    from smolrun.data.prepared import Prepared, Progress
    from smolrun.data.stream import StreamReader


@dataclass
class AttemptResult:
    """How one start of the run ended. `done` are the steps that it resumed from, or more;
    `has_begun`: it has trained."""

    outcome: RunOutcome
    folder: RunFolder
    done: int
    has_begun: bool


class TrainingRun(Subscriber):
    """One start of a training run. The constructor prepares it, `train` starts the ranks."""

    def __init__(
        self,
        config: RunConfig,
        console: Console,
        closing: contextlib.ExitStack,
        resume: ResumePoint | None = None,
    ) -> None:
        """Connect to the hosts, prepare the data and the run's folder. ConfigError, DataError,
        HostError: nothing was started. `closing` releases what is held until the end of the run;
        a restarted run continues from `resume`, the first start from what the config says."""
        self._fleet = open_fleet(config)
        closing.callback(self._fleet.close)
        self._config = config
        self._console = console
        self._resume = resume or find_resume_point(config, console.say, closing)
        self.earlier_wall_s = self._resume.wall_s if self._resume is not None else 0.0
        self._began = time.monotonic()
        self._has_begun = False
        self._weights = find_weights(config, self._resume, console.say)
        self._prepared = prepare_data(config, console.preparing)
        check_model_fits(config, self._prepared.kind)
        if self._weights is not None:
            check_weights(config, self._prepared, self._weights)
        self._stages = stages_note(config, self._prepared)
        if self._resume is None and (line := memory_warning(config, self._prepared)):
            console.say(f"warning: {line}")
        self._reader = _stream_reader(config, self._prepared, self._resume, console.preparing)
        console.unit = "tokens" if self._prepared.sequence_length else "samples"
        self._undo = contextlib.ExitStack()  # until the first rank has begun
        with nothing_started():
            self.folder = self._open_folder()
            self._trackers = RunTrackers(config, self.folder, console, self._resume)

    def _open_folder(self) -> RunFolder:
        """A new folder, or that of the resumed run."""
        if self._resume is None:
            title = f"{self._config.algorithm.name}-{self._config.model.name}"
            folder = make_folder(self._config, title, self._prepared.tokenizer)
            if self._prepared.model_folder is not None:
                folder.keep_model_config(Path(self._prepared.model_folder))
        else:
            check_data(self._resume, self._prepared.sha256)
            self._console.go_on(self._resume.time_s, world_size(self._config))
            folder = self._resume.folder
            restore_folder(self._resume, self._config, self._console.say, self._undo)
        self._console.log = DriverLog(folder.driver_records).write
        begin_driving(folder, steps=self._config.training.steps, unit=self._console.unit)
        return folder

    def train(self) -> AttemptResult:
        """Run the ranks to their end; none is left when this returns or raises."""
        config, say, trackers = self._config, self._console.say, self._trackers
        ranks = counted(world_size(config), "rank")
        say(f"{self.folder.path}: starting {ranks}; {self._prepared.description}")
        for line in [*([self._stages] if self._stages else []), *start_notes(config)]:
            say(line)
        trackers.open()
        checkpoints = RunCheckpoints(
            config,
            self.folder,
            self._fleet,
            resume=self._resume,
            weights=self._weights,
            driver_state=self._driver_state,
            emit=trackers.emit,
            say=say,
        )
        try:
            outcome = self._on_ranks(checkpoints)
            outcome = checkpoints.checked(outcome)
        finally:
            self._fleet.close()
            checkpoints.close()
            trackers.close()
            self._undo.close()
        done = self._resume.updates if self._resume else 0
        outcome = with_advice(config, outcome)
        return AttemptResult(outcome, self.folder, done, self._has_begun)

    def _on_ranks(self, checkpoints: RunCheckpoints) -> RunOutcome:
        config = self._config
        streams = [StreamServer(self._reader)] if self._reader is not None else []
        try:
            return run_on_ranks(
                config,
                self.folder,
                self._fleet,
                [*streams, self, checkpoints, self._trackers],
                limits=Limits(
                    start_s=config.cluster.start_timeout_s,
                    finish_s=2 * config.mesh.timeout_s,
                    # A disk may be as slow as a peer: saving is part of a stop.
                    stop_s=max(120.0, 2 * config.mesh.timeout_s),
                ),
                say=self._console.say,
                progress=self._console.preparing,
                prepared=self._prepared,
                checkpoint=(self._resume and self._resume.checkpoint) or self._weights,
                saving=checkpoints.saving,
            )
        except (HostError, HostErrors) as error:
            return not_equipped(error)

    def on_event(self, event: Event) -> None:
        """From the first step on there is nothing to undo, and this is the latest run: one that
        cannot begin has nothing to resume, to serve or to export."""
        if not self._has_begun and isinstance(event, RunStarted | StepDone):
            self._has_begun = True
            become_latest(self.folder, self._console.say)
            self._undo.pop_all()
            if self._resume is not None:
                discard_backup(self._resume)

    def _driver_state(self, updates: int) -> dict[str, Any]:
        """The wall time so far, and the stream's position after `updates` updates, for the
        checkpoint."""
        wall_s = self.earlier_wall_s + time.monotonic() - self._began
        state: dict[str, Any] = {"wall_s": round(wall_s, 3)}
        if self._reader is not None:
            row = updates * self._config.training.global_batch_size
            state["stream"] = self._reader.bookmark_for(row)
        return state

    def finish(
        self,
        outcome: RunOutcome,
        wall_s: float,
        restarts: list[dict[str, Any]],
        earlier_wall_s: float,
    ) -> None:
        """Write summary.json, and print the last lines. `wall_s` is since the command, and
        `earlier_wall_s` that of the starts before it."""
        trackers, versions = self._trackers, self._fleet.versions()
        RunSummary(
            self._config,
            self.folder,
            trackers.record,
            trackers.times,
            versions,
            restarts,
            earlier_wall_s,
        ).report(outcome, wall_s, self._console)


def _stream_reader(
    config: RunConfig, prepared: Prepared, resume: ResumePoint | None, progress: Progress
) -> StreamReader | None:
    """The reader of the stream, at the first row that is not trained on yet; None where the data is
    not a stream. DataError if the stream cannot be read that far."""
    if prepared.stream is None:
        return None
    data = load_target(config.data.target)(cache_folder("data"), **config.data.keywords())
    reader: StreamReader = data.stream(
        prepared,
        seed=config.seed,
        row=(resume.updates if resume else 0) * config.training.global_batch_size,
        bookmark=resume.driver_state.get("stream") if resume else None,
    )
    reader.catch_up(progress)
    return reader
