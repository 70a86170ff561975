"""task=train: prepare the data, start one worker per rank, watch, and tell how it ended.

`drive` is the driver's half, `work` what every rank does once the mesh stands."""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smolrun.checkpoints.committer import CheckpointCommitter
from smolrun.config import RunConfig, config_hash, savers, world_size
from smolrun.driver.checkpoints import Fetched
from smolrun.driver.detach import begin_driving
from smolrun.driver.emulation import tell_emulated
from smolrun.driver.fleet import is_elsewhere, open_fleet
from smolrun.driver.outputs import (
    become_latest,
    make_folder,
    nothing_started,
    plan_workers,
    prepare_data,
    server_note,
)
from smolrun.driver.preflight import check_before_start, check_model_fits, memory_warning
from smolrun.driver.prepare import with_pinned_model
from smolrun.driver.reachable_hosts import who_answers
from smolrun.driver.restart import Lost, Restarts, train_on
from smolrun.driver.resume import Earlier, check_data, find_earlier, forget_undo, take_up
from smolrun.driver.run_on_ranks import Reconnector
from smolrun.driver.run_summary import Ending, not_equipped, unsaved, with_advice
from smolrun.driver.stream_source import reader_of, reader_state
from smolrun.driver.trackers import more_readers, time_teller
from smolrun.errors import HostError, HostErrors
from smolrun.events import Event, RunStarted
from smolrun.launch.control import Saving
from smolrun.launch.driver import Driver
from smolrun.launch.supervisor import Limits
from smolrun.launch.supervisor_events import RunOutcome
from smolrun.launch.wake import awake
from smolrun.tracking.console import Console
from smolrun.tracking.formatting import counted
from smolrun.tracking.jsonl import JsonLines
from smolrun.tracking.run_folder import RunFolder
from smolrun.tracking.run_record import RunRecord
from smolrun.tracking.tracker import Fanout, Tracker

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
        from smolrun.estimate.dry_run_text import report  # loads torch

        return report(config)
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
            closing.enter_context(awake())
        restarts = Restarts(config, console.say, lambda: who_answers(config))
        run, outcome = train_on(
            _Run(config, console, closing),
            restarts,
            lambda start: _Run(start.config, console, closing, start.earlier),
        )
        console.close()
        run.tell(outcome, time.monotonic() - began, restarts.rows)
    return outcome.exit_code


