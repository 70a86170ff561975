"""Says each minute, and at the end, where the time goes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from smolrun.events import Event, RunStarted, StepDone
from smolrun.tracking.verdict import Setup, TimeShares, Verdict, judge

_EVERY_S = 60.0


class TimeTeller:
    """A tracker that hands a sentence to `say` every minute of training."""

    def __init__(self, setup: Setup, say: Callable[[str], None]) -> None:
        """`setup.can_use_bf16` counts only where the device turns out to be an accelerator."""
        self._setup = setup
        self._say = say
        self._shares = TimeShares(len(setup.hosts))
        self._due_s: float | None = None

    def record(self, event: Event) -> None:
        """Sum up; speak once a minute."""
        self._shares.record(event)
        if isinstance(event, RunStarted):
            can = self._setup.can_use_bf16 and event.device != "cpu"
            self._setup = dataclasses.replace(self._setup, can_use_bf16=can)
        elif isinstance(event, StepDone):
            if self._due_s is None:  # a resumed run does not begin at 0
                self._due_s = event.time_s + _EVERY_S
            elif event.time_s >= self._due_s:
                self._due_s = event.time_s + _EVERY_S
                if (recent := judge(self._shares.take_recent(), self._setup)) is not None:
                    self._say(f"where the time goes: {recent.line}")

    def close(self) -> None:
        """Nothing is held back."""

    @property
    def verdict(self) -> Verdict | None:
        """On the whole run; None as long as there is nothing to say."""
        return judge(self._shares.run, self._setup)

    @property
    def line(self) -> str:
        """The last sentence of a run; empty if there is none."""
        return f"where the time went: {self.verdict.line}" if self.verdict else ""

    def summary(self) -> dict[str, Any] | None:
        """For summary.json."""
        return self.verdict.as_json() if self.verdict else None
