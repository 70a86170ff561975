"""A sweep on the terminal: one live table, or, where there is no terminal, a line when a job starts
and a line when it ends.

Reads the run folders, so that task=attach shows what the sweep's own process shows.
"""

from __future__ import annotations

import os
import statistics
import time
from collections import Counter
from collections.abc import Sequence

import rich.box
import rich.live
import rich.table
import rich.text

from smolrun.sanitize import echo, one_line
from smolrun.tracking.console import Screen
from smolrun.tracking.formatting import clock, counted, number, rate
from smolrun.tracking.sweep_folder import (
    ENDED,
    JobState,
    JobView,
    SweepFolder,
    SweepJob,
    SweepRecord,
)

# A frame of 30 rows takes 25 ms of CPU, and the machine trains meanwhile.
_REDRAW_S = 1.0
_LAST_ROWS = 50  # of the table that stays; the comparison follows
_MOST_FAILED = 20  # jobs whose reasons are printed at the end
_STYLES = {"running": "bold", "done": "green", "failed": "red", "stopped": "yellow"}
_UNKNOWN = ""
_AROUND = (
    8  # lines that are no jobs: head, rule, two empty ones, the counts in two or three, the cursor
)


class SweepProgress:
    """What the jobs of a sweep do now; of one that has ended, only the date of its summary.json is
    looked at again."""

    def __init__(self, folder: SweepFolder, record: SweepRecord) -> None:
        self.folder = folder
        self.record = record
        self._ended: dict[str, tuple[int, JobView]] = {}  # with that date

    def look(self, *, is_alive: bool = True) -> list[JobView]:
        """All jobs in their order. While the sweep runs, those that had failed or were stopped when
        it was resumed are waiting: they run again."""
        resumed_at = _modified_ns(str(self.folder.path), "driver.json") if is_alive else 0
        return [self._view(job, resumed_at, is_alive=is_alive) for job in self.record.jobs]

    def _view(self, job: SweepJob, resumed_at: int, *, is_alive: bool) -> JobView:
        folder = str(self.folder.path)
        ended_at = _modified_ns(folder, job.name, "summary.json")
        known_at, view = self._ended.get(job.name, (0, None))
        if not ended_at and not _modified_ns(folder, job.name, "driver.log"):
            return JobView(job, "waiting")
        if view is None or known_at != ended_at:
            view = self.folder.look(job, is_alive=is_alive)
            if view.state in ENDED and ended_at:
                self._ended[job.name] = ended_at, view
        if view.state in ("failed", "stopped") and 0 < ended_at < resumed_at:
            return JobView(job, "waiting")
        return view


def _modified_ns(*path: str) -> int:
    """When a file was written, 0 if there is none. Of 500 jobs four times a second, so no Path."""
    try:
        return os.stat(os.path.join(*path)).st_mtime_ns
    except OSError:
        return 0


def left_s(views: Sequence[JobView]) -> float | None:
    """Seconds until the last job ends, as the done ones of the same cell took, or all done ones;
    None before anything is known."""
    took: dict[int, list[float]] = {}
    for view in views:
        if view.state == "done" and view.wall_s is not None:
            took.setdefault(view.job.cell, []).append(view.wall_s)
    all_of_them = [seconds for each in took.values() for seconds in each]
    if not all_of_them:
        return None
    usual = statistics.mean(all_of_them)
    total = 0.0
    for view in views:
        if view.state not in ENDED:
            whole = statistics.mean(took.get(view.job.cell, [usual]))
            total += view.left_s if view.left_s is not None else whole
    return total


def counts_text(views: Sequence[JobView]) -> str:
    """`3 of 8 done, 1 failed, 1 running, 3 waiting`."""
    counts = Counter(view.state for view in views)
    order: Sequence[JobState] = ("failed", "stopped", "preparing", "running", "waiting")
    others = [f", {counts[state]} {state}" for state in order if counts[state]]
    return f"{counts['done']} of {counted(len(views), 'job')} done{''.join(others)}"


