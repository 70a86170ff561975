"""task=stop: ask a run's driver to stop, and wait until it has.

The first time, it stops at the next agreed step, saved; asked again, at once. The request is a
file in the run's folder that its driver polls: it works on every system and from every machine.
"""

from __future__ import annotations

import time

from smolrun.config import RunConfig
from smolrun.driver import run_summary
from smolrun.driver.runs import OpenRun, config_of, find_run, opened
from smolrun.launch.supervisor_events import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED
from smolrun.sanitize import echo
from smolrun.sweep.attach import meant_sweep, stop
from smolrun.tracking.console import Console
from smolrun.tracking.past_runs import is_server
from smolrun.tracking.run_view import Request, View

# A run may take this long beyond what its ranks have, to close its trackers.
_BEYOND_S = 60.0
_TELL_EVERY_S = 10.0


def drive(config: RunConfig) -> int:
    """Stop the run, or the sweep; 0 once it has ended."""
    if (sweep := meant_sweep(config.stop.run)) is not None:
        return stop(sweep)
    with opened(find_run("stop.run", config.stop.run)) as run:
        view = run.ask(Request(""))
        if not view.has_ended:
            try:
                view = _stopped(run, run.ask(Request("", stop=True)))
            except OSError as error:
                echo(f"smolrun: {run.folder.run_id} cannot be asked: {error}", error=True)
                return EXIT_FAILED
            except KeyboardInterrupt:
                echo("a stop at once is requested; this command waits no longer")
                return EXIT_STOPPED
        elif view.state != "died":
            echo(f"{run.folder.run_id} has ended already")
        if not view.has_ended:
            name = run.folder.run_id
            echo(f"smolrun: {name} has not stopped yet; to stop it at once: "
                  f"smolrun task=stop stop.run={name}", error=True)  # fmt: skip
            return EXIT_FAILED
        console = Console(steps=1, world_size=1)
        console.show_end(run_summary.end_of(run.folder, view, is_short=console.is_live))
        return EXIT_DONE


def _stopped(run: OpenRun, view: View) -> View:
    """The run after its end, or, if that takes too long, as it is; KeyboardInterrupt at the second
    Ctrl-C, as the first asks the run to stop at once."""
    _tell(run, view)
    is_at_once = False
    began = time.monotonic()
    give_up, tell_at = began + _wait_s(run), began + _TELL_EVERY_S
    while not view.has_ended and time.monotonic() < give_up:
        try:
            time.sleep(run.every_s)
            # The request has arrived: the run stops without this connection.
            view = run.ask_again(Request(""), echo)
        except KeyboardInterrupt:
            if is_at_once:
                raise
            is_at_once = True
            if view.asked < 2:
                view = run.ask(Request("", stop=True))
            _tell(run, view)
        if time.monotonic() >= tell_at and not view.has_ended:
            tell_at += _TELL_EVERY_S
            echo(f"waiting for {run.folder.run_id}: {time.monotonic() - began:.0f} s")
    return view


def _tell(run: OpenRun, view: View) -> None:
    how = "at the next agreed step, after saving"
    if is_server(run.folder):
        how = "once running answers have ended"
    how = "at once" if view.asked > 1 else f"{how}; Ctrl-C: at once"
    echo(f"{run.folder.run_id}: stop requested, {how}")


def _wait_s(run: OpenRun) -> float:
    """As long as the driver itself waits for its ranks or answers, and to close its trackers."""
    config = config_of(run.folder)
    theirs = 0.0 if config is None else max(2 * config.mesh.timeout_s, config.serving.drain_s)
    return max(120.0, theirs) + _BEYOND_S
