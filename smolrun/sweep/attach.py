"""Sweeps of other processes: their states, looking at one, and stopping it; for task=status,
attach, stop and clean."""

from __future__ import annotations

import dataclasses
import time

from smolrun.checkpoints.run_names import LATEST
from smolrun.errors import CheckpointError, SmolrunError
from smolrun.launch.supervisor_events import EXIT_DONE, EXIT_STOPPED
from smolrun.sanitize import echo
from smolrun.sweep.table import SweepConsole, SweepProgress, counts_text, ending_lines, left_s
from smolrun.tracking.past_runs import PastRun, bytes_below, find_run, look, run_folders
from smolrun.tracking.run_folder import OUTPUTS, RunFolder
from smolrun.tracking.sweep_folder import SweepFolder, find_sweep, sweep_folders

_POLL_S = 0.25
_STOP_S = 300.0  # a run may take so long to save; the sweep then ends at once
_REPORT_EVERY_S = 10.0


def meant_sweep(wanted: str) -> SweepFolder | None:
    """The sweep that a key for runs means: one of that name, where no run has it, and as `latest`
    one that runs now. None: it means a run, or nothing."""
    if wanted == LATEST and (newest := _found(LATEST)) and newest.run.driver_lives():
        return newest
    try:
        find_run(OUTPUTS, wanted)
    except CheckpointError:
        return _found(wanted)
    return None


def _found(wanted: str) -> SweepFolder | None:
    try:
        return find_sweep(wanted)
    except CheckpointError:  # several
        return None


def all_runs() -> list[RunFolder]:
    """The runs and the sweeps below outputs/, newest first; the jobs of a sweep are part of it."""
    sweeps = [sweep.run for sweep in sweep_folders()]
    return sorted([*run_folders(OUTPUTS), *sweeps], key=lambda one: one.path.name, reverse=True)


def is_sweep(folder: RunFolder) -> bool:
    """Whether `all_runs` gave it as a sweep."""
    return SweepFolder(folder.path).file.is_file()


def look_at(folder: RunFolder) -> PastRun:
    """The state and figures of a run, or of a sweep, whose steps are its jobs."""
    run = look(folder)
    if not is_sweep(folder):
        return run
    try:
        progress = SweepProgress(SweepFolder(folder.path), SweepFolder(folder.path).record())
    except SmolrunError:  # damaged, or of others
        return run
    views = progress.look(is_alive=run.state == "running")
    return dataclasses.replace(
        run,
        step=sum(view.state == "done" for view in views),
        steps=len(views),
        left_s=left_s(views) if run.state == "running" else None,
        checkpoint_bytes=bytes_below(folder.path),
    )


def attach(folder: SweepFolder) -> int:
    """Show the sweep until it ends or Ctrl-C; the exit code that its own command has, 0 after
    Ctrl-C. SmolrunError for a sweep.yaml that cannot be used."""
    progress = SweepProgress(folder, folder.record())
    console = SweepConsole(progress)
    name = folder.path.name
    try:
        if is_alive := folder.run.driver_lives():
            echo(f"{name} is running; Ctrl-C detaches from it")
        while is_alive:
            console.show(progress.look())
            time.sleep(_POLL_S)
            is_alive = folder.run.driver_lives()
        console.show(progress.look(is_alive=False), is_last=True)
    except KeyboardInterrupt:
        console.close()
        echo(f"{name} keeps running; to stop it: smolrun task=stop stop.run={name}")
        return EXIT_DONE
    finally:
        console.close()
    return _end(progress)


def _end(progress: SweepProgress) -> int:
    folder, views = progress.folder, progress.look(is_alive=False)
    echo(f"{counts_text(views)}\nsweep folder: {folder.path}")
    for line in ending_lines(folder, views):
        echo(line, error=True)
    code = folder.run.summary().get("exit_code")
    return code if isinstance(code, int) and 0 <= code < 256 else EXIT_STOPPED


def stop(folder: SweepFolder) -> int:
    """Ask the sweep to stop and wait until it has; 0 once it has ended. A Ctrl-C asks it to stop at
    once, a second one ends the waiting."""
    name, run = folder.path.name, folder.run
    progress = SweepProgress(folder, folder.record())
    if not run.driver_lives():
        echo(f"{name} has ended already")
        _end(progress)
        return EXIT_DONE
    asked = run.ask_to_stop()
    how = "at once" if asked > 1 else "its job saves at the next agreed step; Ctrl-C: at once"
    echo(f"{name}: stop requested, {how}")
    began = time.monotonic()
    report_at = began + _REPORT_EVERY_S
    while run.driver_lives():
        try:
            time.sleep(_POLL_S)
        except KeyboardInterrupt:
            if run.stop_requests() > 1:
                echo("a stop at once is requested; this command waits no longer")
                return EXIT_STOPPED
            run.ask_to_stop()
            echo(f"{name}: stop requested, at once")
        if time.monotonic() > began + _STOP_S:
            raise SmolrunError(f"{name} has not stopped yet; again, to stop it at once: "
                               f"smolrun task=stop stop.run={name}")  # fmt: skip
        if time.monotonic() > report_at:
            report_at += _REPORT_EVERY_S
            echo(f"waiting for {name}: {time.monotonic() - began:.0f} s")
    _end(progress)
    return EXIT_DONE
