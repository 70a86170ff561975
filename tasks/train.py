"""task=train: prepare the data, start one worker per rank, watch, and tell how it ended.

`drive` is the driver's half, `work` what every rank does once the mesh stands."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smolrun.config import RunConfig, world_size
from smolrun.driver.checkpoints import RunCheckpoints
from smolrun.driver.detach import begin_driving
from smolrun.driver.emulation import tell_emulated
from smolrun.driver.fleet import is_elsewhere, open_fleet
from smolrun.driver.outputs import (
    become_latest,
    make_folder,
    nothing_started,
    server_note,
)
from smolrun.driver.preflight import check_before_start, check_model_fits, memory_warning
from smolrun.driver.prepare import prepare_data, spec_of, with_pinned_model
from smolrun.driver.restart import Lost, Restarts, reachable_hosts, train_on
from smolrun.driver.resume import Earlier, check_data, find_earlier, forget_undo, take_up
from smolrun.driver.run_on_ranks import run_on_ranks
from smolrun.driver.run_summary import Ending, not_equipped, with_advice
from smolrun.driver.stream_source import reader_of, reader_state
from smolrun.driver.trackers import RunTrackers
from smolrun.errors import HostError, HostErrors
from smolrun.events import Event, RunStarted
from smolrun.launch.driver import Subscriber
from smolrun.launch.streams import StreamClient, StreamServer
from smolrun.launch.supervisor import Limits
from smolrun.launch.supervisor_events import RunOutcome
from smolrun.launch.wake import keep_awake
from smolrun.tracking.console import Console
from smolrun.tracking.formatting import counted
from smolrun.tracking.run_folder import RunFolder

if TYPE_CHECKING:
    from smolrun.launch.channel import WorkerChannel
    from smolrun.launch.control import StartMessage
    from smolrun.mesh.mesh import Mesh


def drive(config: RunConfig) -> int:
    """Train as configured; returns the exit code. ConfigError, DataError, HostError: nothing was
    started."""
    began = time.monotonic()
    check_before_start(config)
    if config.training.dry_run:
        from smolrun.estimate.dry_run import estimate  # loads torch
        from smolrun.estimate.dry_run_text import report

        spec = spec_of(config)
        return report(estimate(config, spec, notes=spec.notes))
    config = with_pinned_model(config)
    console = Console(
        steps=config.training.steps,
        world_size=world_size(config),
        batch_size=config.training.global_batch_size,
        names_slowest=config.algorithm.is_lockstep,
    )
    with contextlib.ExitStack() as closing:
        closing.callback(console.close)
        if is_elsewhere(config):  # their leases come from here
            closing.enter_context(keep_awake())
        restarts = Restarts(config, console.say, lambda: reachable_hosts(config))
        run, outcome = train_on(
            _Run(config, console, closing),
            restarts,
            lambda start: _Run(start.config, console, closing, start.earlier),
        )
        console.close()
        run.finish(outcome, time.monotonic() - began, restarts.rows)
    return outcome.exit_code


class _Run(Subscriber):
    """One start of a training run: ready when it is made, `train` starts the ranks."""

    def __init__(
        self,
        config: RunConfig,
        console: Console,
        closing: contextlib.ExitStack,
        earlier: Earlier | None = None,
    ) -> None:
        """Connect to the hosts, prepare the data and the run's folder. ConfigError, DataError,
        HostError: nothing was started. `closing` releases what is held until the end of the run;
        `earlier` is the state that a restarted run continues from."""
        self._fleet = open_fleet(config)
        closing.callback(self._fleet.close)
        self._config = config
        self._console = console
        self._earlier = earlier or find_earlier(config, console.say, closing)
        self._has_begun = False
        self._prepared = prepare_data(config, console.preparing)
        check_model_fits(config, self._prepared.kind)
        if self._earlier is None and (line := memory_warning(config, self._prepared)):
            console.say(f"warning: {line}")
        self._reader = reader_of(config, self._prepared, self._earlier, console.preparing)
        console.unit = "tokens" if self._prepared.sequence_length else "samples"
        self._undo = contextlib.ExitStack()  # until the first rank has begun
        with nothing_started():
            self._folder = self._open_folder()
            self._trackers = RunTrackers(config, self._folder, console, self._earlier)
        become_latest(self._folder, console.say)

    def _open_folder(self) -> RunFolder:
        """A new folder, or that of the resumed run."""
        if self._earlier is None:
            title = f"{self._config.algorithm.name}-{self._config.model.name}"
            folder = make_folder(self._config, title, self._prepared.tokenizer)
            if self._prepared.model_folder is not None:
                folder.keep_model_config(Path(self._prepared.model_folder))
        else:
            check_data(self._earlier, self._prepared.sha256)
            self._console.go_on(self._earlier.time_s, world_size(self._config))
            folder = self._earlier.folder
            take_up(self._earlier, self._config, self._console.say, self._undo)
        begin_driving(folder, steps=self._config.training.steps, unit=self._console.unit)
        return folder

    def train(self) -> RunOutcome:
        """Run the ranks to their end; none is left when this returns or raises."""
        config, say, trackers = self._config, self._console.say, self._trackers
        ranks = counted(world_size(config), "rank")
        say(f"{self._folder.path}: starting {ranks}; {self._prepared.description}")
        for line in [*server_note(config), *tell_emulated(config)]:
            say(line)
        trackers.open()
        checkpoints = RunCheckpoints(
            config,
            self._folder,
            self._fleet,
            earlier=self._earlier,
            driver_state=lambda updates: reader_state(config, self._reader, updates),
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
        return with_advice(config, outcome)

    def _on_ranks(self, checkpoints: RunCheckpoints) -> RunOutcome:
        config = self._config
        streams = [StreamServer(self._reader)] if self._reader is not None else []
        try:
            return run_on_ranks(
                config,
                self._folder,
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
                checkpoint=self._earlier.checkpoint if self._earlier else None,
                saving=checkpoints.saving,
            )
        except (HostError, HostErrors) as error:
            return not_equipped(error)

    def on_event(self, event: Event) -> None:
        """From the first step on there is nothing to undo."""
        if isinstance(event, RunStarted):
            self._has_begun = True
            self._undo.pop_all()
            if self._earlier is not None:
                forget_undo(self._earlier)

    def lost(self, outcome: RunOutcome) -> Lost:
        """The end of this start, for the decision whether the run is restarted."""
        done = self._earlier.updates if self._earlier else 0
        return Lost(outcome, self._folder, done, self._has_begun)

    def finish(self, outcome: RunOutcome, wall_s: float, restarts: list[dict[str, Any]]) -> None:
        """Write summary.json, and print the last lines."""
        trackers, versions = self._trackers, self._fleet.versions()
        Ending(
            self._config, self._folder, trackers.record, trackers.times, versions, restarts
        ).tell(outcome, wall_s, self._console)


def work(start: StartMessage, mesh: Mesh, channel: WorkerChannel) -> dict[str, Any]:
    """What one rank does between a mesh that stands and its result; returns its summary."""
    from smolrun.data.prepared import Prepared
    from smolrun.parts.placement import rank_speeds
    from smolrun.worker.train import pick_device, train

    prepared = Prepared.from_json(start.prepared or {})
    return train(
        start.config,
        prepared,
        mesh,
        device=pick_device(start.device),
        speeds=rank_speeds(start.config["cluster"], start.world_size),
        emit=channel.emit,
        should_stop=channel.stop_requested.is_set,
        saving=start.saving,
        rows=StreamClient(channel) if prepared.stream is not None else None,
    )