class SweepConsole:
    """Shows a sweep. `show` may be called as often as one likes."""

    def __init__(self, progress: SweepProgress, num_jobs: int = 0) -> None:
        """`num_jobs`: how many there will be, where they become more."""
        self._progress = progress
        self._num_jobs = num_jobs
        self._screen = Screen(highlight=False, markup=False, emoji=False)
        self.is_live = self._screen.is_terminal and not self._screen.is_dumb_terminal
        self._live: rich.live.Live | None = None
        self._due = 0.0
        self._began = time.monotonic()
        self._states: dict[str, str] = {}

    @property
    def is_due(self) -> bool:
        """Whether `show` would show anything new."""
        return not self.is_live or time.monotonic() >= self._due

    def show(self, views: Sequence[JobView], *, is_last: bool = False) -> None:
        """The present state of the jobs; draws once a second at most."""
        if not self.is_live:
            self._print_changes(views)
            return
        if not self.is_due and not is_last:
            return
        self._due = time.monotonic() + _REDRAW_S
        if self._live is None:
            self._live = rich.live.Live(console=self._screen, auto_refresh=False)
            self._live.start()
        room = _LAST_ROWS if is_last else max(3, self._screen.height - _AROUND)
        shown = _shown(views, room)
        self._live.update(self._table(views, shown), refresh=True)
        if is_last:
            self.close()

    def say(self, text: str) -> None:
        """A line above the table."""
        if self._live is not None:
            self._screen.print(one_line(text), soft_wrap=True)
        else:
            echo(text)

    def close(self) -> None:
        """Leave the table as it is on the screen."""
        live, self._live = self._live, None
        if live is not None:
            live.stop()

    def _print_changes(self, views: Sequence[JobView]) -> None:
        for index, view in enumerate(views, start=1):
            before = self._states.get(view.job.name)
            self._states[view.job.name] = view.state
            which = f"job {index} of {max(self._num_jobs, len(views))}"
            if before in (None, *ENDED, "waiting") and view.state in ("preparing", "running"):
                echo(f"{which} starts: {label(view)}")
            elif view.state in ENDED and before not in (None, view.state):
                echo(f"{which} {view.state}: {label(view)}: {_figures(view)}{self._left(views)}")

    def _left(self, views: Sequence[JobView]) -> str:
        left = left_s(views)
        return f"; about {clock(left)} left" if left else ""

    def _table(self, views: Sequence[JobView], shown: Sequence[JobView]) -> rich.console.Group:
        keys = list(dict.fromkeys(key for view in views for key in view.job.differs))
        table = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
        if _width(keys, shown) <= self._screen.width:
            for key in keys:
                table.add_column(one_line(key.rpartition(".")[2]), no_wrap=True)
        else:
            keys = []
            table.add_column("job", no_wrap=True, ratio=1, overflow="ellipsis")
            table.expand = True
        units = dict.fromkeys(view.unit for view in shown if view.tokens_per_s is not None)
        for name in ("status", "step", "loss", f"{' or '.join(units) or 'tokens'}/s", "time"):
            table.add_column(name, no_wrap=True, justify="left" if name == "status" else "right")
        for view in shown:
            what = [view.job.differs.get(key, "") for key in keys] or [label(view)]
            cells = [rich.text.Text(one_line(text)) for text in what]
            status = rich.text.Text(view.state, style=_STYLES.get(view.state, "dim"))
            table.add_row(*cells, status, *_cells(view))
        hidden = len(views) - len(shown)
        more = f"; {counted(hidden, 'job')} not shown" if hidden else ""
        passed = f"; {clock(time.monotonic() - self._began)} passed"
        total = f"{counts_text(views)}{passed}{self._left(views)}{more}"
        return rich.console.Group(table, rich.text.Text(total))


_FIGURES_WIDTH = 10 + 12 + 8 + 10 + 13  # of the columns behind those that differ


def _width(keys: Sequence[str], shown: Sequence[JobView]) -> int:
    widths = [
        max([len(key.rpartition(".")[2]), *(len(view.job.differs.get(key, "")) for view in shown)])
        for key in keys
    ]
    return sum(widths) + len(widths) + _FIGURES_WIDTH if keys else 1 << 30


def _cells(view: JobView) -> list[str]:
    """step, loss, tokens/s and the time that is left, or that the job took."""
    step = _UNKNOWN if view.step is None else f"{view.step:,}"
    return [
        f"{step}/{view.steps:,}" if view.step is not None and view.steps else step,
        _UNKNOWN if view.loss is None else f"{view.loss:.4f}",
        _UNKNOWN if view.tokens_per_s is None else rate(view.tokens_per_s),
        _UNKNOWN if (at := view.wall_s or view.left_s) is None
        else f"{clock(at)}{'' if view.wall_s else ' left'}",
    ]  # fmt: skip


def _shown(views: Sequence[JobView], room: int) -> list[JobView]:
    """As many jobs as there is room for: those that run, the failed ones, the newest that have
    ended, and then the next ones; in their order."""
    if len(views) <= room:
        return list(views)
    active = [i for i, view in enumerate(views) if view.state in ("preparing", "running")]
    failed = [i for i, view in enumerate(views) if view.state == "failed"][-room // 3 :]
    ended = [i for i, view in enumerate(views) if view.state in ENDED][::-1]
    waiting = [i for i, view in enumerate(views) if view.state == "waiting"]
    first = [*active, *waiting[:1], *failed, *ended, *waiting]
    return [views[i] for i in sorted(list(dict.fromkeys(first))[:room])]


def label(view: JobView) -> str:
    """What differs between a job and the others, in one line."""
    words = [f"{key}={value}" for key, value in view.job.differs.items()]
    return one_line(" ".join(words) or view.job.name)


def _figures(view: JobView) -> str:
    """The figures of a job that has ended."""
    parts = []
    if view.step is not None:
        took = f" in {clock(view.wall_s)}" if view.wall_s is not None else ""
        parts.append(f"{counted(view.step, 'step')}{took}")
    if view.loss is not None:
        parts.append(f"loss {number(view.loss)}")
    if view.eval_loss is not None:
        parts.append(f"evaluation loss {number(view.eval_loss)}")
    if view.tokens_per_s is not None:
        parts.append(f"{rate(view.tokens_per_s)} {view.unit}/s")
    if view.state != "done" and view.reason:
        parts.append(one_line(view.reason))
    return ", ".join(parts) or "it made no step"


def ending_lines(
    folder: SweepFolder, views: Sequence[JobView], *, can_resume: bool = True
) -> list[str]:
    """The last lines of a sweep: what failed and why, and how to run what is left."""
    failed = [view for view in views if view.state == "failed"]
    left = sum(view.state != "done" for view in views)
    lines = [f"{len(failed)} of {counted(len(views), 'job')} failed:"] if failed else []
    for view in failed[:_MOST_FAILED]:
        log = folder.job(view.job.name).driver_log
        lines.append(f"  {label(view)}: {one_line(view.reason or 'unknown')}; log: {log}")
    if more := failed[_MOST_FAILED:]:
        lines.append(f"  and {len(more)} more, named in {folder.path / 'comparison.csv'}")
    if left and can_resume:
        command = f"smolrun -m sweep.resume={folder.path.name}"
        lines.append(f"to run the other {counted(left, 'job')}: {command}")
    return lines
