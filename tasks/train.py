"""task=train: prepare the data, start one worker per rank, watch, and tell how it ended.

`drive` is the driver's half, `work` what every rank does once the mesh stands.
"""

from __future__ import annotations

import contextlib
import secrets
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smolrun.checkpoints.keeper import Keeper
from smolrun.config import RunConfig, config_hash, world_size
from smolrun.events import Event, RunStarted
from smolrun.launch.control import Saving
from smolrun.launch.driver import Driver
from smolrun.launch.local import LocalHost
from smolrun.launch.moves import Outcome
from smolrun.launch.supervisor import Limits
from smolrun.tasks.before_start import check_before_start, check_model_fits
from smolrun.tasks.ending import unsaved, with_advice
from smolrun.tasks.going_on import Earlier, check_data, find_earlier, forget_undo, take_up
from smolrun.tasks.readers import more_readers, time_teller
from smolrun.tasks.streaming import open_reader, reader_state
from smolrun.tasks.workers import (
    OUTPUTS,
    become_latest,
    make_folder,
    nothing_started,
    plan_workers,
    prepare_data,
)
from smolrun.tracking.console import Console, clock, counted, printable, rate
from smolrun.tracking.jsonl import JsonLines
from smolrun.tracking.run_folder import RunFolder
from smolrun.tracking.run_record import RunRecord
from smolrun.tracking.tracker import Fanout, Tracker

if TYPE_CHECKING:
    from smolrun.data.prepared import Prepared
    from smolrun.data.stream import StreamReader
    from smolrun.launch.channel import WorkerChannel
    from smolrun.launch.control import StartMessage
    from smolrun.mesh.mesh import Mesh


def drive(config: RunConfig) -> int:
    """Train as configured; returns the exit code. ConfigError, DataError: nothing was started."""
    began = time.monotonic()
    check_before_start(config)
    if config.training.dry_run:
        from smolrun.tasks.dry_run_text import report  # loads torch

        return report(config)
    console = Console(steps=config.training.steps, world_size=world_size(config))
    with contextlib.ExitStack() as closing:
        closing.callback(console.close)
        run = _Run(config, console, closing)
        outcome = run.train()
        console.close()
        run.tell(outcome, time.monotonic() - began)
    return outcome.exit_code


