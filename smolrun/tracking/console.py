"""Console output of a run: a progress bar in a terminal, periodic lines anywhere else.

Never raises: once writing to its stream fails, it writes nothing more. Starts no thread; the bar is
redrawn when events arrive.
"""

from __future__ import annotations

import contextlib
import re
import sys
import time
from collections.abc import Callable
from typing import TextIO

import rich.console
import rich.progress

from smolrun.events import (
    Drift,
    EvalDone,
    Event,
    GradientDropped,
    Membership,
    Note,
    RankStep,
    RunStarted,
    StepDone,
    StepSkipped,
)
from smolrun.files import to_null_device
from smolrun.sanitize import indented, one_line
from smolrun.tracking.formatting import accuracy, clock, counted, named, number, rate
from smolrun.tracking.run_end import RunEnd

_REFRESH_S = 0.1  # ten times a second looks alive, and costs nothing
_LEAST_BAR, _MOST_BAR = 6, 40  # columns
_LINE_EVERY_S = 5.0  # where there is no bar
_RATE_OVER_S = 1.0  # tokens/s are a mean: with late gradients the steps come in bursts
_MOST_COUNTED = 1_000_000  # training steps, files and tensors are fewer
_SLOW = 1.1  # a rank is called slow from 10 % more compute than the others' mean; less is noise


class Screen(rich.console.Console):
    """rich's console for tables."""

    def on_broken_pipe(self) -> None:
        """Raises BrokenPipeError: rich would end the process here, also a run piped into `head`."""
        raise BrokenPipeError


