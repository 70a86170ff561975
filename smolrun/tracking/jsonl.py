"""`metrics.jsonl`: every event of a run, one JSON object a line; the source of all other views."""

from __future__ import annotations

import contextlib
import errno
from pathlib import Path
from typing import Annotated, Any

import msgspec

from smolrun.events import Event, Note, PushApplied, PushDropped, RankStep, to_json
from smolrun.files import atomic_writer

# Rows of single ranks are most of a long run's file. After so many bytes of them only those of
# every 2nd step are written, after as many more of every 4th, and so on: the file grows with the
# logarithm of the steps. 4 ranks come to the first limit after about 50,000 steps.
_THIN_BYTES = 64 << 20
# The rows of all steps of the whole run stay, 250 bytes each: 30 million of them. A file that is
# larger is the work of a rank 0 that has been taken over.
MAX_METRICS_BYTES = 8 << 30


class JsonLines:
    """Appends events to a file, unbuffered: a line is written when it is recorded."""

    def __init__(self, path: Path) -> None:
        """Open `path` for appending; OSError if that is impossible."""
        self._file = path.open("ab", buffering=0)
        self._every = 1
        self._rank_bytes = 0  # since `every` was doubled

    def record(self, event: Event) -> None:
        """Write one line; OSError when the file has reached MAX_METRICS_BYTES."""
        row = line(event)
        if isinstance(event, RankStep | PushApplied | PushDropped):
            if event.step % self._every:
                return
            self._rank_bytes += len(row)
        if self._file.tell() + len(row) > MAX_METRICS_BYTES:
            raise OSError(errno.EFBIG, f"{self._file.name} has {MAX_METRICS_BYTES >> 30} GiB")
        self._file.write(row)
        if self._rank_bytes >= _THIN_BYTES:
            self._rank_bytes, self._every = 0, 2 * self._every
            text = f"rank_step and push rows: from here on those of every {self._every} steps only"
            self._file.write(line(Note("info", text)))

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def line(event: Event) -> bytes:
    """The event as one line, its kind, step and rank first; what is not finite becomes null."""
    data = to_json(event)
    first = {key: data.pop(key) for key in ("event", "step", "rank") if key in data}
    # Spaces after colons and commas, so that a grep for "event": "eval" finds what people expect.
    return msgspec.json.format(msgspec.json.encode({**first, **data}), indent=0) + b"\n"


def forget_from(path: Path, step: int) -> None:
    """Remove all lines of `step` and later ones, for a run that repeats these steps.

    A truncated last line is removed too. The file is replaced atomically.
    """
    if not path.exists():
        return
    with path.open("rb") as old, atomic_writer(path) as new:
        for row in old:
            try:
                number = msgspec.json.decode(row, type=dict[str, Any]).get("step")
            except (msgspec.DecodeError, RecursionError):
                continue
            if not isinstance(number, int) or number < step:
                new.write(row)


class _StepLine(msgspec.Struct, tag_field="event", tag="step"):
    tokens: Annotated[int, msgspec.Meta(ge=0, le=2**53)] = 0


def trained_tokens(path: Path) -> int:
    """The tokens (or samples) of all steps in the file; 0 if there is none."""
    decoder, tokens = msgspec.json.Decoder(_StepLine), 0
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        for row in file:
            with contextlib.suppress(ValueError, RecursionError):  # another event
                tokens += decoder.decode(row).tokens
    return tokens