class _Run:
    """One training run, as the driver sees it: everything is ready when it is made."""

    def __init__(self, config: RunConfig, console: Console, closing: contextlib.ExitStack) -> None:
        """Finds or makes data and folder; ConfigError, DataError: nothing was started. What it
        holds until the end of the run is given back when `closing` ends."""
        self._config = config
        self._console = console
        self._earlier = earlier = find_earlier(config, console.say, closing)
        self._prepared = prepare_data(config, console.preparing)
        check_model_fits(config, self._prepared.kind)
        self._rows = _reader(config, self._prepared, self._earlier, console)
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
                checkpoint=earlier.checkpoint.name,
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
            self._console.go_on(self._earlier.time_s)
            folder = self._earlier.folder
            self._undo = take_up(self._earlier, self._config, self._console.say)
        folder.write_driver(self._config.training.steps)
        return folder

    def train(self) -> Outcome:
        """Starts the ranks and hears them out; none is left when this returns or raises."""
        config, say = self._config, self._console.say
        ranks = counted(world_size(config), "rank")
        say(f"{self._folder.path}: starting {ranks}; {self._prepared.description}")
        readers: list[Tracker] = [self._metrics, self._console, self._record, self._times]
        trackers = Fanout([*readers, *more_readers(config, self._folder, say)], warn=say)
        keeper, saving = self._checkpoints(trackers.record)

        def listen(event: Event) -> None:
            if isinstance(event, RunStarted):
                self._has_begun()
            if not keeper.record(event):
                trackers.record(event)

        driver = Driver(
            plan_workers(config, self._folder, self._prepared, saving),
            lambda plan: LocalHost(),
            listen=listen,
            limits=_limits(config),
            rows=self._rows,
        )
        self._log_tail = driver.log_tail
        try:
            outcome = driver.run()
        finally:
            keeper.close()
            trackers.close()
            for act in reversed(self._undo):
                act()
        return with_advice(config, unsaved(outcome, keeper))

    def _has_begun(self) -> None:
        """From now on there is nothing to undo."""
        self._undo.clear()
        if self._earlier is not None:
            forget_undo(self._earlier)

    def _checkpoints(self, emit: Callable[[Event], None]) -> tuple[Keeper, Saving | None]:
        """Who makes checkpoints of what the ranks write, and what they are told about it."""
        config, token = self._config, secrets.token_hex(4)
        keeper = Keeper(
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
        )
        if not config.checkpoint.every and self._earlier is None:
            return keeper, None
        resume = str(self._earlier.checkpoint) if self._earlier else None
        return keeper, Saving(
            str(self._folder.checkpoints.absolute()),
            token,
            every=config.checkpoint.every,
            keep=config.checkpoint.keep,
            keep_best=config.checkpoint.keep_best,
            resume=resume,
        )

    def tell(self, outcome: Outcome, wall_s: float) -> None:
        """The summary, and the last lines."""
        self._write_summary(outcome, wall_s)
        record, say = self._record, self._console.say
        figures = [f"{counted(record.steps, 'step')} in {clock(wall_s)}"]
        if record.train_loss is not None:
            figures.append(f"loss {record.train_loss:.4f}")
        if record.eval_loss is not None:
            figures.append(f"evaluation loss {record.eval_loss:.4f}")
        if record.eval_accuracy is not None:
            figures.append(f"{record.eval_accuracy:.1%} right")
        if record.tokens_per_s is not None:
            figures.append(f"{rate(record.tokens_per_s)} {self._console.unit}/s")
        reason = f" ({outcome.reason})" if outcome.status == "stopped" else ""
        say(f"{outcome.status}{reason}: {', '.join(figures)}")
        if self._times.line:
            say(self._times.line)
        if record.sample is not None:
            say(f"a sample:\n{record.sample.prompt}{record.sample.text}")
        if record.divergence:
            say(f"the run diverged: {record.divergence}; a lower optimizer.lr may help")
        say(f"everything about this run: {self._folder.path}")
        if outcome.status == "stopped":
            command = f"smolrun checkpoint.resume={self._resume_name()}"
            say(f"go on with: {command}" if record.checkpoint else "nothing was saved")
        if outcome.status == "failed":
            with contextlib.suppress(OSError):  # nobody reads it
                self._complain(outcome)

    def _resume_name(self) -> str:
        """How a person names this run: by its name alone where it lies in the usual place."""
        is_here = self._folder.path.parent.resolve() == OUTPUTS.resolve()
        return self._folder.run_id if is_here else str(self._folder.path)

    def _write_summary(self, outcome: Outcome, wall_s: float) -> None:
        config = self._config
        summary = self._record.summary(
            status=outcome.status,
            reason=outcome.reason,
            failed_rank=outcome.failed_rank,
            failed_host=outcome.failed_host,
            wall_s=wall_s,
            world_size=world_size(config),
            algorithm=config.algorithm.name,
            config_hash=config_hash(config),
            versions=outcome.versions,
            time=self._times.summary(),
            peak_memory_bytes=[
                outcome.summaries.get(rank, {}).get("peak_memory_bytes")
                for rank in range(world_size(config))
            ],
        )
        try:
            self._folder.write_summary(summary)
        except OSError as error:
            where = self._folder.path
            print(f"smolrun: cannot write the summary of {where}: {error}", file=sys.stderr)

    def _complain(self, outcome: Outcome) -> None:
        """Why the run failed, and the last lines of the log of the rank that broke it."""
        print(printable(f"smolrun: {outcome.reason}"), file=sys.stderr)
        failed = outcome.failed_rank
        for line in self._log_tail(failed) if failed is not None else []:
            print(printable(f"  | {line}"), file=sys.stderr)
        if self._record.checkpoint is not None:
            command = f"smolrun checkpoint.resume={self._resume_name()}"
            print(f"smolrun: to go on after {self._record.checkpoint}: {command}", file=sys.stderr)


def _limits(config: RunConfig) -> Limits:
    """How long to wait. A disk may be as slow as a peer: saving takes part in an end."""
    wait_s = config.mesh.timeout_s
    return Limits(
        start_s=config.cluster.start_timeout_s, finish_s=2 * wait_s, stop_s=max(120.0, 2 * wait_s)
    )


def _reader(
    config: RunConfig, prepared: Prepared, earlier: Earlier | None, console: Console
) -> StreamReader | None:
    """The reader of the stream, where the data is one and the run goes on."""
    if earlier is None:
        return open_reader(config, prepared, console.preparing)
    return open_reader(
        config,
        prepared,
        console.preparing,
        updates=earlier.updates,
        driver_state=earlier.driver_state,
    )


def work(start: StartMessage, mesh: Mesh, channel: WorkerChannel) -> dict[str, Any]:
    """What one rank does between a mesh that stands and its result; returns its summary."""
    from smolrun.data.prepared import Prepared
    from smolrun.tasks.train_rank import pick_device, train

    return train(
        start.config,
        Prepared.from_json(start.prepared or {}),
        mesh,
        device=pick_device(start.device),
        speeds=[1.0] * start.world_size,
        emit=channel.emit,
        should_stop=channel.stop_requested.is_set,
        saving=start.saving,
        rows=channel.rows,
    )
