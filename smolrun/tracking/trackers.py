"""Trackers: readers of the events of a run, and a fan-out that isolates their failures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from smolrun.events import Event
from smolrun.tracking.tensorboard import TensorBoard
from smolrun.tracking.wandb import WandbRun


class Tracker(Protocol):
    """A reader of events, called from one thread, in the order of the events."""

    def record(self, event: Event) -> None:
        """Handle one event; must not block for long, because the driver waits."""

    def close(self) -> None:
        """The end of the events: write what is buffered."""


class Fanout:
    """Passes every event to all trackers; one that raises is disabled, with one warning."""

    def __init__(self, trackers: Sequence[Tracker], warn: Callable[[str], None]) -> None:
        """`warn` gets one sentence per tracker that breaks; it must not raise."""
        self._trackers = list(trackers)
        self._warn = warn

    def record(self, event: Event) -> None:
        """Pass the event to all trackers that are enabled; never raises."""
        for tracker in list(self._trackers):
            try:
                tracker.record(event)
            except Exception as error:  # no error of a tracker ends the run
                self._trackers.remove(tracker)
                self._warn(f"{_broken(tracker, error)}; it is disabled, the run continues")

    def close(self) -> None:
        """Close all that still work; never raises."""
        for tracker in self._trackers:
            try:
                tracker.close()
            except Exception as error:  # as above
                self._warn(f"{_broken(tracker, error)} while it closed")
        self._trackers = []


def _broken(tracker: Tracker, error: Exception) -> str:
    return f"the tracker {type(tracker).__name__} broke ({type(error).__name__}: {error})"


def make_trackers(
    kind: str,
    keys: Mapping[str, Any],
    folder: Path,
    *,
    world_size: int,
    warn: Callable[[str], None],
    note: Callable[[str], None],
) -> list[Tracker]:
    """The trackers of `tracker=kind` beside metrics.jsonl, for the run folder `folder`, which must
    hold config.yaml and metrics.jsonl.

    ConfigError where a package is missing; any other failure is reported by `warn`, and the run
    continues without the tracker.
    """
    try:
        if kind == "tensorboard":
            return [TensorBoard(folder / "tensorboard")]
        if kind == "wandb":
            run = WandbRun(folder, world_size=world_size, warn=warn, note=note, **keys)
            return [run]
    except OSError as error:
        warn(f"tracker={kind} cannot start ({error}); the run continues without it")
    return []
