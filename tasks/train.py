"""task=train: prepare the data, start one worker per rank, watch, and tell how it ended.

`drive` is the driver's half, `work` what every rank does once the mesh stands.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import platformdirs

from smolrun.config import RankPlan, RunConfig, config_hash, ranks, resolved, world_size
from smolrun.errors import ConfigError
from smolrun.launch.control import StartMessage
from smolrun.launch.driver import Driver
from smolrun.launch.hosts import WorkerPlan
from smolrun.launch.local import LocalHost
from smolrun.launch.moves import Outcome
from smolrun.launch.supervisor import Limits
from smolrun.tracking.console import Console, clock, printable
from smolrun.tracking.jsonl import JsonLines
from smolrun.tracking.run_folder import RunFolder
from smolrun.tracking.run_record import RunRecord
from smolrun.tracking.tracker import Fanout

if TYPE_CHECKING:
    from smolrun.data.prepared import Prepared
    from smolrun.launch.channel import WorkerChannel
    from smolrun.mesh.mesh import Mesh

OUTPUTS = Path("outputs")  # below the folder you are in; every run writes here and only here


def drive(config: RunConfig) -> int:
    """Train as configured; returns the exit code. ConfigError, DataError: nothing was started."""
    began = time.monotonic()
    console = Console(steps=config.training.steps, world_size=world_size(config))
    record = RunRecord()
    try:
        prepared = _prepare(config, console.preparing)
        with _nothing_started():
            folder = _make_folder(config, prepared)
            metrics = JsonLines(folder.metrics)
        _become_latest(folder, console)
        console.say(f"{folder.path}: starting {world_size(config)} ranks; {prepared.description}")
        trackers = Fanout([metrics, console, record], warn=console.say)
        driver = Driver(
            _plans(config, prepared, folder),
            lambda plan: LocalHost(),
            listen=trackers.record,
            limits=Limits(start_s=config.cluster.start_timeout_s, finish_s=config.mesh.timeout_s),
        )
        try:
            outcome = driver.run()
        finally:
            trackers.close()
    finally:
        console.close()
    wall_s = time.monotonic() - began
    _write_summary(config, folder, record, outcome, wall_s)
    _tell(console, folder, record, outcome, wall_s)
    if outcome.failed_rank is not None:
        with contextlib.suppress(OSError):  # nobody reads it
            _complain(outcome, driver.log_tail(outcome.failed_rank))
    return outcome.exit_code


def work(start: StartMessage, mesh: Mesh, channel: WorkerChannel) -> dict[str, Any]:
    """What one rank does between a mesh that stands and its result; returns its summary."""
    import torch

    from smolrun.data.prepared import Prepared
    from smolrun.tasks.train_rank import train

    device = start.device
    if device == "auto":
        device = (
            "cuda"
            if torch.cuda.is_available()
            else "mps"
            if torch.backends.mps.is_available()
            else "cpu"
        )
    return train(
        start.config,
        Prepared.from_json(start.prepared or {}),
        mesh,
        device=device,
        speeds=[1.0] * start.world_size,
        emit=channel.emit,
        should_stop=channel.stop_requested.is_set,
    )


def _prepare(config: RunConfig, progress: Callable[[str, int, int], None]) -> Prepared:
    """Make the data ready on this machine, or find it ready."""
    cache = platformdirs.user_cache_path("smolrun") / "data"
    data = load_target(config.data.target)(cache, **config.data.keywords())
    prepared: Prepared = data.prepare(progress)
    return prepared


def load_target(path: str) -> Any:
    """What `module:name` names; ConfigError with the reason where there is no such thing."""
    module, _, name = path.partition(":")
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"cannot load {path}: {error}") from error


@contextlib.contextmanager
def _nothing_started() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"cannot write to {OUTPUTS.absolute()}: {error}") from error


def _make_folder(config: RunConfig, prepared: Prepared) -> RunFolder:
    title = config.run_name or f"{config.algorithm.name}-{config.model.name}"
    folder = RunFolder.create(OUTPUTS, title, now=datetime.now())
    folder.write_config(msgspec.yaml.encode(resolved(config)).decode())
    if prepared.tokenizer is not None:
        folder.keep_tokenizer(Path(prepared.tokenizer))
    return folder


def _become_latest(folder: RunFolder, console: Console) -> None:
    try:
        folder.become_latest()
    except OSError as error:
        console.say(f"warning: {OUTPUTS}/latest still points to an older run: {error}")


def _plans(config: RunConfig, prepared: Prepared, folder: RunFolder) -> list[WorkerPlan]:
    """One worker per rank. The secret is made here and goes nowhere but into the workers' stdin."""
    plain, digest, secret = resolved(config), config_hash(config), secrets.token_hex(32)
    return [
        WorkerPlan(
            StartMessage(
                rank=rank.rank,
                world_size=world_size(config),
                host=rank.host,
                run_id=folder.run_id,
                config=plain,
                config_hash=digest,
                secret=secret,
                address=rank.address,
                device=rank.device,
                threads=_threads(rank),
                prepared=prepared.to_json(),
            ),
            folder.log(rank.rank, rank.host),
        )
        for rank in ranks(config)
    ]


def _threads(rank: RankPlan) -> int:
    """Torch threads of one rank: the usable cores, shared by the ranks of the host."""
    if rank.threads != "auto":
        return rank.threads
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    return max(1, cores // rank.local_world_size)


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
    figures = [f"{record.steps} steps in {clock(wall_s)}"]
    if record.train_loss is not None:
        figures.append(f"loss {record.train_loss:.4f}")
    if record.eval_loss is not None:
        figures.append(f"evaluation loss {record.eval_loss:.4f}")
    if record.tokens_per_s is not None:
        figures.append(f"{record.tokens_per_s:,.0f} tokens/s")
    reason = f" ({outcome.reason})" if outcome.status == "stopped" else ""
    console.say(f"{outcome.status}{reason}: {', '.join(figures)}")
    if record.sample is not None:
        console.say(f"a sample:\n{record.sample.prompt}{record.sample.text}")
    console.say(f"everything about this run: {folder.path}")


def _complain(outcome: Outcome, log_tail: list[str]) -> None:
    """Why the run failed, and the last lines of the log of the rank that broke it."""
    print(printable(f"smolrun: {outcome.reason}"), file=sys.stderr)
    for line in log_tail:
        print(printable(f"  | {line}"), file=sys.stderr)
