"""Where a dashboard's news come from: a run that is looked at, a machine that does not answer, and
a file that is replayed."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from smolrun.driver.runs import OpenRun, opened
from smolrun.errors import HostError
from smolrun.log_records import LogRecord
from smolrun.tracking.run_folder import RunFolder
from smolrun.tracking.run_view import Request, View, answer
from smolrun.ui.run_state import RunState
from smolrun.ui.sources import LiveSource, LogSource, ReplaySource, events_of
from tests.tracking.test_history import big
from tests.tracking.test_past_runs import a_run
from tests.ui.made import JOINED, STEP_S, facts, lines, step_done, training, write
from tests.waiting import until


class Watched:
    """A live source of a run, and the state that it brings up to date."""

    def __init__(
        self, folder: RunFolder, ask: Callable[[Request], View] | None = None, **run: Any
    ) -> None:
        with opened(folder) as there:
            self.run = OpenRun(folder, ask or there.ask, 0.01, **run)
        first = answer(Request(str(folder.path), reads=True, history=True))
        self.state = RunState(facts())
        self.source = LiveSource(self.run, first)

    def until(self, is_so: Callable[[RunState], Any]) -> None:
        def look() -> Any:
            self.source.advance(self.state, 0.0)
            return is_so(self.state)

        until(look, 30)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    found = a_run(tmp_path)
    found.write_driver(steps=100)
    return found


def step_of(state: RunState) -> int | None:
    return state.last.step if state.last else None


def test_a_file_that_is_not_there_yet_grows_is_cut_and_is_replaced(folder: RunFolder) -> None:
    watched = Watched(folder)
    watched.until(lambda state: state.view is not None)
    write(folder, [JOINED, *training(0, 5)])
    watched.until(lambda state: step_of(state) == 4)
    half, rest = lines([step_done(5)])[0][:50], lines([step_done(5)])[0][50:]
    with folder.metrics.open("a") as file:
        file.write(half)
    write_on = folder.metrics.stat().st_size
    with folder.metrics.open("a") as file:
        file.write(f"{rest}\n")
    watched.until(lambda state: step_of(state) == 5)
    assert watched.state.unreadable == 0 and len(watched.state.events) == 1
    os.truncate(folder.metrics, write_on)  # in the middle of a line
    write(folder, [step_done(3), *training(4, 5)])
    watched.until(lambda state: step_of(state) == 4)
    fresh = folder.metrics.with_name("fresh")
    fresh.write_text("".join(f"{row}\n" for row in lines(training(0, 3))))
    os.replace(fresh, folder.metrics)  # as a resumed run does
    watched.until(lambda state: step_of(state) == 2)
    assert [point.step for point in watched.state.curve.points] == [0, 1, 2]
    watched.source.close()


def test_its_host_is_cut_off_and_comes_back(folder: RunFolder) -> None:
    is_cut = threading.Event()

    def ask(request: Request) -> View:
        if is_cut.is_set():
            raise HostError("mini1", "no answer from 10.0.0.1")
        return answer(Request(str(folder.path), reads=True, metrics=request.metrics,
                              history=request.history))  # fmt: skip

    write(folder, training(0, 5))
    watched = Watched(folder, ask, driver_host="mini1")
    watched.until(lambda state: step_of(state) == 4)
    is_cut.set()
    watched.until(lambda state: state.unreachable is not None)
    assert watched.state.unreachable is not None
    assert "no answer from 10.0.0.1" in watched.state.unreachable[1]
    write(folder, training(5, 9))
    assert step_of(watched.state) == 4
    is_cut.clear()
    watched.until(lambda state: state.unreachable is None and step_of(state) == 8)
    assert [point.step for point in watched.state.curve.points] == list(range(9))
    watched.source.close()


def test_a_stop_is_asked_for_once(folder: RunFolder) -> None:
    watched = Watched(folder)
    watched.source.stop()
    watched.until(lambda state: state.view is not None and state.view.asked)
    assert folder.stop_requests() == 1
    watched.source.stop()
    watched.until(lambda state: state.view is not None and state.view.asked == 2)
    watched.source.close()


def records(*texts: str) -> list[LogRecord]:
    when = datetime(2026, 1, 31, tzinfo=UTC)
    return [LogRecord(when, 0, "mini1", "info", None, text) for text in texts]


def test_logs_are_read_from_when_they_are_wanted() -> None:
    asked, goes_on, ended = threading.Event(), threading.Event(), threading.Event()

    def read() -> Iterator[LogRecord | None]:
        asked.set()
        try:
            yield from records("first")
            while not goes_on.wait(0.01):
                yield None
            yield from records(*map(str, range(5000)))  # more than is taken at once
            raise HostError("mini1", "no answer")
        finally:
            ended.set()

    state, source = RunState(facts()), LogSource(read)
    source.advance(state)
    assert not asked.is_set()
    for _ in range(2):
        source.begin()

    def until_there_are(what: str) -> None:
        def look() -> bool:
            source.advance(state)
            return bool(state.logs) and what in state.logs[-1][1]

        until(look, 30)

    until_there_are("first")
    goes_on.set()
    until_there_are("no answer")
    assert ended.is_set() and len(state.logs) == 5000


def test_logs_that_are_left_are_read_no_more() -> None:
    ended = threading.Event()

    def read() -> Iterator[LogRecord | None]:
        try:
            while True:
                yield from records("again and again")
        finally:
            ended.set()

    source = LogSource(read)
    source.begin()
    source.close()
    assert ended.wait(30)


def replay(folder: RunFolder, speed: float = 1.0) -> tuple[RunState, ReplaySource]:
    return RunState(facts()), ReplaySource(folder.metrics, View("done"), speed)


def test_a_replay_goes_by_its_clock(folder: RunFolder) -> None:
    write(folder, training(0, 40))
    state, source = replay(folder, speed=10.0)
    assert source.advance(state, now=100.0) == 0.0 and step_of(state) is None
    source.advance(state, now=100.5)
    assert (step_of(state), state.state) == (9, "replay")
    source.is_paused = True
    source.advance(state, now=200.0)
    assert step_of(state) == 9
    source.is_paused = False
    source.change_speed(0.5)
    source.advance(state, now=200.25)
    assert step_of(state) == 11
    source.advance(state, now=900.0)
    assert (step_of(state), state.state, source.position.time_s) == (39, "done", 20.0)
    assert state.has_ended


def test_a_replay_goes_anywhere_and_is_as_if_it_had_come_by(folder: RunFolder) -> None:
    write(folder, [JOINED, *training(0, 3000)])
    state, source = replay(folder)
    for wanted in (2000, 100, 2999, 0, 1500):
        source.seek(STEP_S * (wanted + 1) + 0.01)
        source.advance(state, now=0.0)
        assert step_of(state) == wanted
        assert [event.text for event in state.events] == ["step 4: rank 1 joined"]
        steps = [point.step for point in state.curve.points]
        assert steps == sorted(set(steps)) and steps[-1] >= wanted - state.curve.steps_per_point
    source.skip(-2.0)
    source.advance(state, now=0.0)
    assert (source.position.time_s, step_of(state)) == (0.0, None)
    source.skip(0.5)
    source.advance(state, now=0.0)
    assert step_of(state) == 1499


def test_a_replay_that_is_behind_leaves_steps_out(folder: RunFolder) -> None:
    newest = big(folder.metrics, 64 << 20)
    state, source = replay(folder, speed=4096.0)
    source.advance(state, now=0.0)
    source.advance(state, now=0.62)  # 2539.5 s: the middle of the file
    assert step_of(state) == 5078
    source.advance(state, now=10.0)
    assert step_of(state) == newest


def test_a_file_that_is_gone_or_no_file_is_no_crash(folder: RunFolder, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="metrics"):
        replay(folder)
    write(folder, training(0, 9))
    state, source = replay(folder)
    source.seek(2.0)
    source.advance(state, now=0.0)
    folder.metrics.unlink()
    source.seek(1.0)
    source.advance(state, now=1.0)
    assert step_of(state) == 3


def test_all_events_of_a_file(folder: RunFolder) -> None:
    write(folder, [JOINED, *training(0, 700)])
    with folder.metrics.open("a") as file:
        file.write('{"event": "unknown"}\nrubbish\n')
    assert len(list(events_of(folder.metrics))) == 1 + 4 * 700
