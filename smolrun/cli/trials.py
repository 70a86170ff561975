"""Hydra's multirun, in a process of its own, and its jobs: see multirun.py.

A launcher may run `run_trial` in this process, in others, or on other machines that share the
folder of the sweep. Exceptions of a job are what a sweeper knows as a failed trial.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from smolrun.cli import choices, compose
from smolrun.cli.arguments import Arguments, for_hydra, verbatim
from smolrun.cli.run import checked
from smolrun.cli.sweep import written
from smolrun.comparison.run_figures import read_run
from smolrun.comparison.verdict import METRICS, value
from smolrun.errors import ConfigError, SmolrunError
from smolrun.launch.driver import InterruptCounter
from smolrun.launch.supervisor_events import EXIT_BAD_CONFIG, EXIT_DONE, EXIT_FAILED, EXIT_STOPPED
from smolrun.sanitize import echo, one_line
from smolrun.sweep.plan import free_name
from smolrun.sweep.runner import run_job
from smolrun.tracking.run_folder import RunFolder
from smolrun.tracking.sweep_folder import MOST_JOBS, SweepFolder, SweepJob, SweepRecord, version

_DIGITS = ".4g"  # of a drawn value, in names and tables


class Order(msgspec.Struct, frozen=True):
    """The first line of stdin. `overrides` are as typed, `folder` is the sweep's."""

    overrides: list[str]
    config_dir: str | None
    config_name: str
    folder: str
    started: str
    metric: str
    fail_fast: bool

    @property
    def sweep(self) -> SweepFolder:
        """Its folder."""
        return SweepFolder(Path(self.folder))

    def arguments(self, overrides: Sequence[str], *, is_sweep: bool = False) -> Arguments:
        """These overrides, with the flags that were typed."""
        config_dir = Path(self.config_dir) if self.config_dir is not None else None
        return Arguments(list(overrides), is_sweep, config_dir, self.config_name)


def main() -> int:
    """Run the multirun that stdin describes; returns the exit code."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        order = msgspec.json.decode(sys.stdin.buffer.readline(), type=Order)
    except ValueError as error:
        echo(f"smolrun: the order over stdin cannot be used: {error}", error=True)
        return EXIT_BAD_CONFIG
    watch = threading.Thread(
        target=_stop_with_stdin, args=(order.sweep.run,), name="smolrun-multirun", daemon=True
    )
    watch.start()
    try:
        with compose.composing(order.arguments(order.overrides)):
            _multirun(order)
    except KeyboardInterrupt:
        return EXIT_STOPPED
    except Exception as error:  # plugins are other people's code
        traceback.print_exc()
        echo(f"smolrun: {_sentence(error)}", error=True)
        return EXIT_FAILED
    return EXIT_DONE


def _stop_with_stdin(sweep: RunFolder) -> None:
    """The process in the terminal has died: a stop request, as by its Ctrl-C."""
    while os.read(0, 4096):
        pass
    with contextlib.suppress(OSError):
        sweep.ask_to_stop()


def _sentence(error: Exception) -> str:
    if isinstance(error, SmolrunError):
        return str(error)
    return f"Hydra's multirun ended with {type(error).__name__}: {one_line(str(error))}"


def _multirun(order: Order) -> None:
    arguments = order.arguments(order.overrides, is_sweep=True)
    base = compose.base(arguments)
    hydra = GlobalHydra.instance().hydra
    assert hydra is not None
    overrides = [
        *_swept_by_name(
            for_hydra(order.overrides, choices.groups(compose.folders(arguments))), base
        ),
        f"hydra.sweep.dir={verbatim(order.folder)}",
        "hydra.sweep.subdir=.",
        "hydra.job.chdir=false",
    ]
    # As for grids: a job that fails does not end the sweep.
    if OmegaConf.select(base.hydra.sweeper, "max_failure_rate") is not None:
        is_typed = any("hydra.sweeper.max_failure_rate" in line for line in overrides)
        if not order.fail_fast and not is_typed:
            overrides.append("hydra.sweeper.max_failure_rate=1.0")
    recorders: list[RecordingLauncher] = []

    def recorded(launcher: Launcher) -> RecordingLauncher:
        recorders.append(RecordingLauncher(launcher, order, overrides))
        return recorders[-1]

    with _every_launcher(recorded):
        try:
            hydra.multirun(order.config_name, functools.partial(run_trial, order), overrides)
        except Exception as error:
            for recorder in recorders:  # what a sweeper makes of it says less
                if recorder.only_failures:
                    raise SmolrunError(recorder.only_failures) from error
            raise


def _swept_by_name(overrides: Sequence[str], base: DictConfig) -> list[str]:
    """Without the `++` of keys that are swept and are there: sweepers show the names, and store
    them."""
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    return [
        line.removeprefix("++")
        if item.is_sweep_override() and _has(base, item.key_or_group)
        else line
        for line, item in zip(overrides, parsed, strict=True)
    ]


def _has(base: DictConfig, key: str) -> bool:
    return OmegaConf.select(base, key, default=base) is not base


@contextlib.contextmanager
def _every_launcher(change: Callable[[Launcher], Launcher]) -> Iterator[None]:
    """Within it, sweepers get `change(launcher)`. Hydra has nothing else between the two that runs
    in their process."""
    instantiate = Plugins.instantiate_launcher

    def changed(*given: Any, **named: Any) -> Launcher:
        return change(instantiate(*given, **named))

    Plugins.instantiate_launcher = changed  # type: ignore[method-assign]
    try:
        yield
    finally:
        Plugins.instantiate_launcher = instantiate  # type: ignore[method-assign]


class RecordingLauncher(Launcher):
    """A launcher that has jobs in sweep.yaml before it lets another one launch them."""

    def __init__(self, launcher: Launcher, order: Order, overrides: Sequence[str]) -> None:
        """`overrides` are those that Hydra got."""
        self._launcher = launcher
        self._order = order
        self._jobs: list[SweepJob] = []
        self._cells: dict[tuple[str, ...], int] = {}  # overrides without the seed
        self._failures: list[str] = []
        items = OverridesParser.create().parse_overrides(list(overrides))
        # Sweepers write a value in their own way: 1e-3 as 0.001.
        self._typed = {
            (item.get_key_element().lstrip("+"), value)
            for item in items
            if not item.is_sweep_override()
            for value in (str(item.input_line).partition("=")[2], item.get_value_element_as_str())
        }

    @property
    def only_failures(self) -> str:
        """A sentence if there were jobs, and none has a metric."""
        if not self._failures or len(self._failures) < len(self._jobs):
            return ""
        return f"no job has a {self._order.metric}; the last one: {self._failures[-1]}"

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """The other launcher has been set up."""

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Their results. KeyboardInterrupt where the sweep was asked to stop, SmolrunError where a
        job failed and `sweep.fail_fast` is on."""
        self._stop_if_asked()
        first = len(self._jobs)  # by it, a job finds itself in sweep.yaml
        for overrides in job_overrides:
            self._jobs.append(self._job([line.removeprefix("++") for line in overrides]))
        if len(self._jobs) > MOST_JOBS:
            raise SmolrunError(f"a sweep may have {MOST_JOBS:,} jobs, and the sweeper wants more")
        self._write()
        returns = self._launcher.launch(job_overrides, first)
        for done in returns:
            if done.status is not JobStatus.COMPLETED:
                self._failures.append(one_line(str(done._return_value)))
        self._stop_if_asked()
        failed = [job.name for job in self._jobs if has_failed(self._order.sweep, job)]
        if self._order.fail_fast and failed:
            raise SmolrunError(f"{failed[0]} failed, and sweep.fail_fast ends the sweep")
        return returns

    def _stop_if_asked(self) -> None:
        if self._order.sweep.run.stop_requests():
            raise KeyboardInterrupt

    def _job(self, overrides: list[str]) -> SweepJob:
        for line in overrides:
            try:
                is_one_value = not OverridesParser.create().parse_override(line).is_sweep_override()
            except HydraException:
                is_one_value = False
            if not is_one_value:
                raise SmolrunError(f"the sweeper wants a job with {one_line(line)}: not one value")
        values = [line.partition("=") for line in overrides]
        differs = {
            key: _shortened(value)
            for key, _, value in values
            if (key, value) not in self._typed and not key.startswith("hydra.")
        }
        name = free_name(differs, [job.name for job in self._jobs])
        unseeded = tuple(line for line in overrides if not line.startswith("seed="))
        cell = self._cells.setdefault(unseeded, len(self._cells))
        repeat = sum(job.cell == cell for job in self._jobs)
        return SweepJob(name, overrides, differs, cell, repeat)

    def _write(self) -> None:
        order = self._order
        record = SweepRecord(
            id=order.sweep.path.name,
            version=version(),
            started=order.started,
            overrides=order.overrides,
            metric=order.metric,
            jobs=self._jobs,
        )
        order.sweep.write(record)


