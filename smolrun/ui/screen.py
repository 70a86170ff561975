"""A dashboard as lines of text: the state of a run in, as many lines as the terminal has out.

    title, progress, figures, verdict
    a row for each rank
    loss curve, events (side by side where there is room)
    keys

Pure. Every line is exactly as wide as the terminal, and means the same without colours.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from rich.text import Text

from smolrun.sanitize import one_line
from smolrun.tracking.formatting import clock, duration, rate, size
from smolrun.tracking.run_end import RunEnd
from smolrun.tracking.run_view import View
from smolrun.ui.drawing import UNICODE, Glyphs, curve, progress, shares_bar, sparkline
from smolrun.ui.rows import SHARES, TableRow
from smolrun.ui.run_state import EventLine, RunState

Mode = Literal["run", "logs", "help"]
_DIM = "bright_black"
_LEAST_BAR, _MOST_BAR = 8, 28
_SIDE_BY_SIDE = 110  # columns
_TALLEST_CURVE = 16
_STATUS = {
    "training": "green", "ready": "green", "serving": "green", "done": "green",
    "slow": "yellow", "late": "yellow", "throttled": "yellow", "stopped": "yellow",
    "unknown": "magenta", "starting": _DIM, "remote": "magenta",
}  # fmt: skip
_KINDS = {"joined": "green", "saved": "cyan", "late": "yellow", "warning": "yellow", "lost": "red"}
_LEVELS = {"warning": "yellow", "error": "red", "debug": _DIM}
KEYS = (
    ("q", "leave; the run continues"),
    ("s", "stop the run at the next agreed step, saved; asks first"),
    ("l", "logs of the ranks, and back"),
    ("r", "in the logs: the next rank alone, then all"),
    ("up, down", "earlier and later ranks, or lines of the logs; page up, page down: faster"),
    ("?", "these keys, and back"),
)
REPLAY_KEYS = (
    ("space", "pause, continue"),
    ("left, right", "back and forward by 2 % of the run; home, end: to its begin and end"),
    ("+, -", "twice and half the speed"),
)


@dataclass(frozen=True)
class Position:
    """Where a replay is, in seconds of the run."""

    time_s: float
    length_s: float
    speed: float
    is_paused: bool = False


@dataclass(frozen=True)
class Shown:
    """What the user has chosen to see. `scroll`: rows or lines away from where one begins."""

    mode: Mode = "run"
    glyphs: Glyphs = UNICODE
    scroll: int = 0
    log_rank: int | None = None
    log: Sequence[tuple[str, str]] = ()  # (line, level)
    question: str = ""
    notice: str = ""
    position: Position | None = None


def draw(state: RunState, shown: Shown, width: int, height: int, now: float) -> list[Text]:
    """The whole screen."""
    top = [_title(state, width), *_head(state, shown, width, height, now)]
    bottom = _footer(shown, width)
    room = max(0, height - len(top) - 1)
    if shown.mode == "help":
        middle = _help(shown, width)
    elif shown.mode == "logs":
        middle = _logs(shown, width, room)
    else:
        middle = _body(state, shown, width, room, now)
    lines = [*top, *(middle + [Text()] * room)[:room], bottom]
    return [_fitted(line, width, shown.glyphs) for line in lines[:height]]


def _fitted(line: Text, width: int, glyphs: Glyphs) -> Text:
    if not glyphs.has_blocks and not line.plain.isascii():
        line.plain = line.plain.encode("ascii", "replace").decode()
    line.truncate(width, overflow="ellipsis" if glyphs.has_blocks else "crop", pad=True)
    return line


def _title(state: RunState, width: int) -> Text:
    name, word = one_line(state.facts.name), state.state
    title = Text(name, "bold")
    title.truncate(max(1, width - len(word) - 2), overflow="crop", pad=True)
    return title.append(
        f"  {word}", _STATUS.get(word, "green" if word == "running" else "bold red")
    )


def _head(state: RunState, shown: Shown, width: int, height: int, now: float) -> list[Text]:
    lines = [_progress(state, shown, width), _figures(state, shown, width)]
    say, style = _sentence(state, now)
    most = 2 if height >= 20 else 1
    wrapped = textwrap.wrap(say, max(10, width - 2)) or [""]
    if len(wrapped) > most:
        wrapped = [*wrapped[: most - 1], " ".join(wrapped[most - 1 :])]
    return [*lines, *(Text(line, style) for line in wrapped)]


def _sentence(state: RunState, now: float) -> tuple[str, str]:
    """Who is slow and why, or what is worse."""
    if state.unreachable is not None:
        since, why = state.unreachable
        return f"no contact for {duration(max(0.0, now - since))}: {why}; trying again", "bold red"
    if state.view is not None and state.view.has_ended:
        return _end(state.view, state.verdict)
    if quiet_s := state.quiet_s(now):
        return f"no step for {duration(quiet_s)}", "bold yellow"
    if state.facts.is_server:
        load = state.server.load
        return one_line((load.reason or "") if load else "asking the server"), "yellow"
    return state.verdict or ("" if state.last else "waiting for the first step"), "yellow"


def _end(view: View, verdict: str) -> tuple[str, str]:
    """Why the run has ended, and where its time went."""
    if view.state == "died":
        return "its driver was killed, or its machine went down", "bold red"
    end = RunEnd.read(view.summary.get("end"))
    said = [view.ended.reason or "", end.time_line if end and end.time_line else verdict]
    return one_line("; ".join(filter(None, said))), "bold red" if view.state == "failed" else ""


def _progress(state: RunState, shown: Shown, width: int) -> Text:
    if state.facts.is_server:
        return _server_load(state, shown)
    done, steps = (state.last.step + 1 if state.last else 0), state.steps
    text = Text(f"step {done:,}" + (f"/{steps:,} " if steps else " "))
    after = f" {100 * done / steps:.0f} %" if steps else ""
    after += f"  {clock(state.time_s)}"
    if state.left_s is not None:
        after += f", {clock(state.left_s)} left"
    if steps:
        bar_width = max(0, min(60, width - len(text) - len(after)))
        text.append_text(progress(done / steps, bar_width, shown.glyphs))
    return text.append(after)


def _server_load(state: RunState, shown: Shown) -> Text:
    load = state.server.load
    if load is None:
        return Text()
    text = Text().append(f"{load.running} running  {load.waiting} waiting", "bold")
    rates = state.server.rates
    text.append(f"  answers {rate(rates[-1] if rates else 0.0)} tokens/s ")
    text.append(sparkline(rates, 12, shown.glyphs), "cyan")
    return text.append(f"  cache {100 * load.cache_usage:.0f} %")


def _figures(state: RunState, shown: Shown, width: int) -> Text:
    if state.facts.is_server:
        ended, summary = (state.view.ended, state.view.summary) if state.view else (None, {})
        url = (ended.url if ended else None) or ""
        return Text(one_line(f"{summary.get('model', '')} at {url}"), "cyan")
    last = state.last
    if last is None:
        return Text()
    loss = "not a number" if last.loss is None else f"{last.loss:.4f}"
    parts = [Text("loss ").append(loss, "bold")]
    if state.tokens_per_s is not None:
        speed = Text(f"{rate(state.tokens_per_s)} {state.facts.unit}/s ")
        parts.append(speed.append(sparkline(state.rates, 12, shown.glyphs), "cyan"))
    if last.grad_norm is not None:
        parts.append(Text(f"grad norm {last.grad_norm:.3g}"))
    if state.eval_loss is not None:
        parts.append(Text(f"evaluation {state.eval_loss:.4f}"))
    parts.append(Text(f"lr {last.lr:.3g}"))
    if state.unreadable:
        parts.append(Text(f"{state.unreadable} lines unreadable", "yellow"))
    line = Text()
    for part in parts:
        if line and line.cell_len + part.cell_len + 2 > width:
            break
        line = part if not line else line.append("  ").append_text(part)
    return line


def _body(state: RunState, shown: Shown, width: int, room: int, now: float) -> list[Text]:
    rows = state.rows(now)
    fit = max(1, min(len(rows), max(3, room * 3 // 5 - 1)))
    first = max(0, min(shown.scroll, len(rows) - fit))
    visible = [*rows[:1], *rows[first + 1 : first + fit]]
    lines = _table(visible, width, shown.glyphs) if rows else []
    if len(rows) > fit:
        lines.append(Text(f"{fit - 1} of {len(rows) - 1} ranks; up and down show others", _DIM))
    left = room - len(lines)
    if left > 9 and any(row.shares for row in rows):
        lines += [_legend(rows, shown.glyphs)]
        left -= 1
    has_curve = bool(state.curve.points) and not state.facts.is_server
    if width >= _SIDE_BY_SIDE and has_curve:
        half = width // 2 - 1
        events = _events(state, width - half - 2, left, shown)
        return lines + _beside(_curve(state, half, left, shown), events, half)
    share = max(0, min(_TALLEST_CURVE, left * 3 // 5)) if has_curve else 0
    if share < 4:
        share = 0
    return lines + _curve(state, width, share, shown) + _events(state, width, left - share, shown)


def _beside(left: Sequence[Text], right: Sequence[Text], width: int) -> list[Text]:
    joined = []
    for index in range(max(len(left), len(right))):
        line = left[index] if index < len(left) else Text()
        line.truncate(width, overflow="crop", pad=True)
        joined.append(line.append("  ").append_text(right[index] if index < len(right) else Text()))
    return joined


def _rule(title: str, width: int, glyphs: Glyphs) -> Text:
    line = Text().append(f"{title} ", "bold")
    return line.append(glyphs.empty * max(0, width - len(title) - 1), _DIM)


def _legend(rows: Sequence[TableRow], glyphs: Glyphs) -> Text:
    """Of the shares that there are."""
    found = [
        i
        for i in range(len(SHARES))
        if any(len(r.shares) > i and r.shares[i] >= 0.005 for r in rows)
    ]
    colours = ("green", "yellow", "magenta", "cyan", _DIM)
    line = Text()
    for index in found:
        line.append(glyphs.shares[index], colours[index]).append(f" {SHARES[index]}  ", _DIM)
    return line


def _curve(state: RunState, width: int, height: int, shown: Shown) -> list[Text]:
    if height < 3:
        return []
    points = [(point.step + 1.0, point.loss) for point in state.curve.points]
    finite = [loss for _, loss in points if loss == loss]
    high, low = f"{max(finite, default=0):.3g}", f"{min(finite, default=0):.3g}"
    edge = max(len(high), len(low)) + 1
    drawn = curve(points, max(1, width - edge), height - 1, shown.glyphs)
    labels = [high, *[""] * (height - 3), low] if height > 2 else [high]
    title = f"loss, steps {points[0][0]:,.0f} to {points[-1][0]:,.0f}"
    lines = [_rule(title, width, shown.glyphs)]
    for label, line in zip(labels, drawn, strict=False):
        lines.append(Text(f"{label:>{edge - 1}} ", _DIM).append(line, "cyan"))
    return lines


def _events(state: RunState, width: int, height: int, shown: Shown) -> list[Text]:
    if height < 2:
        return []
    recent = list(state.events)[-(height - 1) :]
    return [_rule("events", width, shown.glyphs), *(_event(event) for event in recent)]


def _event(event: EventLine) -> Text:
    step = "" if event.step is None else f"{event.step:,}"
    return Text().append(f"{step:>6} ", _DIM).append(event.text, _KINDS.get(event.kind, ""))


def _logs(shown: Shown, width: int, room: int) -> list[Text]:
    whose = "all ranks" if shown.log_rank is None else f"rank {shown.log_rank}"
    head = _rule(f"logs of {whose}", width, shown.glyphs)
    end = max(0, len(shown.log) - shown.scroll)
    recent = shown.log[max(0, end - room + 1) : end]
    lines = [Text().append(line, _LEVELS.get(level, "")) for line, level in recent]
    return [head, *(lines or [Text("nothing yet", _DIM)])]


def _help(shown: Shown, width: int) -> list[Text]:
    lines = [_rule("keys", width, shown.glyphs)]
    for key, what in (*KEYS, *(REPLAY_KEYS if shown.position else ())):
        parts = textwrap.wrap(what, max(10, width - 14)) or [""]
        lines.append(Text(f"  {key:<12}", "bold").append(parts[0], ""))
        lines += [Text(" " * 14 + part) for part in parts[1:]]
    return lines


def _footer(shown: Shown, width: int) -> Text:
    if shown.question:
        return Text(shown.question, "bold yellow")
    if shown.notice:
        return Text(shown.notice, "bold yellow")
    if shown.position is not None:
        return _replay(shown.position, shown.glyphs, width)
    keys = {"logs": "l back  r rank  ? keys", "help": "? back"}
    return Text(f"q leave  {keys.get(shown.mode, 's stop  l logs  ? keys')}", _DIM)


def _replay(at: Position, glyphs: Glyphs, width: int) -> Text:
    how = "paused" if at.is_paused else f"x{at.speed:g}"
    text = Text(f"replay {clock(at.time_s)}/{clock(at.length_s)} {how} ", "bold")
    keys = "  space pause  ? keys"
    room = width - len(text) - len(keys)
    if room >= _LEAST_BAR:
        text.append_text(progress(at.time_s / (at.length_s or 1.0), min(40, room), glyphs))
    return text.append(keys, _DIM)


@dataclass(frozen=True)
class _Column:
    title: str
    cell: Callable[[TableRow, Glyphs], str]
    is_right: bool = True
    style: Callable[[TableRow], str] = field(default=lambda row: "")


def _number(value: float | None, form: Callable[[float], str]) -> str:
    return "" if value is None else form(value)


def _speed(value: float | None) -> str:
    return "" if value is None else f"{size(value)}/s"


def _status_style(status: str) -> str:
    return _STATUS.get(status, "bold red")


def _temperature(row: TableRow, glyphs: Glyphs) -> str:
    sign = "!" if row.throttled else ""
    return _number(row.temperature_c, lambda c: f"{c:.0f}{sign}")


# In order of what is kept where there is little room; _ORDER is that on the screen.
_COLUMNS = (
    _Column("rank", lambda row, _: "all" if row.rank is None else str(row.rank)),
    _Column("status", lambda row, _: row.status, False, lambda row: _status_style(row.status)),
    _Column("tokens/s", lambda row, _: _number(row.tokens_per_s, rate)),
    _Column("host", lambda row, _: row.host[:16], False),
    _Column("layers", lambda row, _: row.layers),
    _Column("memory", lambda row, _: _number(row.memory, size)),
    _Column("out", lambda row, _: _speed(row.sent)),
    _Column("lag", lambda row, _: "" if row.lag is None else str(row.lag)),
    _Column("in", lambda row, _: _speed(row.received)),
    _Column("°C", _temperature, style=lambda row: "yellow" if row.throttled else ""),
    _Column("step", lambda row, _: _number(row.step, lambda n: f"{n:,.0f}")),
    _Column("GPU mem", lambda row, _: _number(row.device_memory, size)),
    _Column("grad", lambda row, _: _number(row.grad_norm, lambda n: f"{n:.3g}")),
    _Column("loss", lambda row, _: _number(row.loss, lambda n: f"{n:.4f}")),
    _Column("computing", lambda row, g: sparkline(row.step_s, 12, g), False, lambda row: "green"),
)  # fmt: skip
_ORDER = ("rank", "host", "layers", "status", "step", "loss", "grad", "tokens/s", "time", "out",
          "in", "memory", "GPU mem", "°C", "lag", "computing")  # fmt: skip


def _table(rows: Sequence[TableRow], width: int, glyphs: Glyphs) -> list[Text]:
    cells = {c.title: [c.cell(row, glyphs) for row in rows] for c in _COLUMNS}
    widths = {
        c.title: max(len(c.title), *map(len, cells[c.title]))
        for c in _COLUMNS
        if any(cells[c.title])  # what no rank knows is left out
    }
    has_bar = any(row.shares for row in rows)
    room = width - (_LEAST_BAR + 1 if has_bar else 0)
    kept: list[str] = []
    for title, needed in widths.items():
        if sum(widths[one] + 1 for one in kept) + needed > room and len(kept) >= 2:
            break
        kept.append(title)
    used = sum(widths[title] + 1 for title in kept)
    bar_width = min(_MOST_BAR, width - used) if has_bar else 0
    columns = {c.title: c for c in _COLUMNS}
    order = [t for t in _ORDER if t in kept or (t == "time" and bar_width > 0)]
    lines = [Text()]
    for title in order:
        wide = bar_width if title == "time" else widths[title]
        is_right = title != "time" and columns[title].is_right
        lines[0].append(f"{title:>{wide}} " if is_right else f"{title:<{wide}} ", _DIM)
    for index, row in enumerate(rows):
        line = Text(style="bold" if row.rank is None else "")
        for title in order:
            if title == "time":
                line.append_text(shares_bar(row.shares, bar_width, glyphs)).append(" ")
                continue
            column, text, wide = columns[title], cells[title][index], widths[title]
            padded = f"{text:>{wide}}" if column.is_right else f"{text:<{wide}}"
            line.append(padded, column.style(row)).append(" ")
        lines.append(line)
    for line in lines:
        line.rstrip()
    return lines
