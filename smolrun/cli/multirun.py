"""`smolrun -m` with `hydra/launcher` or `hydra/sweeper`: Hydra's own multirun, whose jobs are ours.

    smolrun -m hydra/sweeper=optuna ...    checks, makes the sweep's folder, shows it, compares
      | stdin: `Order`, kept open
    smolrun --trials                       Hydra: the sweeper asks its launcher for jobs, which go
      |                                    into sweep.yaml first (trials.py)
    process of the launcher                `run_trial`: starts a job, waits, returns its metric
      | stdin
    smolrun --job                          the run

Only the first process is in the terminal's process group. It writes each Ctrl-C into the folder of
the sweep as a stop request, which `run_trial` passes on, wherever its launcher runs it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import datetime

import msgspec
from omegaconf import DictConfig, OmegaConf

from smolrun.checkpoints.run_names import SWEEPS
from smolrun.cli import compose
from smolrun.cli.arguments import Arguments
from smolrun.cli.sweep import NO_DASHBOARD, compare, end_sweep
from smolrun.cli.trials import Order, figure
from smolrun.comparison.verdict import METRICS
from smolrun.config import RunConfig
from smolrun.config.suggest import problem
from smolrun.driver.outputs import nothing_started
from smolrun.launch.driver import InterruptCounter
from smolrun.launch.supervisor_events import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_STOPPED,
    EXIT_STOPPED_NOW,
)
from smolrun.launch.wake import keep_awake
from smolrun.sanitize import echo
from smolrun.sweep.runner import last_words, launch
from smolrun.sweep.table import SweepConsole, SweepProgress, label
from smolrun.tracking.formatting import number
from smolrun.tracking.run_folder import OUTPUTS, RunFolder
from smolrun.tracking.sweep_folder import JobView, SweepFolder

COMMAND = [sys.executable, "-P", "-m", "smolrun.cli", "--trials"]
_POLL_S = 0.25
_ABORT_S = 30.0  # for jobs whose launcher has died


def probes(arguments: Arguments, base: DictConfig) -> list[list[str]]:
    """The overrides of jobs that together have every value: the first of each key, and then each
    other one alone.

    A sweeper combines them later, but what is wrong with a value is known now.
    """
    axes = compose.axes(arguments, base, is_grid=False)
    first = {key: lines[0] for key, lines in axes.items()}
    others = [{**first, key: line} for key, lines in axes.items() for line in lines[1:]]
    return [list(job.values()) for job in (first, *others)]


def problems(arguments: Arguments, base: DictConfig) -> Iterator[str]:
    """What cannot be together with a launcher or sweeper of Hydra's."""
    given = compose.plain(base)
    sweep = given.get("sweep") or {}
    for key, lines in compose.axes(arguments, base, is_grid=False).items():
        if key.startswith("sweep.") and lines[1:]:
            yield f"{key}: -m cannot vary it, as it is about all jobs"
    named = " ".join(f"{key}={name}" for key, name in compose.chosen_plugins(base).items())
    if given.get("task") != "train" or (given.get("training") or {}).get("dry_run") is True:
        yield f"{named}: only for runs that train, as the others have no sweep.metric"
    if given.get("detach") is True or given.get("driver") is not None:
        yield f"{named}: not with detach or driver"
    if given.get("console") == "dashboard":
        yield NO_DASHBOARD
    if sweep.get("repeats") not in (1, None):
        what = f"not with {named}, which decides how often a job runs"
        yield problem("sweep.repeats", sweep["repeats"], what, allowed="1")
    if sweep.get("resume") is not None:
        what = f"not with {named}, which decides which jobs run{_study(base)}"
        yield problem("sweep.resume", sweep["resume"], what, allowed="null")
    yield from _wrong_direction(base.hydra.sweeper, str(sweep.get("metric")))


def _study(base: DictConfig) -> str:
    """How a sweeper that can resume continues its study."""
    if "storage" not in base.hydra.sweeper:
        return ""
    keys = "hydra.sweeper.storage=sqlite:///FILE.db hydra.sweeper.study_name=NAME"
    return f"; a sweeper continues a study of its own: {keys}"


def _wrong_direction(sweeper: DictConfig, metric: str) -> Iterator[str]:
    """A sweeper that would look for the worst value, or for several."""
    found = directions(sweeper)
    is_more_better = any(one.key == metric and one.is_more_better for one in METRICS)
    better = "maximize" if is_more_better else "minimize"
    if len(found) > 1:
        yield f"hydra.sweeper.direction: {len(found)} directions, but sweep.metric is one figure"
    elif found and found[0] != better:
        size = "larger" if better == "maximize" else "smaller"
        yield problem(
            "hydra.sweeper.direction", found[0], f"a {size} {metric} is better", allowed=better
        )


def directions(sweeper: DictConfig) -> list[str]:
    """Whether a sweeper looks for the smallest value (minimize) or the largest; empty if its
    configuration does not say."""
    found = OmegaConf.select(sweeper, "direction")
    several = list(found) if OmegaConf.is_list(found) else [found]
    return [str(getattr(each, "name", each)).lower() for each in several if each is not None]


