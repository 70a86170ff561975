"""The dashboard by its keys, on terminals without a screen."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from textual.pilot import Pilot

from smolrun.log_records import LogRecord
from smolrun.tracking.run_view import View
from smolrun.ui import dashboard
from smolrun.ui.dashboard import Dashboard, ScreenLines, glyphs
from smolrun.ui.drawing import ASCII, UNICODE
from smolrun.ui.run_state import RunState
from smolrun.ui.sources import LiveSource, LogSource, ReplaySource
from tests.tracking.test_past_runs import a_run
from tests.ui.made import facts, lines, trained, training, view, write
from tests.waiting import until

Script = Callable[[Pilot[None], Dashboard], Awaitable[None]]


LOGS = [
    LogRecord(
        datetime(2026, 1, 31, tzinfo=UTC),
        rank,
        f"mini{rank + 1}",
        "info",
        None,
        f"word {n} of {rank}",
    )
    for n in range(40)
    for rank in (0, 1)
]


class FakeLive(LiveSource):
    """News that a test gives."""

    def __init__(self) -> None:
        self.news: list[View] = []
        self.stops, self.is_closed = 0, False

    def advance(self, state: RunState, now: float) -> float:
        while self.news:
            state.apply(self.news.pop(0), 20.0)
        return 20.0

    def stop(self) -> None:
        self.stops += 1

    def close(self) -> None:
        self.is_closed = True


def used(
    script: Script,
    source: Any = None,
    state: RunState | None = None,
    size: tuple[int, int] = (80, 24),
    **look: Any,
) -> Dashboard:
    """A dashboard after what `script` did with it."""
    logs = LogSource(lambda: (record for record in LOGS))
    app = Dashboard(state or trained(40), source or FakeLive(), logs, look=UNICODE, **look)

    async def run() -> None:
        async with app.run_test(size=size) as pilot:
            await pilot.pause()
            app.update_screen()
            await pilot.pause()
            await script(pilot, app)

    asyncio.run(run())
    return app


def text(app: Dashboard) -> str:
    """What is on the screen."""
    lines = app.query_one(ScreenLines)
    return "\n".join(lines.render_line(y).text for y in range(app.size.height))


async def press(pilot: Pilot[None], *keys: str) -> str:
    await pilot.press(*keys)
    await pilot.pause()
    return text(pilot.app)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [(80, 24), (120, 40), (40, 15)])
def test_it_shows_the_run_and_what_is_new(size: tuple[int, int]) -> None:
    source = FakeLive()

    async def script(pilot: Pilot[None], app: Dashboard) -> None:
        assert "step 40/100" in text(app) and "slow" in text(app)
        source.news.append(view(lines(training(40, 45))))
        app.update_screen()
        await pilot.pause()
        assert "step 45/100" in text(app)
        assert {len(line) for line in text(app).split("\n")} == {size[0]}

    used(script, source, size=size)


def test_a_resize_draws_all_of_it_anew() -> None:
    async def script(pilot: Pilot[None], app: Dashboard) -> None:
        for width, height in ((120, 40), (40, 12), (80, 24), (5, 3)):
            await pilot.resize_terminal(width, height)
            await pilot.pause()
            await pilot.pause()
            shown = text(app).split("\n")
            assert (len(shown), {len(line) for line in shown}) == (height, {width})
            assert shown[0].strip()

    used(script)


def test_the_run_is_stopped_only_after_a_yes() -> None:
    source = FakeLive()

    async def script(pilot: Pilot[None], app: Dashboard) -> None:
        assert "stop the run" not in await press(pilot, "y")
        question = "stop the run at the next agreed step, saved? y, or n"
        assert question in await press(pilot, "s")
        assert "stop the run" not in await press(pilot, "n")
        assert "stop the run" not in await press(pilot, "s", "escape", "y")
        assert source.stops == 0
        assert "a stop is requested" in await press(pilot, "s", "y")
        assert source.stops == 1
        source.news.append(view([], asked=1))
        app.update_screen()
        assert "stop the run at once, nothing is saved?" in await press(pilot, "s")
        await press(pilot, "y")
        assert source.stops == 2
        source.news.append(view([], "stopped"))
        app.update_screen()
        assert "there is nothing to stop" in await press(pilot, "s", "y")
        assert source.stops == 2

    used(script, source)


def test_leaving_leaves_the_run_on() -> None:
    source = FakeLive()

    async def script(pilot: Pilot[None], app: Dashboard) -> None:
        await pilot.press("q")

    app = used(script, source)
    assert app.return_code == 0 and source.stops == 0


def test_logs_by_rank_and_the_keys() -> None:
    async def script(pilot: Pilot[None], app: Dashboard) -> None:
        assert "logs of all ranks" in await press(pilot, "l")
        until(lambda: app.update_screen() or len(app.state.logs) == len(LOGS), 30)
        shown = text(app)
        assert "rank 0 mini1" in shown and "word 39 of 0" in shown and "word 39 of 1" in shown
        shown = await press(pilot, "r", "r")
        assert "logs of rank 1" in shown and "of 0" not in shown
        assert "word 39 of 1" not in await press(pilot, "pageup")
        assert "logs of all ranks" in await press(pilot, "r")
        assert "leave; the run continues" in await press(pilot, "question_mark")
        assert "rank host" in await press(pilot, "escape")
        assert "rank host" in await press(pilot, "l", "l")

    used(script)


def test_a_replay_by_its_keys(tmp_path: Any) -> None:
    folder = a_run(tmp_path)
    write(folder, training(0, 100))
    source = ReplaySource(folder.metrics, View("done"), 10.0)
    now = [0.0]

    async def script(pilot: Pilot[None], app: Dashboard) -> None:
        now[0] += 1.0
        app.update_screen()
        await pilot.pause()
        assert "step 20/100" in text(app) and "0:00:10/0:00:50 x10" in text(app)
        assert "paused" in await press(pilot, "space")
        assert "step 24/100" in await press(pilot, "right", "right")
        assert "step 22/100" in await press(pilot, "left")
        assert "step 100/100" in await press(pilot, "end")
        assert "step 0/100" in await press(pilot, "home")
        assert "x20" in await press(pilot, "space", "plus") and "x10" in await press(pilot, "minus")
        assert "there is nothing to stop" in await press(pilot, "s")

    used(script, source, RunState(facts()), clock=lambda: now[0])


def test_only_lines_that_changed_are_written() -> None:
    source = FakeLive()

    async def script(pilot: Pilot[None], app: Dashboard) -> None:
        widget = app.query_one(ScreenLines)
        before = list(widget._strips)
        source.news.append(view(lines(training(40, 41))))
        app.update_screen()
        same = [old is new for old, new in zip(before, widget._strips, strict=True)]
        assert same[0] and not same[1] and same[-1]

    used(script, source)


def test_a_terminal_without_utf8(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    monkeypatch.setattr(dashboard.sys, "__stderr__", stream)
    for name in ("LC_ALL", "LC_CTYPE", "LANG", "TERM"):
        monkeypatch.delenv(name, raising=False)
    assert glyphs() is UNICODE
    for name, value in (("LANG", "C"), ("LC_ALL", "POSIX"), ("TERM", "linux")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert glyphs() is ASCII
    ascii_stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(dashboard.sys, "__stderr__", ascii_stream)
    assert glyphs() is ASCII
