"""The end of a run as people see it: rows and a bar in a terminal, plain lines anywhere else.

done: 300 steps in 0:00:41 (0:00:49 from start to end)
  loss             3.2145
  evaluation loss  3.4100
  time             ██████████████████▓▓▓▓░░░░░░░░
                   █ 61 % computing
                   ▓ 12 % waiting for rank 1 (1.3x slower)
                   ░ 27 % network (4.7 MB a step, 34 MB/s)
  talk to it       smolrun task=generate model.run=3fa9 prompt="Once upon a time"

Pure: figures in, text out. Nothing is cut: a terminal wraps lines that are too long for it.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
from rich.text import Text

from smolrun.sanitize import indented, one_line

_LABEL = 17  # columns
_WIDEST_BAR = 60
# Computing, waiting for slower ranks, pipeline bubble, network, other. The signs differ too, for
# terminals and people without colours.
_COLOURS = ("green", "yellow", "magenta", "cyan", "bright_black")
_SIGNS, _ASCII = "█▓▒░·", "#=+-."
_OF_STATUS = {
    "done": "bold green",
    "stopped": "bold yellow",
    "failed": "bold red",
    "died": "bold red",
}
Row = tuple[str, str]  # label and value
Shares = Annotated[
    Sequence[tuple[Annotated[float, msgspec.Meta(ge=0, le=1)], str]],
    msgspec.Meta(max_length=len(_COLOURS)),
]


@dataclass(frozen=True)
class RunEnd:
    """What is said at the end of a run. `shares` of the time add up to 1, each with its words;
    `time_line` is all of that as a sentence."""

    status: str
    headline: str
    figures: Sequence[Row] = ()
    shares: Shares = ()
    advice: str = ""
    time_line: str = ""
    notes: Sequence[Row] = ()
    prompt: str | None = None
    samples: Sequence[Row] = ()  # (when, what the model made of the prompt)
    is_answer: bool = False  # the prompt is a question, not the beginning of a text
    folder: str = ""  # of the run
    commands: Sequence[Row] = ()  # what to do next

    @classmethod
    def read(cls, stored: Any) -> RunEnd | None:
        """What `msgspec.to_builtins` made of an end; None for anything else. summary.json has it,
        and may come from another machine."""
        try:
            return msgspec.convert(stored, cls)
        except (msgspec.ValidationError, RecursionError):
            return None

    @property
    def last_rows(self) -> list[Row]:
        """What follows the figures and the time."""
        place = [("run folder", self.folder)] if self.folder else []
        return [*self.notes, *place, *self.commands]

    def lines(self) -> Iterator[str]:
        """Where there is no terminal."""
        figures = [_phrase(*row) for row in self.figures]
        yield ", ".join([self.headline, *figures])
        if self.time_line:
            yield self.time_line
        if self.is_answer:
            yield f"prompt: {self.prompt}"
        for label, text in self.samples:
            yield f"{label}: {text}" if self.is_answer else f"{label}:\n{self.prompt}{text}"
        yield from (f"{label}: {text}" for label, text in self.last_rows)

    def rows(self, width: int, *, has_blocks: bool) -> Iterator[Text]:
        """For a terminal of so many columns; `has_blocks`: it can show block characters."""
        if self.prompt is not None:
            yield from self._sample_rows(indented(self.prompt))
        yield Text(one_line(self.headline), _OF_STATUS.get(self.status, "bold"))
        yield from (_row(label, Text(one_line(value), "bold")) for label, value in self.figures)
        if self.shares:
            signs = _SIGNS if has_blocks else _ASCII
            yield _row("time", bar(self.shares, min(_WIDEST_BAR, width - _LABEL - 3), signs))
            for number, text in _shown(self.shares):
                legend = Text(signs[number], _COLOURS[number]).append(f" {text}", "default")
                yield _row("", legend)
        if self.advice:
            yield from _wrapped("faster", self.advice, width, "yellow")
        for label, text in self.notes:
            yield from _wrapped(label, text, width)
        for label, text in self.last_rows[len(self.notes) :]:  # whole, so that they can be copied
            style = "cyan" if (label, text) in self.commands else ""
            yield _row(label, Text(one_line(text), style))

    def _sample_rows(self, prompt: str) -> Iterator[Text]:
        if self.is_answer:
            yield _row("prompt", Text(prompt, "bold"))
            yield from (_row(label, Text(indented(text))) for label, text in self.samples)
        else:
            for label, text in self.samples:
                yield Text(f"{one_line(label)}, the prompt in bold:", "bright_black")
                yield Text("  ").append(prompt, "bold").append(indented(text), "default")
        yield Text()


def bar(shares: Sequence[tuple[float, str]], width: int, signs: str) -> Text:
    """The shares as stretches of `width` columns in all."""
    width = max(1, width)
    drawn, done, total = Text(), 0.0, sum(share for share, _ in shares) or 1.0
    for number, (share, _) in enumerate(shares):
        begin = round(width * done / total)
        done += share
        drawn.append(signs[number] * (round(width * done / total) - begin), _COLOURS[number])
    return drawn


def _shown(shares: Sequence[tuple[float, str]]) -> Iterator[tuple[int, str]]:
    """(number, text) of those that are not almost nothing."""
    for number, (share, what) in enumerate(shares):
        if share >= 0.005:
            yield number, f"{100 * share:.0f} % {one_line(what)}"


def _wrapped(label: str, text: str, width: int, style: str = "") -> Iterator[Text]:
    """Prose, in lines that fit beside the labels."""
    room = width - _LABEL - 3
    lines = textwrap.wrap(one_line(text), room) if room > _LABEL else [one_line(text)]
    for number, line in enumerate(lines):
        yield _row("" if number else label, Text(line, style))


def _row(label: str, value: Text) -> Text:
    return Text().append(f"  {one_line(label):<{_LABEL}}", "bright_black").append_text(value)


def _phrase(label: str, value: str) -> str:
    return f"{value} {label}" if label.endswith("/s") else f"{label} {value}"