def _shortened(value: str) -> str:
    """A drawn number with the digits that people read."""
    try:
        return value if len(value) < 8 else f"{float(value):{_DIGITS}}"
    except ValueError:
        return value


def run_trial(order: Order, _: DictConfig) -> float:
    """Run one job to its end, in the launcher's process; returns its metric.

    SmolrunError for a job that failed, was stopped or never started, and for a metric that is not
    a finite number: sweepers call these failed trials.
    """
    sweep = order.sweep
    jobs = sweep.record().jobs
    job = jobs[int(HydraConfig.get().job.num)]
    folder = sweep.job(job.name)
    if sweep.run.stop_requests():
        raise SmolrunError(f"{job.name}: not started, as the sweep was stopped")
    if order.fail_fast and any(has_failed(sweep, one) for one in jobs):
        raise SmolrunError(f"{job.name}: not started, as another job failed (sweep.fail_fast)")
    arguments = order.arguments(job.overrides)
    # Most launchers bring Hydra's state into their processes.
    is_ready = GlobalHydra.instance().is_initialized()
    try:
        with contextlib.nullcontext() if is_ready else compose.composing(arguments):
            ready = written(sweep, job, checked(arguments))
    except ConfigError as error:
        reason = "; ".join(error.problems)
        folder.path.mkdir(exist_ok=True)
        folder.write_summary({"status": "failed", "exit_code": EXIT_BAD_CONFIG, "reason": reason})
        raise SmolrunError(f"{job.name}: {reason}") from None
    interrupts = InterruptCounter()  # a launcher may end its processes by a signal
    with interrupts.installed():
        status = run_job(folder, ready, lambda: interrupts.count + sweep.run.stop_requests())
    if status != "done":
        raise SmolrunError(f"{job.name}: {status}: {folder.summary().get('reason')}")
    if (found := figure(folder, order.metric)) is None:
        raise SmolrunError(f"{job.name}: done, but its {order.metric} is not a number")
    return found


def has_failed(sweep: SweepFolder, job: SweepJob) -> bool:
    """Whether a job has ended so."""
    return sweep.job(job.name).summary().get("status") == "failed"


def figure(folder: RunFolder, metric: str) -> float | None:
    """A run's figure as a comparison has it; None if it is not a finite number."""
    found = next(value(one, read_run(folder), None) for one in METRICS if one.key == metric)
    return found if found is not None and math.isfinite(found) else None
