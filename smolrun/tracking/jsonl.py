"""`metrics.jsonl`: every event of a run, one JSON object a line; all other views come second."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec

from smolrun.events import Event, to_json


class JsonLines:
    """Appends events to a file. A line is in the system's hands as soon as it is recorded."""

    def __init__(self, path: Path) -> None:
        """Open `path` for appending; OSError if that is impossible."""
        self._file = path.open("ab", buffering=0)

    def record(self, event: Event) -> None:
        """Write one line."""
        self._file.write(line(event))

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
    """Takes away all lines about `step` and later ones, for a run that does these steps again.

    A last line that was cut short goes too. The file is whole at every moment.
    """
    if not path.exists():
        return
    fresh = path.with_name(f".{path.name}.part")
    with path.open("rb") as old, fresh.open("wb") as new:
        for row in old:
            try:
                number = msgspec.json.decode(row, type=dict[str, Any]).get("step")
            except (msgspec.DecodeError, RecursionError):
                continue
            if not isinstance(number, int) or number < step:
                new.write(row)
    os.replace(fresh, path)