class _Run:
    """One training run, as the driver sees it: everything is ready when it is made."""

    def __init__(
        self,
        config: RunConfig,
        console: Console,
        closing: contextlib.ExitStack,
        earlier: Earlier | None = None,
    ) -> None:
        """Connects to the hosts, finds or makes data and folder; ConfigError, DataError, HostError:
        nothing was started. What it holds until the end of the run is given back when `closing`
        ends. With `earlier` it goes on with a run that is this driver's already."""
        self._fleet = open_fleet(config)
        closing.callback(self._fleet.close)
        self._config = config
        self._console = console
        earlier = earlier or find_earlier(config, console.say, closing)
        self._earlier = earlier
        self._is_begun = False
        self._prepared = prepare_data(config, console.preparing)
        check_model_fits(config, self._prepared.kind)
        if earlier is None and (line := memory_warning(config, self._prepared)):
            console.say(f"warning: {line}")
        self._rows = reader_of(config, self._prepared, self._earlier, console.preparing)
        console.unit = "tokens" if self._prepared.sequence_length else "samples"
        self._undo: list[Callable[[], None]] = []
        with nothing_started():
            self._folder = self._open_folder()
            self._metrics = JsonLines(self._folder.metrics)
        become_latest(self._folder, console.say)
        self._record = RunRecord()
        if earlier is not None:
            self._record = RunRecord(
                earlier_s=earlier.time_s,
                steps=earlier.updates,
                train_loss=earlier.train_loss,
                eval_loss=earlier.eval_loss,
                checkpoint=earlier.checkpoint.name if earlier.checkpoint else None,
            )
        self._times = time_teller(config, console.say)
        self._log_tail: Callable[[int], list[str]] = lambda rank: []

    def _open_folder(self) -> RunFolder:
        """A fresh folder, or that of the run that goes on."""
        if self._earlier is None:
            title = f"{self._config.algorithm.name}-{self._config.model.name}"
            folder = make_folder(self._config, title, self._prepared.tokenizer)
            if self._prepared.model_folder is not None:
                folder.keep_model_config(Path(self._prepared.model_folder))
        else:
            check_data(self._earlier, self._prepared.sha256)
            self._console.go_on(self._earlier.time_s, world_size(self._config))
            folder = self._earlier.folder
            self._undo = take_up(self._earlier, self._config, self._console.say)
        begin_driving(folder, steps=self._config.training.steps, unit=self._console.unit)
        return folder

    def train(self) -> RunOutcome:
        """Starts the ranks and hears them out; none is left when this returns or raises."""
        config, say = self._config, self._console.say
        ranks = counted(world_size(config), "rank")
        say(f"{self._folder.path}: starting {ranks}; {self._prepared.description}")
        for line in [*server_note(config), *tell_emulated(config)]:
            say(line)
        readers: list[Tracker] = [self._metrics, self._console, self._record, self._times]
        trackers = Fanout([*readers, *more_readers(config, self._folder, say)], warn=say)
        committer, saving = self._checkpoints(trackers.record)

        def listen(event: Event) -> None:
            if isinstance(event, RunStarted):
                self._has_begun()
            if not committer.record(event):
                trackers.record(event)

        try:
            outcome = self._on_hosts(committer, saving, listen)
        finally:
            self._fleet.close()
            committer.close()
            trackers.close()
            for act in reversed(self._undo):
                act()
        return with_advice(config, unsaved(outcome, committer))

    def _on_hosts(
        self, committer: CheckpointCommitter, saving: Saving | None, listen: Callable[[Event], None]
    ) -> RunOutcome:
        """Everything the ranks need is brought to their hosts, they run, and the hosts are clean
        again."""
        folder, fleet, console = self._folder, self._fleet, self._console
        checkpoint = self._earlier.checkpoint if self._earlier else None
        try:
            fleet.equip(
                folder.run_id,
                self._prepared,
                checkpoint,
                progress=console.preparing,
                say=console.say,
            )
            plans = plan_workers(self._config, folder, fleet, saving)
        except (HostError, HostErrors) as error:
            fleet.clear(folder.run_id)
            return not_equipped(error)
        fetched = Fetched(fleet.fetcher(folder.checkpoints, saving), committer)
        returns = Reconnector(self._config, fleet, saving, console.say)

        def heard(event: Event) -> None:
            returns.tell()
            if not fetched.take(event):
                listen(event)

        driver = Driver(
            plans,
            returns.host_of,
            listen=heard,
            limits=_limits(self._config),
            rows=self._rows,
            stop_requests=folder.stop_requests,
            meanwhile=fetched.hand_on,
            elastic=returns.elasticity,
            plan_again=returns.plan_again,
        )
        self._log_tail = driver.log_tail
        try:
            return driver.run()
        finally:
            fetched.finish(console.say)
            for line in fleet.clear(folder.run_id):
                console.say(f"warning: {line}")

    def _has_begun(self) -> None:
        """From now on there is nothing to undo."""
        self._is_begun = True
        self._undo.clear()
        if self._earlier is not None:
            forget_undo(self._earlier)

    def _checkpoints(
        self, emit: Callable[[Event], None]
    ) -> tuple[CheckpointCommitter, Saving | None]:
        """Who makes checkpoints of what the ranks write, and what they are told about it."""
        config, token = self._config, secrets.token_hex(4)
        committer = CheckpointCommitter(
            self._folder.checkpoints,
            token,
            world_size=world_size(config),
            run_id=self._folder.run_id,
            config_hash=config_hash(config),
            keep=config.checkpoint.keep,
            keep_best=config.checkpoint.keep_best,
            newest=self._earlier.checkpoint if self._earlier else None,
            emit=emit,
            driver_state=lambda updates: reader_state(config, self._rows, updates),
            savers=savers(config),
        )
        if not config.checkpoint.every and self._earlier is None:
            return committer, None
        resume = str(committer.newest) if committer.newest else None
        return committer, Saving(
            str(self._folder.checkpoints.absolute()),
            token,
            every=config.checkpoint.every,
            keep=config.checkpoint.keep,
            keep_best=config.checkpoint.keep_best,
            resume=resume,
        )

    def lost(self, outcome: RunOutcome) -> Lost:
        """What is to be known of this start when it is over."""
        done = self._earlier.updates if self._earlier else 0
        return Lost(outcome, self._folder, done, self._is_begun, self._log_tail)

    def tell(self, outcome: RunOutcome, wall_s: float, restarts: list[dict[str, Any]]) -> None:
        """The summary, and the last lines."""
        Ending(
            self._config,
            self._folder,
            self._record,
            self._times,
            self._fleet.versions(),
            restarts,
        ).tell(outcome, wall_s, self._console, self._log_tail)


def _limits(config: RunConfig) -> Limits:
    """How long to wait. A disk may be as slow as a peer: saving takes part in an end."""
    wait_s = config.mesh.timeout_s
    start_s, stop_s = config.cluster.start_timeout_s, max(120.0, 2 * wait_s)
    return Limits(start_s=start_s, finish_s=2 * wait_s, stop_s=stop_s)


def work(start: StartMessage, mesh: Mesh, channel: WorkerChannel) -> dict[str, Any]:
    """What one rank does between a mesh that stands and its result; returns its summary."""
    from smolrun.data.prepared import Prepared
    from smolrun.parts.placement import rank_speeds
    from smolrun.worker.train import pick_device, train

    return train(
        start.config,
        Prepared.from_json(start.prepared or {}),
        mesh,
        device=pick_device(start.device),
        speeds=rank_speeds(start.config["cluster"], start.world_size),
        emit=channel.emit,
        should_stop=channel.stop_requested.is_set,
        saving=start.saving,
        rows=channel.rows,
    )
