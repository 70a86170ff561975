"""Where the state of a dashboard comes from: a run as it is looked at again and again, or the file
of one that is replayed.

`advance` is called some times a second by the dashboard's thread and never blocks: what may take
long, a machine that is asked over SSH, is asked by a thread of its own.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Protocol

from smolrun.driver.runs import OpenRun
from smolrun.errors import HostError, SmolrunError
from smolrun.events import Event, StepDone, from_any_version
from smolrun.log_records import LogRecord
from smolrun.sanitize import one_line
from smolrun.tracking.history import last_step, offset_at, past
from smolrun.tracking.run_view import FilePosition, Request, View, read_on
from smolrun.ui.run_state import RunState
from smolrun.ui.screen import Position

_LOOK_EVERY_S = 0.25  # at files of this machine
_NOWHERE = FilePosition(0, 0)  # of a file that is not there yet
_MOST_RECORDS = 2000  # of logs at once
_MOST_EVENTS = 4096  # a replay that is further behind its clock leaves steps out
_MOST_SPEED, _LEAST_SPEED = 4096.0, 1 / 16


class Source(Protocol):
    """What brings a state up to date."""

    def advance(self, state: RunState, now: float) -> float:
        """Take up what is new; `now` in seconds of a monotonic clock. Returns the time by which the
        state counts."""

    def close(self) -> None:
        """End what was begun."""


def events_of(metrics: Path) -> Iterator[Event]:
    """All events in a file, in order; lines that are none are left out."""
    place = FilePosition(metrics.stat().st_ino, 0)
    while (chunk := read_on(metrics, place)).place and chunk.lines and not chunk.is_fresh:
        place = chunk.place
        yield from filter(None, map(from_any_version, chunk.lines))


class LiveSource:
    """A run that may still go on, here or on another machine. The run is closed by its owner."""

    def __init__(self, run: OpenRun, first: View) -> None:
        """`first` was asked with `history`."""
        self._run = run
        self._views: queue.SimpleQueue[View | HostError | OSError] = queue.SimpleQueue()
        self._over, self._wants_stop = threading.Event(), threading.Event()
        # Null: the history is asked for.
        self._metrics: FilePosition | None = first.metrics.place or _NOWHERE
        self._log = first.log.place
        # Another machine, or a server, rather than files that are here.
        self._is_asked = run.driver_host is not None or first.server is not None
        self._views.put(first)
        threading.Thread(target=self._look, name="smolrun-watch", daemon=True).start()

    def advance(self, state: RunState, now: float) -> float:
        """Take up all views that have come since the last call."""
        while not self._views.empty():
            found = self._views.get()
            if isinstance(found, View):
                state.apply(found, now)
            else:
                state.lost_contact(str(found), now)
        return now

    def stop(self) -> None:
        """Ask the run to stop, with the next look; a second time: at once."""
        self._wants_stop.set()

    def close(self) -> None:
        """Look no more. Does not wait for an answer that is on its way."""
        self._over.set()

    def _look(self) -> None:
        every_s = self._run.every_s if self._is_asked else _LOOK_EVERY_S
        while not self._over.wait(every_s):
            wants_stop = self._wants_stop.is_set()
            try:
                view = self._run.ask(self._request(wants_stop))
            except (HostError, OSError) as error:
                self._views.put(error)
                continue
            if wants_stop:
                self._wants_stop.clear()
            if view.metrics.is_fresh:  # a file that is new, or another one: first its history
                self._metrics = self._log = None
                continue
            self._metrics = view.metrics.place or _NOWHERE
            self._log = view.log.place or self._log
            self._views.put(view)

    def _request(self, wants_stop: bool) -> Request:
        return Request("", stop=wants_stop, reads=True, history=self._metrics is None, server=True,
                       metrics=self._metrics, log=self._log)  # fmt: skip


class LogSource:
    """The logs of a run, read by a thread of its own from when they are first wanted."""

    def __init__(self, read: Callable[[], Iterator[LogRecord | None]]) -> None:
        """`read` follows them; None means that there are no more for now."""
        self._read = read
        self._found: queue.SimpleQueue[LogRecord | str] = queue.SimpleQueue()
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def begin(self) -> None:
        """They are wanted."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="smolrun-logs", daemon=True)
            self._thread.start()

    def advance(self, state: RunState) -> None:
        """Take up what was read since the last call."""
        for _ in range(_MOST_RECORDS):
            if self._found.empty():
                return
            found = self._found.get()
            if isinstance(found, str):
                state.logs.append((None, found, "error"))
            else:
                state.add_record(found)

    def close(self) -> None:
        """Read no more."""
        self._over.set()

    def _run(self) -> None:
        records = self._read()
        try:
            for record in records:
                if self._over.is_set():
                    return
                if record is not None:
                    self._found.put(record)
                    self._wait()
        except (SmolrunError, OSError) as error:
            self._found.put(one_line(str(error)))
        finally:
            if isinstance(records, Generator):
                records.close()  # what it reads by is ended, too

    def _wait(self) -> None:
        """While there is more than is taken up."""
        while self._found.qsize() > _MOST_RECORDS and not self._over.wait(0.05):
            pass


