"""task=watch: a dashboard of a run, here or on the machine that drives it, or the replay of one;
console=dashboard: begin a run in the background and show it so.

    LiveSource | ReplaySource  ->  RunState  ->  lines of text  ->  the terminal

Where there is no terminal it prints lines as task=attach does. Only reads, unless a stop is asked
for.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from dataclasses import replace
from importlib import import_module

from smolrun.config import RunConfig, ranks
from smolrun.config.suggest import problem
from smolrun.driver import detach, run_summary
from smolrun.driver.runs import OpenRun, config_of, find_run, logs_of, opened
from smolrun.driver.trackers import run_setup
from smolrun.errors import ConfigError
from smolrun.events import StepDone
from smolrun.launch.supervisor_events import EXIT_DONE
from smolrun.sanitize import echo
from smolrun.sweep.attach import meant_sweep
from smolrun.tasks import attach
from smolrun.tracking.console import Console
from smolrun.tracking.logs import LogQuery
from smolrun.tracking.past_runs import is_server
from smolrun.tracking.run_folder import RunFolder
from smolrun.tracking.run_view import Request, View
from smolrun.ui.run_state import RunFacts, RunState
from smolrun.ui.sources import LiveSource, LogSource, ReplaySource, events_of

_REMOTE = "smolrun.driver.remote_driver"  # loads the SSH library


def drive(config: RunConfig) -> int:
    """Show the run until it has ended or the user leaves; the exit code of the run once it has
    ended, else 0."""
    if config.task != "watch":
        return _begin(config)
    wanted = config.watch.run
    if meant_sweep(wanted) is not None:
        raise ConfigError(problem("watch.run", wanted, "it is a sweep; name one of its jobs"))
    folder = find_run("watch.run", wanted)
    if config.watch.replay:
        return _replay(folder, config.watch.speed)
    return _follow(config, folder)


def _begin(config: RunConfig) -> int:
    """console=dashboard: start the run in the background, or on another machine, and show it."""
    begin = detach.begin if config.driver is None else import_module(_REMOTE).begin
    code, folder = begin(config)
    return code if folder is None else _follow(config, folder)


def _follow(config: RunConfig, folder: RunFolder) -> int:
    if has_screen():
        return watch(folder)
    chosen = config.attach.model_copy(update={"run": str(folder.path)})
    return attach.drive(config.model_copy(update={"attach": chosen}))


def has_screen() -> bool:
    """Whether a dashboard can be shown."""
    streams = (sys.stdin, sys.stdout, sys.stderr)
    return all(stream.isatty() for stream in streams) and os.environ.get("TERM") != "dumb"


def watch(folder: RunFolder) -> int:
    """The dashboard of a run."""
    from smolrun.ui.dashboard import show  # loads textual

    with opened(folder) as run:
        view = run.ask(Request("", reads=True, history=True, server=True, figures=True))
        state = RunState(facts_of(run.folder, view))
        show(state, LiveSource(run, view), _logs(run.folder))
        return _say_end(run, state)


def _logs(folder: RunFolder) -> LogSource:
    return LogSource(lambda: logs_of(folder, LogQuery(follow=True)))


def _say_end(run: OpenRun, state: RunState) -> int:
    view, name = state.view, run.folder.run_id
    if view is None or not view.has_ended:
        echo(f"{name} keeps running; to see it again: smolrun task=watch watch.run={name}")
        return EXIT_DONE
    attach.Show(run, view).show_end(view)
    return run_summary.exit_code(view)


def facts_of(folder: RunFolder, view: View) -> RunFacts:
    """What the configuration of a run says; as good as nothing of one of another version."""
    config = config_of(folder)
    steps = view.driver.get("steps") or view.figures.get("steps")
    facts = RunFacts(folder.run_id, steps=steps, unit=str(view.driver.get("unit", "tokens")),
                     is_server=is_server(folder))  # fmt: skip
    if config is None or facts.is_server:
        return facts
    return replace(
        facts,
        hosts=[rank.host for rank in ranks(config)],
        setup=run_setup(config),
    )


def _replay(folder: RunFolder, speed: float) -> int:
    with opened(folder) as run:
        view = run.ask(Request("", figures=True))
    try:
        source = ReplaySource(folder.metrics, view, speed)
    except (OSError, ValueError) as error:
        what = f"there is nothing to replay: {error}"
        raise ConfigError(problem("watch.run", folder.run_id, what)) from None
    facts = facts_of(folder, view)
    if has_screen():
        from smolrun.ui.dashboard import show  # loads textual

        show(RunState(facts), source, _logs(folder))
        return EXIT_DONE
    with contextlib.suppress(KeyboardInterrupt):
        _print(folder, facts, speed)
        if view.has_ended:
            attach.Show(run, view).show_end(view)
    return EXIT_DONE


def _print(folder: RunFolder, facts: RunFacts, speed: float) -> None:
    """The replay as lines."""
    batch = facts.setup.global_batch_size if facts.setup else None
    console = Console(steps=facts.steps or 1, world_size=len(facts.hosts) or 1, batch_size=batch)
    console.unit = facts.unit
    began = time.monotonic()
    for event in events_of(folder.metrics):
        if isinstance(event, StepDone):
            time.sleep(max(0.0, began + event.time_s / speed - time.monotonic()))
        console.record(event)
    console.close()
