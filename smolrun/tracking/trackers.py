"""What a reader of events is, and how several of them read one run without hurting it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from smolrun.events import Event
from smolrun.tracking.tensorboard import TensorBoard
from smolrun.tracking.wandb_run import WandbRun


class Tracker(Protocol):
    """A reader of events. It is called from one thread, in the order in which things happened."""

    def record(self, event: Event) -> None:
        """Take note of one event; should not block for long, because the driver waits."""

    def close(self) -> None:
        """Nothing more will come: write out what is still held back."""


class Fanout:
    """Hands every event to all trackers; one that raises is switched off, with one warning."""

    def __init__(self, trackers: Sequence[Tracker], warn: Callable[[str], None]) -> None:
        """`warn` gets one sentence per tracker that breaks; it must not raise."""
        self._trackers = list(trackers)
        self._warn = warn

    def record(self, event: Event) -> None:
        """Hand the event to all that still work; never raises."""
        for tracker in list(self._trackers):
            try:
                tracker.record(event)
            except Exception as error:  # a tracker is a guest: whatever it does, the run goes on
                self._trackers.remove(tracker)
                self._warn(f"{_broken(tracker, error)}; it is switched off, the run goes on")

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
    """What `tracker=kind` adds to metrics.jsonl, for the run folder `folder`, in which config.yaml
    and metrics.jsonl must be by now.

    ConfigError where a package is missing; whatever else fails is told by `warn`, and the run goes
    on without it.
    """
    try:
        if kind == "tensorboard":
            return [TensorBoard(folder / "tensorboard")]
        if kind == "wandb":
            run = WandbRun(folder, world_size=world_size, warn=warn, note=note, **keys)
            return [run]
    except OSError as error:
        warn(f"tracker={kind} cannot start ({error}); the run goes on without it")
    return []