def drive(arguments: Arguments, base: DictConfig, config: RunConfig) -> int:
    """Run Hydra's multirun in a process of its own and show it; returns the exit code."""
    began = time.monotonic()
    chosen = [f"{key}={name}" for key, name in compose.chosen_plugins(base).items()]
    with nothing_started():
        name = config.run_name or _title(arguments, base)
        folder = SweepFolder(RunFolder.create(OUTPUTS / SWEEPS, name, now=datetime.now()).path)
        folder.run.logs.rmdir()  # of ranks; a sweep has none
        folder.run.claim()
        folder.run.become_latest()
        folder.run.write_driver(0, unit="jobs")
        log = folder.run.driver_log.open("ab")
    order = Order(
        # An experiment may have chosen them.
        [*(line for line in chosen if line not in arguments.overrides), *arguments.overrides],
        str(arguments.config_dir) if arguments.config_dir else None,
        arguments.config_name,
        str(folder.path),
        datetime.now().astimezone().isoformat(timespec="seconds"),
        config.sweep.metric,
        config.sweep.fail_fast,
    )
    echo(f"sweep {folder.path.name}: jobs by {' '.join(chosen)}")
    num_jobs = OmegaConf.select(base.hydra.sweeper, "n_trials")
    display = _Display(folder, num_jobs if isinstance(num_jobs, int) else 0)
    try:
        with log, keep_awake():
            code = _follow(launch(COMMAND, log.fileno()), order, folder, display)
    finally:
        display.close()
        # Hydra's copy of the configuration has the passwords in URLs of a cluster; ours has not.
        (folder.path / "multirun.yaml").unlink(missing_ok=True)
        folder.run.release()
    code = _exit_code(folder, display.views, code)
    compare(folder)
    for line in _best(folder, display.views, order.metric, directions(base.hydra.sweeper)):
        echo(line)
    end_sweep(folder, display.views, code, time.monotonic() - began, can_resume=False)
    return code


def _title(arguments: Arguments, base: DictConfig) -> str:
    """The plugins, and the keys that are swept."""
    axes = compose.axes(arguments, base, is_grid=False)
    keys = [key.rpartition(".")[2] for key, lines in axes.items() if lines[1:]]
    return "-".join([*compose.chosen_plugins(base).values(), *keys])[:60]


class _Display:
    """The live table of a sweep that gets new jobs while it runs."""

    def __init__(self, folder: SweepFolder, num_jobs: int) -> None:
        self.views: list[JobView] = []
        self._num_jobs = num_jobs
        self._folder = folder
        self._progress: SweepProgress | None = None
        self._console: SweepConsole | None = None
        self._written_ns = 0

    def show(self, *, is_last: bool = False) -> None:
        """Look at the jobs and draw them; nothing before the first is known."""
        self._read()
        if self._progress is not None and self._console is not None:
            self.views = self._progress.look(is_alive=not is_last)
            self._console.show(self.views, is_last=is_last)

    def say(self, text: str) -> None:
        """A line above the table."""
        if self._console is not None:
            self._console.say(text)
        else:
            echo(text)

    def close(self) -> None:
        """Leave the table as it is."""
        if self._console is not None:
            self._console.close()

    def _read(self) -> None:
        try:
            written_ns = self._folder.file.stat().st_mtime_ns
        except OSError:
            return
        if written_ns == self._written_ns:
            return
        self._written_ns = written_ns
        record = self._folder.record()
        if self._progress is None:
            self._progress = SweepProgress(self._folder, record)
            self._console = SweepConsole(self._progress, self._num_jobs)
        self._progress.record = record


def _follow(
    process: subprocess.Popen[bytes], order: Order, folder: SweepFolder, display: _Display
) -> int:
    """Until Hydra's process has ended, and its jobs with it; returns its exit code."""
    interrupts, sent = InterruptCounter(), 0
    stdin = process.stdin
    assert stdin is not None
    with interrupts.installed():
        with contextlib.suppress(OSError):  # it has died; its exit code says so
            stdin.write(msgspec.json.encode(order) + b"\n")
            stdin.flush()
        while process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_POLL_S)
            while sent < min(interrupts.count, 2):
                sent = folder.run.ask_to_stop()
                if sent == 1:
                    display.say("stopping the jobs at an agreed step; Ctrl-C again: at once")
            if interrupts.count > 2:
                process.kill()
            display.show()
        with contextlib.suppress(OSError):
            stdin.close()
        if process.returncode < 0:
            _end_jobs(folder, display)
            with contextlib.suppress(AttributeError, OSError):  # idle processes of its launcher
                os.killpg(process.pid, signal.SIGKILL)
        display.show(is_last=True)
    return process.returncode


def _end_jobs(folder: SweepFolder, display: _Display) -> None:
    """Hydra's process was killed, but processes of its launcher may live."""
    deadline = time.monotonic() + _ABORT_S
    folder.run.ask_to_stop()
    while any(folder.job(view.job.name).driver_lives() for view in display.views):
        if time.monotonic() > deadline:
            return
        time.sleep(_POLL_S)
        display.show()


def _exit_code(folder: SweepFolder, views: list[JobView], code: int) -> int:
    """The exit code of the sweep, and why, on the terminal, if Hydra's process has failed."""
    if code not in (EXIT_DONE, EXIT_STOPPED):
        echo(f"smolrun: {last_words(folder.run, code)}", error=True)
        echo(f"its output: {folder.run.driver_log}", error=True)
        return EXIT_FAILED
    if asked := folder.run.stop_requests():
        return EXIT_STOPPED if asked == 1 else EXIT_STOPPED_NOW
    return EXIT_FAILED if any(view.state != "done" for view in views) else EXIT_DONE


def _best(
    folder: SweepFolder, views: list[JobView], metric: str, looks_for: list[str]
) -> Iterator[str]:
    """The job with the best metric, and how to train longer with what it had."""
    found = [(figure(folder.job(view.job.name), metric), view) for view in views]
    known = [(value, view) for value, view in found if value is not None and view.state == "done"]
    if not known or not looks_for:
        return
    choose = max if looks_for == ["maximize"] else min
    value, view = choose(known, key=lambda pair: pair[0])
    yield f"best {metric}: {number(value)}, of {label(view)} ({len(known)} of {len(views)} jobs)"
    typed = [line for line in view.job.overrides if line.partition("=")[0] in view.job.differs]
    yield f"its values: {' '.join(typed)}"
