"""Group `tracker`: who reads the events of a run, beside the console."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from smolrun.config.base import Section


class Tracker(Section):
    """Group `tracker`: who reads the events of a run, beside the console."""

    kind: Literal["jsonl"] = Field(description="jsonl = the file metrics.jsonl of the run's folder")
