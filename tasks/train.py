"""task=train: prepare the data, start one worker per rank, watch, and tell how it ended.

`drive` is the driver's half, `work` what every rank does once the mesh stands.
"""

from __future__ import annotations

import contextlib
import dataclasses
import secrets
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from smolrun.checkpoints.keeper import Keeper
from smolrun.config import RunConfig, config_hash, world_size
from smolrun.events import Event
from smolrun.launch.control import EXIT_FAILED, Saving
from smolrun.launch.driver import Driver
from smolrun.launch.local import LocalHost
from smolrun.launch.moves import Outcome
from smolrun.launch.supervisor import Limits
from smolrun.tasks.before_start import check_before_start
from smolrun.tasks.going_on import Earlier, check_data, find_earlier, take_up
from smolrun.tasks.workers import (
    become_latest,
    make_folder,
    nothing_started,
    plan_workers,
    prepare_data,
)
from smolrun.tracking.console import Console, clock, counted, printable
from smolrun.tracking.jsonl import JsonLines
from smolrun.tracking.run_folder import RunFolder
from smolrun.tracking.run_record import RunRecord
from smolrun.tracking.tracker import Fanout

if TYPE_CHECKING:
    from smolrun.data.prepared import Prepared
    from smolrun.launch.channel import WorkerChannel
    from smolrun.launch.control import StartMessage
    from smolrun.mesh.mesh import Mesh


def drive(config: RunConfig) -> int:
    """Train as configured; returns the exit code. ConfigError, DataError: nothing was started."""
    began = time.monotonic()
    check_before_start(config)
    console = Console(steps=config.training.steps, world_size=world_size(config))
    try:
        earlier = find_earlier(config, console.say)
        prepared = prepare_data(config, console.preparing)
        console.unit = "tokens" if prepared.sequence_length else "samples"
        with nothing_started():
            folder = _folder(config, prepared, earlier, console)
            metrics = JsonLines(folder.metrics)
        become_latest(folder, console.say)
        ranks = counted(world_size(config), "rank")
        console.say(f"{folder.path}: starting {ranks}; {prepared.description}")
        record = RunRecord(earlier.time_s if earlier else 0.0)
        trackers = Fanout([metrics, console, record], warn=console.say)
        saving, keeper = _checkpoints(config, folder, earlier, trackers.record)
        driver = Driver(
            plan_workers(config, folder, prepared, saving),
            lambda plan: LocalHost(),
            listen=lambda event: keeper.record(event) or trackers.record(event),
            limits=Limits(start_s=config.cluster.start_timeout_s, finish_s=config.mesh.timeout_s),
        )
        try:
            outcome = unsaved(driver.run(), keeper)
        finally:
            keeper.close()
            trackers.close()
    finally:
        console.close()
    wall_s = time.monotonic() - began
    _write_summary(config, folder, record, outcome, wall_s)
    _tell(console, folder, record, outcome, wall_s)
    if outcome.status == "failed":
        failed = outcome.failed_rank
        with contextlib.suppress(OSError):  # nobody reads it
            _complain(outcome, driver.log_tail(failed) if failed is not None else [])
    return outcome.exit_code


def _folder(
    config: RunConfig, prepared: Prepared, earlier: Earlier | None, console: Console
) -> RunFolder:
    """A fresh folder, or that of the run that goes on."""
    if earlier is None:
        title = f"{config.algorithm.name}-{config.model.name}"
        return make_folder(config, title, prepared.tokenizer)
    check_data(earlier, prepared.sha256)
    console.go_on(earlier.time_s)
    return take_up(earlier, config, console.say)


def _checkpoints(
    config: RunConfig,
    folder: RunFolder,
    earlier: Earlier | None,
    emit: Callable[[Event], None],
) -> tuple[Saving | None, Keeper]:
    """What the ranks are told about saving, and who makes checkpoints of what they write."""
    token = secrets.token_hex(4)
    keeper = Keeper(
        folder.checkpoints,
        token,
        world_size=world_size(config),
        run_id=folder.run_id,
        config_hash=config_hash(config),
        keep=config.checkpoint.keep,
        keep_best=config.checkpoint.keep_best,
        emit=emit,
    )
    if not config.checkpoint.every and earlier is None:
        return None, keeper
    resume = str(earlier.checkpoint) if earlier else None
    return Saving(str(folder.checkpoints.absolute()), token, resume), keeper


def unsaved(outcome: Outcome, keeper: Keeper) -> Outcome:
    """A run whose last checkpoint could not be written has failed, however well it trained."""
    if keeper.failure is None or outcome.status == "failed":
        return outcome
    return dataclasses.replace(
        outcome, status="failed", exit_code=EXIT_FAILED, reason=keeper.failure
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
    )


def _write_summary(
    config: RunConfig, folder: RunFolder, record: RunRecord, outcome: Outcome, wall_s: float
) -> None:
    summary = record.summary(
        status=outcome.status,
        reason=outcome.reason,
        failed_rank=outcome.failed_rank,
        failed_host=outcome.failed_host,
        wall_s=wall_s,
        world_size=world_size(config),
        algorithm=config.algorithm.name,
        config_hash=config_hash(config),
        versions=outcome.versions,
    )
    try:
        folder.write_summary(summary)
    except OSError as error:
        print(f"smolrun: cannot write the summary of {folder.path}: {error}", file=sys.stderr)


def _tell(
    console: Console, folder: RunFolder, record: RunRecord, outcome: Outcome, wall_s: float
) -> None:
    """The last lines of a run."""
    figures = [f"{counted(record.steps, 'step')} in {clock(wall_s)}"]
    if record.train_loss is not None:
        figures.append(f"loss {record.train_loss:.4f}")
    if record.eval_loss is not None:
        figures.append(f"evaluation loss {record.eval_loss:.4f}")
    if record.tokens_per_s is not None:
        figures.append(f"{record.tokens_per_s:,.0f} {console.unit}/s")
    reason = f" ({outcome.reason})" if outcome.status == "stopped" else ""
    console.say(f"{outcome.status}{reason}: {', '.join(figures)}")
    if record.sample is not None:
        console.say(f"a sample:\n{record.sample.prompt}{record.sample.text}")
    if record.divergence:
        console.say(f"the run diverged: {record.divergence}; a lower optimizer.lr may help")
    console.say(f"everything about this run: {folder.path}")


def _complain(outcome: Outcome, log_tail: list[str]) -> None:
    """Why the run failed, and the last lines of the log of the rank that broke it."""
    print(printable(f"smolrun: {outcome.reason}"), file=sys.stderr)
    for line in log_tail:
        print(printable(f"  | {line}"), file=sys.stderr)
