"""`timeline.json`: a few steps of all ranks side by side, in Chrome's trace format.

One process per rank, one row per lane (compute, wait, network); open it in https://ui.perfetto.dev
or chrome://tracing. Times count from the barrier at which all ranks began to record.

Source: "Trace Event Format", the Chromium project.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from smolrun.events import Event, Span, Timeline
from smolrun.files import atomic_write

_LANES = ("compute", "wait", "network")
_MOST_ROWS = 100  # of a lane; what overlaps more than that shares the last one


class TimelineFile:
    """A tracker that writes the file once all ranks have sent their spans, or at the end with
    those that have."""

    def __init__(self, path: Path, hosts: Sequence[str]) -> None:
        """`hosts`: the name of each rank's host."""
        self._path = path
        self._hosts = list(hosts)
        self._timelines: dict[int, Timeline] = {}
        self._is_written = False

    def record(self, event: Event) -> None:
        """Keep a rank's spans; OSError if the file cannot be written."""
        if isinstance(event, Timeline):
            self._timelines[event.rank] = event
            if len(self._timelines) == len(self._hosts):
                self._write()

    def close(self) -> None:
        """Write the spans that have arrived; OSError if that fails."""
        if self._timelines and not self._is_written:
            self._write()

    def _write(self) -> None:
        self._is_written = True
        timelines = [self._timelines[rank] for rank in sorted(self._timelines)]
        rows = [row for timeline in timelines for row in self._rows(timeline)]
        trace = {"displayTimeUnit": "ms", "traceEvents": rows}
        atomic_write(self._path, msgspec.json.encode(trace) + b"\n")

    def _rows(self, timeline: Timeline) -> Iterator[dict[str, Any]]:
        rank = timeline.rank
        yield _name("process", rank, 0, f"rank {rank} ({self._hosts[rank]})")
        yield {**_name("process", rank, 0, ""), "name": "process_sort_index",
               "args": {"sort_index": rank}}  # fmt: skip
        named = set()
        for row, lane, (name, _, step, start_s, duration_s) in _rowed(timeline.spans):
            if row not in named:
                named.add(row)
                yield _name("thread", rank, row, lane)
            yield {
                "name": name, "cat": lane, "ph": "X", "pid": rank, "tid": row,
                "ts": round(start_s * 1e6, 1), "dur": round(duration_s * 1e6, 1),
                "args": {"step": step},
            }  # fmt: skip


def _name(kind: str, rank: int, row: int, name: str) -> dict[str, Any]:
    return {"name": f"{kind}_name", "ph": "M", "pid": rank, "tid": row, "args": {"name": name}}


def _rowed(spans: Sequence[Span]) -> Iterator[tuple[int, str, Span]]:
    """Each span with its row. Spans of one lane that overlap get rows of their own, because a row
    of this format can hold only nested spans."""
    for index, lane in enumerate(_LANES):
        ends: list[float] = []  # of the rows of this lane
        for span in sorted((span for span in spans if span[1] == lane), key=lambda span: span[3]):
            start_s, end_s = span[3], span[3] + span[4]
            free = next((row for row, end in enumerate(ends) if end <= start_s), len(ends))
            row = min(free, _MOST_ROWS - 1)
            ends[row : row + 1] = [end_s]
            yield index * _MOST_ROWS + row, lane, span
