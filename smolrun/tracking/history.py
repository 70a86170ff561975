"""What a metrics.jsonl said before some position, read fast and in bounded memory: a loss curve of
samples, the last events that are not of steps, and where to read on.

    0           256 samples of 4 KiB         |  last 4 MiB: events  |  last 192 KiB  | end
                                                                     begin: to be read line by line

The file may be of any size, be cut in the middle or hold anything. Reads only.
"""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, BinaryIO

import msgspec
from msgspec import Meta

from smolrun.files import open_regular

_SAMPLES, _SAMPLE_BYTES = 256, 4 << 10
_EVENT_BYTES = 4 << 20  # in which earlier events are looked for
_RECENT_BYTES = 192 << 10  # about 200 steps of four ranks
_SEARCH_BYTES = 1 << 20  # a step is looked for in so many; only a damaged file has more without one
_MOST_EVENTS = 200
_MOST_LINE_BYTES = 64 << 10
_SHOWN = ("membership", "checkpoint", "eval", "note", "gradient_dropped", "drift", "started")
_EVENTS = tuple(b'{"event": "%s"' % name.encode() for name in (*_SHOWN, "step_skipped"))
_STEP = b'{"event": "step"'

Whole = Annotated[int, Meta(ge=0, le=1 << 53)]


class StepSample(msgspec.Struct, frozen=True, array_like=True):
    """A step of the run."""

    step: Whole
    time_s: Annotated[float, Meta(ge=0, le=1e12)]
    loss: Annotated[float, Meta(ge=-1e12, le=1e12)] | None = None


class _Step(msgspec.Struct, tag_field="event", tag="step"):
    step: Whole
    time_s: Annotated[float, Meta(ge=0, le=1e12)]
    loss: Annotated[float, Meta(ge=-1e12, le=1e12)] | None = None


class Past(msgspec.Struct, frozen=True):
    """`events` are (step, line), in order. `file` is the inode, `begin` the position of a line from
    which on nothing of the file is in here."""

    steps: list[StepSample] = []
    events: list[tuple[Whole, str]] = []
    file: int = 0
    begin: int = 0


_decoder = msgspec.json.Decoder(_Step)


def past(path: Path, end: int | None = None) -> Past:
    """What the file says before `end` (null: its own); empty where it cannot be read."""
    try:
        with open_regular(path) as file:
            found = os.fstat(file.fileno())
            size = found.st_size if end is None else min(end, found.st_size)
            begin = line_begin(file, size - _RECENT_BYTES)
            return Past(
                steps=list(_samples(file, begin)),
                events=list(_events(file, begin)),
                file=found.st_ino,
                begin=begin,
            )
    except (OSError, ValueError):
        return Past()


def line_begin(file: BinaryIO, near: int) -> int:
    """The first position at or after `near` at which a line begins."""
    if near <= 0:
        return 0
    file.seek(near - 1)
    data = file.read(_SEARCH_BYTES)
    return near + data.find(b"\n") if b"\n" in data else near - 1 + len(data)


def _samples(file: BinaryIO, end: int) -> Iterator[StepSample]:
    """One step of each window of the file; all of them where the windows would be most of it."""
    if end <= _SAMPLES * _SAMPLE_BYTES:
        file.seek(0)
        yield from map(_sample, _steps_in(file.read(end)))
        return
    last = -1
    for number in range(_SAMPLES):
        file.seek(number * (end - _SAMPLE_BYTES) // (_SAMPLES - 1))
        data = file.read(_SAMPLE_BYTES)
        found = next(_steps_in(data if number == 0 else data.partition(b"\n")[2]), None)
        if found is not None and found.step > last:
            last = found.step
            yield _sample(found)


def _sample(step: _Step) -> StepSample:
    return StepSample(step.step, step.time_s, step.loss)


def _steps_in(data: bytes) -> Iterator[_Step]:
    for line in data.split(b"\n"):
        if line.startswith(_STEP):
            with contextlib.suppress(ValueError, RecursionError):  # cut, or of another program
                yield _decoder.decode(line)


def _events(file: BinaryIO, end: int) -> Iterator[tuple[int, str]]:
    begin = line_begin(file, end - _EVENT_BYTES)
    file.seek(begin)
    kept: deque[tuple[bytes, bytes]] = deque(maxlen=_MOST_EVENTS)
    step = b""
    for line in file.read(max(0, end - begin)).split(b"\n"):
        if line.startswith(_STEP):
            step = line
        elif line.startswith(_EVENTS) and len(line) <= _MOST_LINE_BYTES:
            kept.append((step, line))
    for step, line in kept:
        at = next(_steps_in(step), None)
        yield (0 if at is None else at.step + 1), line.decode("utf-8", "replace")


def last_step(path: Path) -> StepSample | None:
    """The last step in the file; None if there is none in its last megabyte."""
    with contextlib.suppress(OSError, ValueError), open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        file.seek(line_begin(file, size - _SEARCH_BYTES))
        found: deque[_Step] = deque(_steps_in(file.read(_SEARCH_BYTES)), maxlen=1)
        return _sample(found[0]) if found else None
    return None


def offset_at(path: Path, time_s: float) -> int:
    """A position at the begin of a line, up to which the steps of the file had ended at `time_s`.
    OSError, ValueError."""
    with open_regular(path) as file:
        low, high = 0, os.fstat(file.fileno()).st_size
        while low < high:
            middle = (low + high) // 2
            found = _step_from(file, line_begin(file, middle), high)
            if found is None or found[1].time_s > time_s:
                high = middle
            else:
                low = found[0]
        return low


def _step_from(file: BinaryIO, begin: int, end: int) -> tuple[int, _Step] | None:
    """The first step at or after `begin`, and the position after its line."""
    position = begin
    while position < min(end, begin + _SEARCH_BYTES):
        file.seek(position)
        line = file.readline(_MOST_LINE_BYTES)
        if not line:
            return None
        position += len(line)
        if (found := next(_steps_in(line), None)) is not None:
            return position, found
    return None