class ReplaySource:
    """The metrics.jsonl of a run, as time passes by a clock of its own."""

    def __init__(self, metrics: Path, view: View, speed: float) -> None:
        """`view` is shown of the run's end. OSError, ValueError: the file cannot be read."""
        end = last_step(metrics)
        self._path = metrics
        self._view = view
        self.length_s = end.time_s if end else 0.0
        self.speed = speed
        self.is_paused = False
        self._clock_s = 0.0
        self._at: float | None = None  # when `advance` was called
        self._place = FilePosition(metrics.stat().st_ino, 0)
        self._pending: deque[Event] = deque()
        self._wanted_s: float | None = None

    @property
    def position(self) -> Position:
        """Where it is."""
        return Position(self._clock_s, self.length_s, self.speed, self.is_paused)

    def seek(self, time_s: float) -> None:
        """Go on from there, with the next call of `advance`."""
        self._wanted_s = min(max(0.0, time_s), self.length_s)

    def skip(self, share: float) -> None:
        """Go on so much of the whole run later, or earlier."""
        here = self._clock_s if self._wanted_s is None else self._wanted_s
        self.seek(here + share * self.length_s)

    def change_speed(self, factor: float) -> None:
        """Faster or slower."""
        self.speed = min(_MOST_SPEED, max(_LEAST_SPEED, self.speed * factor))

    def advance(self, state: RunState, now: float) -> float:
        """Move the clock on, and take up the steps that it has passed."""
        passed_s = 0.0 if self._at is None or self.is_paused else (now - self._at) * self.speed
        self._at = now
        clock_s = self._clock_s + passed_s if self._wanted_s is None else self._wanted_s
        is_jump, self._wanted_s = self._wanted_s is not None, None
        self._clock_s = min(self.length_s, clock_s)
        if is_jump or not self._take(state, _MOST_EVENTS):
            self._go_to(state)
        has_ended = self._clock_s >= self.length_s
        state.state = self._view.state if has_ended else "replay"
        state.view = self._view if has_ended else None
        return self._clock_s

    def _take(self, state: RunState, most: int) -> bool:
        """Hand the events up to the clock to the state; False if there are more than `most`."""
        for _ in range(most):
            if not self._pending and not self._read(state):
                return True
            event = self._pending[0]
            if isinstance(event, StepDone) and event.time_s > self._clock_s:
                return True
            state.record(self._pending.popleft(), self._clock_s)
        return False

    def _read(self, state: RunState) -> bool:
        """More events; False at the end of the file."""
        while not self._pending:
            chunk = read_on(self._path, self._place)
            if chunk.place is None or not chunk.lines or chunk.is_fresh:
                return False
            self._place = chunk.place
            found = map(from_any_version, chunk.lines)
            self._pending += [event for event in found if event is not None]
            state.unreadable += len(chunk.lines) - len(self._pending)
        return True

    def _go_to(self, state: RunState) -> None:
        """Show the run as it was at the clock."""
        try:
            is_end = self._clock_s >= self.length_s
            earlier = past(self._path, None if is_end else offset_at(self._path, self._clock_s))
        except (OSError, ValueError):
            return  # the file is gone: what was read stays
        state.reset()
        state.add_past(earlier)
        self._pending.clear()
        self._place = FilePosition(earlier.file, earlier.begin)
        self._take(state, _MOST_EVENTS)

    def close(self) -> None:
        """Nothing is open."""
