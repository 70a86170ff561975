"""`smolrun -m`: from the checked jobs of a grid to a sweep, and from a stopped sweep to its rest.

Jobs that train get run folders below outputs/sweeps/; jobs of other tasks, and dry runs, run one
after another on this terminal.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib import import_module

import msgspec

from smolrun.config import RunConfig, redacted, resolved
from smolrun.config.suggest import problem
from smolrun.driver.outputs import nothing_started
from smolrun.errors import ConfigError
from smolrun.sanitize import echo, one_line
from smolrun.sweep.plan import plan, title
from smolrun.sweep.runner import ReadyJob, SweepRunner
from smolrun.sweep.table import SweepConsole, SweepProgress, label
from smolrun.tracking.formatting import counted
from smolrun.tracking.run_folder import OUTPUTS, RunFolder
from smolrun.tracking.sweep_folder import (
    MOST_JOBS,
    SWEEPS,
    JobView,
    SweepFolder,
    SweepJob,
    SweepRecord,
    version,
)

STOPPED = (130, 131)
FAILED = 3


@dataclass(frozen=True)
class Sweep:
    """A sweep whose folder is written and whose jobs can start."""

    folder: SweepFolder
    record: SweepRecord
    jobs: Sequence[ReadyJob]
    fail_fast: bool


def new_sweep(
    typed: Sequence[str], cells: Sequence[Sequence[str]], configs: Sequence[RunConfig]
) -> Sweep:
    """Write the folder of a new sweep; ConfigError where that cannot be."""
    first = configs[0].sweep
    if any(config.sweep != first for config in configs):
        raise ConfigError("keys of `sweep` are about all jobs, so -m cannot vary them")
    if len(cells) * first.repeats > MOST_JOBS:
        number = counted(len(cells) * first.repeats, "job")
        raise ConfigError(f"{number} are more than a sweep may have: {MOST_JOBS:,}")
    jobs = plan(cells, [config.seed for config in configs], first.repeats)
    if first.repeats > 1 and "seed" in plan(cells, [], 1)[0].differs:
        what = "seed has several values already; every repeat has a seed of its own"
        raise ConfigError(problem("sweep.repeats", first.repeats, what))
    with nothing_started():
        name = configs[0].run_name or title(jobs)
        path = RunFolder.create(OUTPUTS / SWEEPS, name, now=datetime.now()).path
        folder = SweepFolder(path)
        folder.run.logs.rmdir()  # of ranks; a sweep has none
        record = SweepRecord(
            id=path.name,
            version=version(),
            started=datetime.now().astimezone().isoformat(timespec="seconds"),
            overrides=list(typed),
            metric=first.metric,
            jobs=jobs,
        )
        ready = [_written(folder, job, configs[job.pair]) for job in jobs]
        folder.write(record)
    return Sweep(folder, record, ready, first.fail_fast)


def _written(folder: SweepFolder, job: SweepJob, config: RunConfig) -> ReadyJob:
    """The job's configuration, in its run folder and for its process. It is there from the
    beginning: what is edited while the sweep runs changes none of its jobs."""
    config = config.model_copy(update={"detach": False})
    if (seed := job.differs.get("seed")) is not None:
        config = config.model_copy(update={"seed": int(seed)})
    if config.tracker.kind == "wandb" and config.tracker.group is None:
        grouped = config.tracker.model_copy(update={"group": folder.path.name})
        config = config.model_copy(update={"tracker": grouped})
    run = folder.job(job.name)
    run.path.mkdir()
    run.write_config(msgspec.yaml.encode(redacted(config)).decode())
    return ready_job(run, config)


def ready_job(run: RunFolder, config: RunConfig) -> ReadyJob:
    """What the job's process gets."""
    order = {"config": resolved(config), "folder": str(run.path)}
    return ReadyJob(run.path.name, msgspec.json.encode(order))


def run_sweep(sweep: Sweep) -> int:
    """Run the jobs of a sweep; returns its exit code."""
    folder, record = sweep.folder, sweep.record
    run = folder.run
    run.become_latest()
    echo(f"sweep {record.id}: {counted(len(record.jobs), 'job')} in {folder.path}")
    run.write_driver(len(record.jobs), unit="jobs")
    progress = SweepProgress(folder, record)
    console = SweepConsole(progress)
    try:
        runner = SweepRunner(folder, progress, console, fail_fast=sweep.fail_fast)
        code = runner.run(sweep.jobs)
        console.show(progress.look(is_alive=False), is_last=True)
    finally:
        console.close()
    _compare(folder)
    _report(folder, progress.look(is_alive=False), code)
    return code


def _report(folder: SweepFolder, views: Sequence[JobView], code: int) -> None:
    """The last lines: what failed and why, and how to go on."""
    failed = [view for view in views if view.state == "failed"]
    if failed:
        echo(f"smolrun: {len(failed)} of {counted(len(views), 'job')} failed:", error=True)
    for view in failed:
        log = folder.job(view.job.name).driver_log
        echo(f"  {label(view)}: {one_line(view.reason or 'unknown')}; log: {log}", error=True)
    if code != 0:
        left = sum(view.state != "done" for view in views)
        command = f"smolrun -m sweep.resume={folder.path.name}"
        echo(f"smolrun: to run the other {counted(left, 'job')}: {command}", error=True)


def _compare(folder: SweepFolder) -> None:
    """The comparison of what has ended, beside sweep.yaml."""
    try:
        compare = import_module("smolrun.comparison")
    except ImportError:
        return
    compare.compare_sweep(folder.path, say=echo)


def run_jobs(
    jobs: Sequence[Sequence[str]], flags: Sequence[str], start: Callable[[list[str]], int]
) -> int:
    """Run the jobs in turn and give back the worst exit code.

    A job that the user stopped ends the sweep.
    """
    worst = 0
    for number, overrides in enumerate(jobs, start=1):
        echo(f"smolrun: job {number} of {len(jobs)}: {' '.join(overrides)}", error=True)
        code = start([*flags, *overrides])
        worst = max(worst, code if code >= 0 else FAILED)
        if code in STOPPED:
            return code
    return worst


def start_job(arguments: list[str]) -> int:
    """One run in a new process; returns its exit code, or 130 when this process was asked to end.

    The terminal's Ctrl-C reaches the job too, which decides how to stop, so here it only means: go
    on waiting.
    """
    job: subprocess.Popen[bytes] | None = None
    is_ending = False

    def end(*_: object) -> None:
        nonlocal is_ending
        is_ending = True
        if job is not None:
            job.terminate()

    before = signal.signal(signal.SIGTERM, end)
    try:
        # -P: the folder we are in comes last on Python's path, as for the command `smolrun`.
        command = [sys.executable, "-P", "-m", "smolrun.cli", *arguments]
        job = subprocess.Popen(command)  # noqa: S603  (our own interpreter)
        if is_ending:
            job.terminate()
        code = _wait(job)
    finally:
        signal.signal(signal.SIGTERM, before)
    return STOPPED[0] if is_ending else code


def _wait(job: subprocess.Popen[bytes]) -> int:
    while True:
        try:
            return job.wait()
        except KeyboardInterrupt:
            continue
