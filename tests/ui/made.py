"""Runs made by hand, for dashboards."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from smolrun.events import CheckpointSaved, Event, GradientDropped, Membership, RankStep, StepDone
from smolrun.tracking.bottleneck import RunSetup
from smolrun.tracking.history import past
from smolrun.tracking.jsonl import line
from smolrun.tracking.run_folder import RunFolder
from smolrun.tracking.run_view import Chunk, FilePosition, View
from smolrun.ui.run_state import RunFacts, RunState

STEP_S = 0.5
HOSTS = ("mini1", "mini2", "pi5")


def setup(hosts: tuple[str, ...] = HOSTS) -> RunSetup:
    size = len(hosts)
    return RunSetup(hosts, [None] * size, [1.0] * size, global_batch_size=24)


def facts(hosts: tuple[str, ...] = HOSTS, **changes: Any) -> RunFacts:
    given = {"steps": 100, "setup": setup(hosts), **changes}
    return RunFacts("20260131-142501-x-aaaa", hosts, **given)


def rank_step(step: int, rank: int, compute_s: float = 0.1, **changes: Any) -> RankStep:
    given: dict[str, Any] = {
        "wait_s": 0.4 - compute_s, "waited_for": None, "bytes_sent": 1_000_000,
        "bytes_received": 2_000_000, "samples": 8, "memory_bytes": 500_000_000, **changes,
    }  # fmt: skip
    return RankStep(step=step, rank=rank, compute_s=compute_s, **given)


def step_done(step: int, **changes: Any) -> StepDone:
    given: dict[str, Any] = {
        "time_s": STEP_S * (step + 1), "loss": 4.0 - 0.01 * step, "grad_norm": 0.9, "lr": 3e-4,
        "tokens": 2400, "tokens_per_s": 4800.0, "bytes_sent": 1, "bytes_received": 1,
        "compute_s": 0.1, "wait_s": 0.3, **changes,
    }  # fmt: skip
    return StepDone(step=step, **given)


def training(
    first: int,
    last: int,
    hosts: tuple[str, ...] = HOSTS,
    compute_s: Mapping[int, float] = {2: 0.35},
) -> Iterator[Event]:
    """The events of these steps; rank 2 is the slow one."""
    for step in range(first, last):
        for rank in range(len(hosts)):
            yield rank_step(step, rank, compute_s.get(rank, 0.1))
        yield step_done(step)


def lines(events: Iterator[Event] | list[Event]) -> list[str]:
    return [line(event).decode().removesuffix("\n") for event in events]


def trained(last: int = 40, **changes: Any) -> RunState:
    state = RunState(facts(**changes))
    state.apply(view(lines(training(0, last))), now=STEP_S * last)
    return state


def view(new: list[str] | None = None, state: str = "running", **changes: Any) -> View:
    return View(state, metrics=Chunk(new or [], FilePosition(1, 1)), **changes)  # type: ignore[arg-type]


def write(folder: RunFolder, events: Iterator[Event] | list[Event]) -> None:
    with folder.metrics.open("a", encoding="utf-8") as file:
        file.writelines(f"{row}\n" for row in lines(events))


def looked_at(folder: RunFolder, state: str = "running", **changes: Any) -> View:
    """As a first look at the files of a run."""
    earlier = past(folder.metrics)
    text = folder.metrics.read_bytes()[earlier.begin :].decode()
    chunk = Chunk(text.splitlines(), FilePosition(earlier.file, folder.metrics.stat().st_size))
    return View(state, past=earlier, metrics=chunk, **changes)  # type: ignore[arg-type]


JOINED = Membership(step=3, rank=1, is_here=True, reason="joined", tickets=0)
LEFT = Membership(step=5, rank=1, is_here=False, reason="its process was killed", tickets=2)
LATE = GradientDropped(step=7, rank=2, so_far=1)
SAVED = CheckpointSaved(step=9, folder="step-00000010", bytes=12_000_000, waited_s=0.0, write_s=0.1)
HOSTILE = json.dumps(
    {"event": "note", "rank": None, "level": "warning", "message": "\x1b[2J\u202eevil\x07\nnext"}
)
