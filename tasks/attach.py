"""task=attach: show a run that another process drives, as if it had been started here.

Only reads; Ctrl-C ends the command, not the run.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence

from smolrun.config import RunConfig
from smolrun.driver import run_summary
from smolrun.driver.runs import OpenRun, config_of, find_run, opened, ranks_of, url_of
from smolrun.errors import ProtocolError
from smolrun.events import Event, RankStep, StepDone, from_json
from smolrun.launch.supervisor_events import EXIT_DONE
from smolrun.sanitize import echo, indented, one_line
from smolrun.sweep.attach import attach, meant_sweep
from smolrun.tracking.console import Console, is_step_line
from smolrun.tracking.run_view import Chunk, Request, View

_HISTORY_LINES = 10
_END_LINES = 200  # at most of what a log says of the end, with samples


def drive(config: RunConfig) -> int:
    """Follow the run, or the sweep, to its end; returns the exit code that its own command has."""
    if (sweep := meant_sweep(config.attach.run)) is not None:
        return attach(sweep)
    with opened(find_run("attach.run", config.attach.run)) as run:
        view = run.ask(Request("", reads=True, link=sys.stdout.isatty()))
        if view.has_ended:
            Show(run, view).show_end(view)
            return run_summary.exit_code(view)
        url = url_of(run, view)
        how = f"serving at {one_line(url)}" if url is not None else "running"
        echo(f"{run.folder.run_id} is {how}; Ctrl-C detaches from it")
        if view.link is not None:
            from smolrun.driver.lan import show_link  # not above: other runs do without

            show_link(view.link)
        return Show(run, view).follow(view)


class Show:
    """Shows one run on this terminal."""

    def __init__(self, run: OpenRun, first: View) -> None:
        config = config_of(run.folder)
        steps = first.driver.get("steps") or (config.training.steps if config is not None else 1)
        self._run = run
        self._console = Console(
            steps=steps,
            world_size=ranks_of(config),
            batch_size=config.training.global_batch_size if config is not None else None,
            names_slowest=config is None or config.algorithm.is_lockstep,
        )
        self._console.unit = str(first.driver.get("unit", "tokens"))
        self._has_log = False
        self._last_lines: list[str] = []  # of the log
        self._in_log: set[str] = set()  # lines of the end, of which a terminal gets a table

    def follow(self, view: View) -> int:
        """From `view` on to the end of the run, or to Ctrl-C."""
        try:
            while True:
                is_news = self.show(view)
                if view.has_ended and not is_news:
                    break
                if not view.has_ended:
                    time.sleep(self._run.every_s)
                place = view.metrics.place, view.log.place
                request = Request("", reads=True, metrics=place[0], log=place[1])
                view = self._run.ask_again(request, self._console.say)
        except KeyboardInterrupt:
            self._console.close()
            name = self._run.folder.run_id
            echo(f"{name} keeps running; to stop it: smolrun task=stop stop.run={name}")
            return EXIT_DONE
        finally:
            self._console.close()
        if self._console.is_live or not self._has_log_shown_end(view):
            self.show_end(view)
        return run_summary.exit_code(view)

    def _has_log_shown_end(self, view: View) -> bool:
        """The driver writes its last lines after the summary, by which a run has ended."""
        status = run_summary.end_of(self._run.folder, view).headline.partition(":")[0]
        return any(line.startswith(f"{status}:") for line in self._last_lines)

    def show_end(self, view: View) -> None:
        """How the run ended."""
        is_short = self._console.is_live
        self._console.show_end(run_summary.end_of(self._run.folder, view, is_short=is_short))

    def show(self, view: View) -> bool:
        """Whatever is new since the last look; False if nothing is."""
        self._has_log = bool(view.driver.get("has_log"))
        if self._console.is_live and view.has_ended and not self._in_log:
            end = run_summary.end_of(self._run.folder, view)
            self._in_log = {part for text in end.lines() for part in indented(text).split("\n")}
        if not self._has_log or self._console.is_live:
            self._show_events(view.metrics)
        self._last_lines = [*self._last_lines, *view.log.lines][-_END_LINES:]
        for line in _recent(view.log):
            # With a bar, steps are its business.
            if not (self._console.is_live and is_step_line(line)) and line not in self._in_log:
                self._console.say(line.rstrip("\r"))
        return bool(view.log.lines or view.metrics.lines)

    def _show_events(self, metrics: Chunk) -> None:
        events = list(_events(metrics.lines))
        if metrics.is_fresh:
            steps = [event for event in events if isinstance(event, StepDone)]
            if len(steps) > 1:  # rates are of new steps only
                self._console.go_on(steps[-2].time_s)
                events = [steps[-1]]
        for event in events:
            # The log has shown all other events.
            if not self._has_log or isinstance(event, StepDone | RankStep):
                self._console.record(event)


def _recent(log: Chunk) -> Sequence[str]:
    """All of a sequel, and of a log that is seen for the first time its last lines."""
    return log.lines[-_HISTORY_LINES:] if log.is_fresh else log.lines


def _events(lines: Sequence[str]) -> Iterator[Event]:
    for line in lines:
        try:
            yield from_json(line)
        except ProtocolError:
            text = one_line(line[:80])
            echo(f"smolrun: invalid line in metrics.jsonl: {text}", error=True)
