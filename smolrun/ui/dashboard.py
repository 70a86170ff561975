"""The dashboard as a textual application: one widget that shows the lines of `screen.draw`.

Four times a second the source is asked for news and the screen is drawn; only lines that have
changed are written to the terminal.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar

from rich.text import Text
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.events import Resize
from textual.geometry import Region
from textual.strip import Strip
from textual.widget import Widget

from smolrun.ui.drawing import ASCII, UNICODE, Glyphs
from smolrun.ui.run_state import RunState
from smolrun.ui.screen import Mode, Shown, draw
from smolrun.ui.sources import LiveSource, LogSource, ReplaySource

_FRAME_S = 0.25
_NOTICE_S = 4.0
_SKIP = 0.02  # of a replay


def glyphs() -> Glyphs:
    """What this terminal can show."""
    locale = os.environ.get("LC_ALL") or os.environ.get("LC_CTYPE") or os.environ.get("LANG") or ""
    is_plain = locale in ("C", "POSIX") or os.environ.get("TERM") == "linux"
    has_utf8 = (sys.__stderr__.encoding if sys.__stderr__ else "").lower().startswith("utf")
    return UNICODE if has_utf8 and not is_plain else ASCII


class ScreenLines(Widget, can_focus=True):
    """A screen of text."""

    DEFAULT_CSS = "ScreenLines { width: 100%; height: 100%; }"

    def __init__(self) -> None:
        super().__init__()
        self._lines: list[Text] = []
        self._strips: list[Strip] = []

    def show(self, lines: list[Text]) -> None:
        """Show these lines; those that are the same are left alone."""
        width = self.size.width
        if len(lines) != len(self._lines):
            self._lines, self._strips = [], []
        changed = []
        for y, line in enumerate(lines):
            if (
                y >= len(self._lines)
                or line != self._lines[y]
                or line.spans != self._lines[y].spans
            ):
                strip = Strip(line.render(self.app.console), width)
                self._strips[y : y + 1] = [strip]
                changed.append(Region(0, y, width, 1))
        is_new, self._lines = not self._lines, lines
        if is_new:
            self.refresh()
        elif changed:
            self.refresh(*changed)

    def render_line(self, y: int) -> Strip:
        """A line of the screen."""
        return self._strips[y] if y < len(self._strips) else Strip.blank(self.size.width)


class Dashboard(App[None]):
    """Shows a run until the user leaves."""

    ENABLE_COMMAND_PALETTE = False
    CSS = "Screen { background: ansi_default; color: ansi_default; overflow: hidden; }"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("q,ctrl+c,ctrl+q", "leave", priority=True),
        Binding("s", "ask_to_stop"),
        Binding("y", "answer(True)"),
        Binding("n", "answer(False)"),
        Binding("escape", "leave_mode"),
        Binding("l", "switch('logs')"),
        Binding("question_mark", "switch('help')"),
        Binding("r", "next_rank"),
        Binding("up,k", "scroll(-1)"),
        Binding("down,j", "scroll(1)"),
        Binding("pageup", "scroll(-10)"),
        Binding("pagedown", "scroll(10)"),
        Binding("space", "pause"),
        Binding("left", "skip(-1)"),
        Binding("right", "skip(1)"),
        Binding("home", "skip(-1000)"),
        Binding("end", "skip(1000)"),
        Binding("plus", "speed(2.0)"),
        Binding("minus", "speed(0.5)"),
    ]

    def __init__(
        self,
        state: RunState,
        source: LiveSource | ReplaySource,
        logs: LogSource,
        *,
        clock: Callable[[], float] = time.monotonic,
        look: Glyphs | None = None,
    ) -> None:
        super().__init__(ansi_color=True)
        self.state, self.source, self.logs = state, source, logs
        self.shown = Shown(glyphs=look or glyphs())
        self._clock = clock
        self._notice_until = 0.0
        self._now = 0.0

    def compose(self) -> ComposeResult:
        """One widget."""
        yield ScreenLines()

    def on_mount(self) -> None:
        """Begin to draw."""
        self.set_interval(_FRAME_S, self.update_screen)
        self.call_after_refresh(self.update_screen)

    def on_resize(self, event: Resize) -> None:
        """At once, as what was drawn is of another width."""
        self.call_after_refresh(self.draw)

    def update_screen(self) -> None:
        """Take up what is new, and draw."""
        now = self._clock()
        self._now = self.source.advance(self.state, now)
        self.logs.advance(self.state)
        if self.shown.notice and now > self._notice_until:
            self.shown = replace(self.shown, notice="")
        self.draw()

    def draw(self) -> None:
        """Draw what is known."""
        shown = self.shown
        if isinstance(self.source, ReplaySource):
            shown = replace(shown, position=self.source.position)
        if shown.mode == "logs":
            shown = replace(shown, log=self._log_lines())
        width, height = self.size
        self.query_one(ScreenLines).show(draw(self.state, shown, width, height, self._now))

    def _log_lines(self) -> list[tuple[str, str]]:
        of = self.shown.log_rank
        return [(line, level) for rank, line, level in self.state.logs if of in (None, rank)]

    def _say(self, text: str) -> None:
        self._notice_until = self._clock() + _NOTICE_S
        self.shown = replace(self.shown, notice=text)
        self.draw()

    def action_leave(self) -> None:
        """The run goes on."""
        self.exit()

    def action_ask_to_stop(self) -> None:
        """Only of a run that may still be running."""
        if isinstance(self.source, ReplaySource) or self.state.has_ended:
            self._say("there is nothing to stop: the run has ended")
            return
        asked = self.state.view.asked if self.state.view else 0
        how = "at once, nothing is saved" if asked else "at the next agreed step, saved"
        if self.state.facts.is_server:
            how = "at once" if asked else "once running answers have ended"
        self.shown = replace(self.shown, question=f"stop the run {how}? y, or n")
        self.draw()

    def action_answer(self, is_yes: bool) -> None:
        """To the question, if there is one."""
        if not self.shown.question:
            return
        self.shown = replace(self.shown, question="")
        if is_yes and isinstance(self.source, LiveSource):
            self.source.stop()
            self._say("a stop is requested; s again: at once")
        self.draw()

    def action_leave_mode(self) -> None:
        """To the run, without an answer to the question."""
        mode: Mode = self.shown.mode if self.shown.question else "run"
        self.shown = replace(self.shown, question="", mode=mode, scroll=0)
        self.draw()

    def action_switch(self, mode: Mode) -> None:
        """To the logs or the keys, and back."""
        mode = "run" if self.shown.mode == mode else mode
        self.shown = replace(self.shown, mode=mode, scroll=0)
        if mode == "logs":
            self.logs.begin()
        self.draw()

    def action_next_rank(self) -> None:
        """Of the logs: all, the first, ..., the last, all."""
        ranks = sorted({rank for rank, _, _ in self.state.logs if rank is not None})
        of = self.shown.log_rank
        after = [rank for rank in ranks if of is None or rank > of]
        self.shown = replace(self.shown, log_rank=after[0] if after else None, scroll=0)
        self.draw()

    def action_scroll(self, lines: int) -> None:
        """Through the ranks or, from the end on, the logs."""
        is_log = self.shown.mode == "logs"
        most = len(self._log_lines()) if is_log else len(self.state.rows(self._now))
        scroll = self.shown.scroll + (-lines if is_log else lines)
        self.shown = replace(self.shown, scroll=min(max(0, most - 1), max(0, scroll)))
        self.draw()

    def action_pause(self) -> None:
        """The replay stands still, or goes on."""
        if isinstance(self.source, ReplaySource):
            self.source.is_paused = not self.source.is_paused
            self.draw()

    def action_skip(self, times: int) -> None:
        """The replay goes on elsewhere."""
        if isinstance(self.source, ReplaySource):
            self.source.skip(_SKIP * times)
            self.update_screen()

    def action_speed(self, factor: float) -> None:
        """The replay gets faster or slower."""
        if isinstance(self.source, ReplaySource):
            self.source.change_speed(factor)
            self.draw()


def show(state: RunState, source: LiveSource | ReplaySource, logs: LogSource) -> None:
    """The dashboard on this terminal, until the user leaves or the terminal is closed."""
    try:
        Dashboard(state, source, logs).run(mouse=False)
    finally:
        source.close()
        logs.close()