class Console:
    """A tracker that prints. Colours are rich's, which honours NO_COLOR."""

    def __init__(
        self,
        *,
        steps: int,
        world_size: int,
        batch_size: int | None = None,
        names_slowest: bool = True,
        stream: TextIO | None = None,
    ) -> None:
        """`steps` of the whole run, of `batch_size` samples each. `names_slowest`: the slowest rank
        is shown, as the others wait for it."""
        self.log: Callable[[str], object] = lambda text: None  # gets each line that is not a rank's
        self.unit = "tokens"  # what is counted per second; "samples" where there is no text
        self._steps = steps
        self._world_size = world_size
        self._batch_size = batch_size
        self._names_slowest = names_slowest
        self._stream = stream or sys.stdout
        self._rich = Screen(file=self._stream, highlight=False, markup=False, emoji=False)
        # A progress bar is drawn; else lines are printed.
        self.is_live = self._stream.isatty() and not self._rich.is_dumb_terminal
        self._bar: rich.progress.Progress | None = None
        self._bar_column = rich.progress.BarColumn()
        self._task = rich.progress.TaskID(0)
        self._drawn_at = 0.0
        self._line_due_s = 0.0
        self._tokens = 0
        self._rate = 0.0
        self._rate_from_s = 0.0
        self._preparing = ""
        self._compute_s: dict[int, float] = {}
        self._is_broken = False

    def preparing(self, what: str, done: int, total: int) -> None:
        """Show the progress of data preparation: `done` of `total`."""
        self._quietly(lambda: self._prepare(one_line(what), done, total))

    def go_on(self, earlier_s: float, world_size: int | None = None) -> None:
        """Start rates anew for a resumed run that has trained for `earlier_s`, on `world_size`
        ranks now."""
        self._world_size = world_size or self._world_size
        self._rate_from_s = self._line_due_s = earlier_s
        self._tokens, self._rate = 0, 0.0
        self._compute_s.clear()

    def record(self, event: Event) -> None:
        """Print the event, if it is one of those shown."""
        self._quietly(lambda: self._show(event))

    def say(self, text: str) -> None:
        """Print a line, above the bar if there is one; further lines of the text are indented."""
        self._quietly(lambda: self._print(text))

    def show_end(self, end: RunEnd) -> None:
        """Print how the run ended."""
        self._quietly(lambda: self._show_end(end))

    def close(self) -> None:
        """Stop the bar and leave its last state on the screen."""
        self._quietly(self._end_bar)

    def _quietly(self, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception:  # a closed terminal, a full disk, an encoding: none ends a run
            self._is_broken = True
            self.is_live = False
            self._bar = None
            _let_go(self._stream)

    def _print(self, text: str, *, is_logged: bool = True) -> None:
        if is_logged:
            self.log(text)
        if not self._is_broken:
            self._rich.print(self._encodable(indented(text)), soft_wrap=True)

    def _encodable(self, text: str) -> str:
        try:
            text.encode(self._stream.encoding or "utf-8")
        except UnicodeEncodeError:
            return text.encode("ascii", "backslashreplace").decode("ascii")
        return text

    def _show_end(self, end: RunEnd) -> None:
        if not self.is_live:
            for line in end.lines():
                self._print(line)
            return
        for line in end.lines():
            self.log(line)
        has_blocks = (self._stream.encoding or "").lower().startswith("utf")
        for row in end.rows(self._rich.width, has_blocks=has_blocks):
            shown = self._encodable(row.plain)
            self._rich.print(row if shown == row.plain else shown, soft_wrap=True)

    def _prepare(self, what: str, done: int, total: int) -> None:
        if what != self._preparing:
            self._preparing = what
            self._end_bar()
            if self.is_live:
                self._begin_bar(what, total)
            else:
                self._print(f"preparing: {what}")
        self._move_bar(done, [], total=total, is_last=done >= total)
        if done >= total:
            self._end_bar()

    def _show(self, event: Event) -> None:
        if isinstance(event, StepDone):
            self._show_step(event)
        elif isinstance(event, RankStep):
            before = self._compute_s.get(event.rank, event.compute_s)
            self._compute_s[event.rank] = 0.8 * before + 0.2 * event.compute_s
        elif isinstance(event, EvalDone):
            share = f", {accuracy(event.accuracy)}" if event.accuracy is not None else ""
            self._print(f"after step {event.step + 1}: evaluation loss {number(event.loss)}{share}")
        elif isinstance(event, RunStarted):
            self._show_start(event)
        elif isinstance(event, StepSkipped):
            where = f" on {named(event.ranks)}" if event.ranks else ""
            self._print(f"step {event.step + 1} is skipped: no finite gradient{where}")
        elif isinstance(event, Drift):
            self._show_drift(event)
        elif isinstance(event, GradientDropped):
            self._show_dropped(event)
        elif isinstance(event, Membership):
            self._show_membership(event)
        elif isinstance(event, Note) and event.level != "debug":
            whose = "" if event.rank is None else f" (rank {event.rank})"
            # The rank has it in its own log.
            self._print(f"{event.level}: {event.message}{whose}", is_logged=event.rank is None)

    def _show_membership(self, event: Membership) -> None:
        where = f"step {event.step + 1}: rank {event.rank}"
        if event.is_here:
            self._print(f"{where} joined")
        else:
            items = counted(event.tickets, "work item")
            self._print(f"{where} left ({event.reason}); its {items} go to other ranks")

    def _show_dropped(self, event: GradientDropped) -> None:
        """At powers of two only: a rank that is too slow is late in every step."""
        if event.so_far & (event.so_far - 1) == 0:  # 1, 2, 4, 8, ...
            so_far = f", {event.so_far} so far" if event.so_far > 1 else ""
            self._print(
                f"step {event.step + 1} continues without rank {event.rank}: its gradient is late "
                f"and will be dropped{so_far}"
            )

    def _show_start(self, event: RunStarted) -> None:
        sample = "sequence" if self.unit == "tokens" else "sample"
        batch = f" of {counted(self._batch_size, sample)}" if self._batch_size else ""
        train = f"{event.train_size:,}" if event.train_size else "a stream"
        self._print(
            f"training {event.parameters:,} parameters on {counted(self._world_size, 'rank')} "
            f"({event.device}): {counted(event.steps, 'step')}{batch}; "
            f"train {train} / eval {counted(event.eval_size, 'sample')}"
        )

    def _show_drift(self, event: Drift) -> None:
        if event.ranks:
            far = f"up to {event.difference:.2g}" if event.difference else "more than any number"
            self._print(
                f"after step {event.step + 1}: {named(event.ranks)} drifted from rank 0 by "
                f"{far}; synchronized"
            )

    def _show_step(self, event: StepDone) -> None:
        is_last = event.step + 1 >= self._steps
        self._tokens += event.tokens
        if self.is_live:
            self._measure(event, over_s=_RATE_OVER_S)
            if self._bar is None or self._preparing:
                self._preparing = ""
                self._begin_bar("training", self._steps)
            self._move_bar(event.step + 1, self._figures(event), total=self._steps, is_last=is_last)
        elif is_last or event.time_s >= self._line_due_s:
            self._line_due_s = event.time_s + _LINE_EVERY_S
            self._measure(event, over_s=0.0)
            figures = "  ".join(self._figures(event))
            self._print(f"step {event.step + 1}/{self._steps}  {figures}")

    def _measure(self, event: StepDone, *, over_s: float) -> None:
        """A new rate, over all since the last one, once `over_s` have passed."""
        passed_s = event.time_s - self._rate_from_s
        if passed_s > 0 and (passed_s >= over_s or self._rate == 0.0):
            self._rate = self._tokens / passed_s
            self._rate_from_s, self._tokens = event.time_s, 0

    def _figures(self, event: StepDone) -> list[str]:
        """The parts of a step's line, the most important first."""
        left_s = event.time_s / (event.step + 1) * (self._steps - event.step - 1)
        parts = [f"loss {number(event.loss)}", f"{rate(self._rate)} {self.unit}/s"]
        if event.step + 1 < self._steps:
            parts.append(f"{clock(left_s)} left")
        slow = slowest(self._compute_s) if self._names_slowest else None
        return [*parts, f"slowest: rank {slow}"] if slow is not None else parts

    def _begin_bar(self, what: str, total: int) -> None:
        self._end_bar()
        column = rich.progress.TextColumn
        self._bar = rich.progress.Progress(
            column("{task.description}", markup=False),
            self._bar_column,
            # Of millions of bytes or characters, the share says more.
            rich.progress.TaskProgressColumn()
            if total > _MOST_COUNTED
            else rich.progress.MofNCompleteColumn(),
            column("{task.fields[figures]}", markup=False),
            console=self._rich,
            auto_refresh=False,
        )
        self._task = self._bar.add_task(what, total=total, figures="")
        self._bar.start()

    def _move_bar(self, done: int, figures: list[str], *, total: int, is_last: bool) -> None:
        now = time.monotonic()
        if self._bar is not None and (is_last or now - self._drawn_at >= _REFRESH_S):
            self._drawn_at = now
            shown = self._fit(figures, self._bar.tasks[0].description, total)
            self._bar.update(self._task, completed=done, total=total, figures=shown)
            self._bar.refresh()

    def _fit(self, figures: list[str], what: str, total: int) -> str:
        """The figures that fit into the terminal's width, beside a bar that takes the rest."""
        room = self._rich.width - len(f"{what} {total}/{total}") - 2  # a space around the bar
        while figures and len("  ".join(figures)) > room - _LEAST_BAR:
            figures = figures[:-1]
        shown = "  ".join(figures)
        self._bar_column.bar_width = max(1, min(_MOST_BAR, room - len(shown)))
        return shown

    def _end_bar(self) -> None:
        if self._bar is not None:
            bar, self._bar = self._bar, None
            bar.stop()


def is_step_line(line: str) -> bool:
    """Whether a line is one that a console without a bar prints for a step."""
    return re.match(r"step \d+/\d+  ", line) is not None


def _let_go(stream: TextIO) -> None:
    """Redirect to the null device: flushing a broken stdout would change Python's exit code."""
    with contextlib.suppress(OSError, ValueError):
        to_null_device(stream.fileno())


def slowest(compute_s: dict[int, float]) -> int | None:
    """The rank that computes more than 10 % longer than the mean of the others; None if none."""
    if len(compute_s) < 2:
        return None
    rank = max(compute_s, key=lambda rank: compute_s[rank])
    others = sum(compute_s.values()) - compute_s[rank]
    return rank if compute_s[rank] > _SLOW * others / (len(compute_s) - 1) else None
