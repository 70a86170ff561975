"""Runs the jobs of a sweep in turn, each in a process of its own.

    sweep's process                                 a job: smolrun --job
      | -- its configuration and folder, over stdin ---> |  prepares data, starts its ranks
      |    (stdout and stderr go to driver.log) -------- |  trains
      | -- a line `stop` for each Ctrl-C --------------> |  stops, saved; the second: at once
      X    the end of stdin ---------------------------> |  the same as one Ctrl-C

A job has no terminal and a process group of its own: a Ctrl-C reaches the sweep alone. If the
sweep's process dies in whatever way, its job's stdin ends, so no job is left behind.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from smolrun.launch.driver import InterruptCounter
from smolrun.launch.supervisor_events import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, EXIT_STOPPED_NOW
from smolrun.sanitize import one_line
from smolrun.sweep.table import SweepConsole, SweepProgress
from smolrun.tracking.run_folder import RunFolder
from smolrun.tracking.sweep_folder import ENDED, SweepFolder

COMMAND = [sys.executable, "-P", "-m", "smolrun.cli", "--job"]
_POLL_S = 0.25
_ABORT_S = 30.0  # for a job that was asked to end at once
_KILL_S = 30.0  # for the system to end a killed process
_TAIL_BYTES = 64 << 10
_NO_STEP = "made_no_step"  # a key that the sweep adds to summary.json of a failed job


@dataclass(frozen=True)
class ReadyJob:
    """A job that can start: its name, and what its process reads from stdin, a line of JSON.
    `config`: config.yaml of a job that starts over; its earlier folder is renamed."""

    name: str
    order: bytes
    config: str | None = None


class SweepRunner:
    """Runs jobs until all have ended or the user stops the sweep."""

    def __init__(
        self,
        folder: SweepFolder,
        progress: SweepProgress,
        console: SweepConsole,
        *,
        fail_fast: bool,
    ) -> None:
        self._folder = folder
        self._progress = progress
        self._console = console
        self._fail_fast = fail_fast
        self._interrupts = InterruptCounter()
        self._has_said = False

    def run(self, jobs: Sequence[ReadyJob]) -> int:
        """The exit code of the sweep; OSError if its files cannot be written. No job is left."""
        self._console.show(self._progress.look())
        with self._interrupts.installed():
            for job in jobs:
                status = self._run_job(job)
                if self._asked():
                    return EXIT_STOPPED if self._asked() == 1 else EXIT_STOPPED_NOW
                if status == "failed" and self._fail_fast:
                    break
        states = {view.state for view in self._progress.look()}
        return (
            EXIT_FAILED
            if "failed" in states
            else EXIT_STOPPED
            if "stopped" in states
            else EXIT_DONE
        )

    def _asked(self) -> int:
        return self._interrupts.count + self._folder.run.stop_requests()

    def _run_job(self, job: ReadyJob) -> str:
        if self._asked():
            return "waiting"
        self._make_ready(job)
        self._console.show(self._progress.look())
        status = run_job(self._folder.job(job.name), job, self._asked, self._while_it_runs)
        self._console.show(self._progress.look())
        return status

    def _make_ready(self, job: ReadyJob) -> None:
        """The folder of a job that was started before is as if it had not been."""
        folder = self._folder.job(job.name)
        if job.config is not None:
            numbers = (f".{job.name}.{number}" for number in itertools.count(1))
            aside = next(name for name in numbers if not (self._folder.path / name).exists())
            folder.path.rename(self._folder.path / aside)
            folder.path.mkdir()
            folder.write_config(job.config)
            self._console.say(f"{job.name} runs again; its earlier files are in {aside}")
        # Of a job that resumes: this one is of its earlier end.
        (folder.path / "summary.json").unlink(missing_ok=True)
        folder.driver_log.touch()  # now it is not waiting any more

    def _while_it_runs(self) -> None:
        if self._asked() == 1 and not self._has_said:
            self._has_said = True
            self._console.say("stopping the job at the next agreed step; Ctrl-C again: at once")
        if self._console.is_due:
            self._console.show(self._progress.look())


def run_job(
    folder: RunFolder,
    job: ReadyJob,
    asked: Callable[[], int],
    meanwhile: Callable[[], None] = lambda: None,
) -> str:
    """Run a job to its end; returns the status in its summary.json. `asked()` is the number of
    stop requests, `meanwhile` is called four times a second. No process of it is left."""
    before = _size(folder.metrics)
    with folder.driver_log.open("ab") as log:
        process = launch(COMMAND, log.fileno())
    try:
        _write(process, job.order + b"\n")
        _wait_for(process, asked, meanwhile)
    finally:
        _end(process)
    status = _ended(folder, process.returncode, is_stopped=asked() > 0)
    if status == "failed" and _size(folder.metrics) == before:
        with contextlib.suppress(OSError):
            folder.write_summary({**folder.summary(), _NO_STEP: True})
    return status


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def made_no_step(folder: RunFolder) -> bool:
    """Whether the last start of a job has failed before it trained, so that its files are as they
    were."""
    return folder.summary().get(_NO_STEP) is True


def _wait_for(
    process: subprocess.Popen[bytes], asked: Callable[[], int], meanwhile: Callable[[], None]
) -> None:
    """Until the job has ended, and pass stop requests on."""
    sent, give_up = 0, float("inf")
    while time.monotonic() < give_up:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_POLL_S)
            return
        while sent < min(asked(), 2):
            sent += 1
            _write(process, b"stop\n")
            if sent == 2:
                give_up = time.monotonic() + _ABORT_S
        meanwhile()


def _write(process: subprocess.Popen[bytes], data: bytes) -> None:
    with contextlib.suppress(OSError):  # it has died; its exit code says so
        assert process.stdin is not None
        process.stdin.write(data)
        process.stdin.flush()


def launch(command: Sequence[str], output: int) -> subprocess.Popen[bytes]:
    """A process in a process group of its own, stdin piped; both its outputs go to `output`."""
    return subprocess.Popen(  # noqa: S603  (our own interpreter)
        command,
        stdin=subprocess.PIPE,
        stdout=output,
        stderr=output,
        start_new_session=hasattr(os, "setsid"),
        creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
    )


def _end(process: subprocess.Popen[bytes]) -> None:
    """The process is gone, and so are its ranks: they live only as long as it does."""
    with contextlib.suppress(OSError):
        assert process.stdin is not None
        process.stdin.close()
    if process.poll() is None:
        process.kill()
        process.wait(_KILL_S)


def _ended(folder: RunFolder, code: int, *, is_stopped: bool) -> str:
    """The status in the job's summary.json; one that ended without it gets it here."""
    status = folder.summary().get("status")
    if status in ENDED:
        return str(status)
    is_stopped = is_stopped or code in (EXIT_STOPPED, EXIT_STOPPED_NOW)
    status = "stopped" if is_stopped else "failed"
    reason = (
        "stopped by the user before it could save"
        if status == "stopped"
        else last_words(folder, code)
    )
    with contextlib.suppress(OSError):  # the disk is full: the next look finds a job without an end
        folder.write_summary({"status": status, "exit_code": EXIT_FAILED, "reason": reason})
    return status


def last_words(folder: RunFolder, code: int) -> str:
    """Why a job without a summary has failed: the signal that killed it, or its last words."""
    if code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else str(-code)
        memory = "; out of memory?" if name == "SIGKILL" else ""
        return f"killed: its process was ended by {name}{memory}"
    with contextlib.suppress(OSError), folder.driver_log.open("rb") as log:
        log.seek(max(0, log.seek(0, os.SEEK_END) - _TAIL_BYTES))
        lines = [one_line(line) for line in log.read().decode("utf-8", "replace").splitlines()]
        said = [index for index, line in enumerate(lines) if line.startswith("smolrun: ")]
        if said:
            # What is wrong with a configuration stands in the indented lines below.
            below = itertools.takewhile(lambda line: line[:1] == " ", lines[said[-1] + 1 :])
            words = [lines[said[-1]].removeprefix("smolrun: "), *map(str.strip, below)]
            return f"{' '.join(words)} (exit code {code})"
        if last := [line for line in lines if line.strip()][-1:]:
            return f"{last[0]} (exit code {code})"
    return f"exit code {code}"
