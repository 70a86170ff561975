"""Events as named numbers, and the numbers of one step as one row: what charts are made of.

    {"event": "step", "step": 7, "loss": 2.3}          train/loss
    {"event": "eval", "step": 7, "loss": 2.4}          eval/loss
    {"event": "rank_step", "rank": 1, "wait_s": 0.1}   rank1/wait_s
    {"event": "norms", "gradients": {"head": 0.2}}     norm/gradients/head
    {"event": "saved", "step": 7, "bytes": 12}         saved/bytes: so does any other with a step

Knows nothing of the trackers that draw the charts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

_PREFIXES = {"step": "train", "norms": "norm", "expert_tokens": "experts"}
# Keys that are no numbers of a chart, and those that rank 0 sends again in its rank_step.
_NOT_FIGURES = frozenset(["event", "step", "rank", "is_answer"])
_OF_RANK_0 = frozenset(["bytes_sent", "bytes_received", "compute_s", "wait_s"])
# Bounds the rows that wait for a rank which reports no steps (a server).
_MOST_OPEN_ROWS = 64


def figures(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of an event in its JSON form, by the names of their charts; what is null or not
    finite is left out."""
    kind, rank = row.get("event"), row.get("rank")
    prefix = _PREFIXES.get(str(kind), str(kind))
    if kind == "rank_step":
        prefix = f"rank{rank}"
    skipped = _OF_RANK_0 if kind == "step" else frozenset[str]()
    fields = {key: row[key] for key in row if key not in _NOT_FIGURES and key not in skipped}
    return dict(_numbers(prefix, fields))


def _numbers(prefix: str, fields: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for key, value in fields.items():
        if isinstance(value, Mapping):
            yield from _numbers(f"{prefix}/{key}", value)
        elif isinstance(value, int | float) and math.isfinite(value):
            yield f"{prefix}/{key}", value if isinstance(value, float) else int(value)


class StepRows:
    """Gathers the events of a step into one row. A row is complete when every rank has reported a
    later step, because the events of one rank arrive in order."""

    def __init__(self, world_size: int, *, first_step: int = 0) -> None:
        """Steps before `first_step` are left out: a resumed run repeats some that are known."""
        self._open: dict[int, dict[str, float]] = {}
        self._reached = dict.fromkeys(range(world_size), -1)
        self._next = first_step

    def add(self, row: Mapping[str, Any]) -> list[tuple[int, dict[str, float]]]:
        """Add an event in its JSON form; returns the rows that are complete now."""
        step = row.get("step")
        if not isinstance(step, int) or step < self._next:
            return []
        self._open.setdefault(step, {}).update(figures(row))
        if row.get("event") == "rank_step":
            self._reached[int(row["rank"])] = step
        complete = [open_ for open_ in sorted(self._open) if open_ < min(self._reached.values())]
        surplus = len(self._open) - len(complete) - _MOST_OPEN_ROWS
        if surplus > 0:
            complete = sorted(self._open)[: len(complete) + surplus]
        return self._take(complete)

    def rest(self) -> list[tuple[int, dict[str, float]]]:
        """The remaining rows, at the end of the events."""
        return self._take(sorted(self._open))

    def _take(self, steps: list[int]) -> list[tuple[int, dict[str, float]]]:
        if steps:
            self._next = steps[-1] + 1
        return [(step, numbers) for step in steps if (numbers := self._open.pop(step))]
