"""Workers that exist only in memory: each sends the lines of its script, then waits for its end.

What an attacker on a host can do to the driver is bytes on two streams, so no process is needed.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from smolrun.events import Event
from smolrun.launch.control import Address, ReadyMessage, encode
from smolrun.launch.driver import Driver
from smolrun.launch.hosts import WorkerPlan
from smolrun.launch.streams import RowSource, StreamServer
from smolrun.launch.supervisor import Limits
from smolrun.launch.supervisor_events import RunOutcome
from tests.launch.tiny_driver import Listener, plans


class ScriptedWorker:
    """One process. `reads`: whether it takes what is written to its stdin."""

    def __init__(self, lines: Iterable[bytes], log: Iterable[bytes] = (), *, reads: bool = True):
        self.written = 0
        self._lines: Iterator[bytes] = iter(lines)
        self._log = iter(log)
        self._reads = reads
        self._killed = threading.Event()

    def read_control(self) -> bytes:
        line = None if self._killed.is_set() else next(self._lines, None)
        if line is None:
            self._killed.wait(30.0)
        return line or b""

    def read_log(self) -> bytes:
        return next(self._log, b"")

    def write(self, data: bytes) -> None:
        if not self._reads:
            self._killed.wait(30.0)
            raise BrokenPipeError
        self.written += len(data)

    def close_input(self) -> None:
        pass

    def wait(self) -> int:
        self._killed.wait(30.0)
        return -9

    def out_of_memory(self) -> None:
        return None

    def lost(self) -> None:
        return None

    def is_silent(self) -> bool:
        return False

    def kill(self) -> None:
        self._killed.set()


class ScriptedHost:
    """Starts the worker of each rank; a rank without one is ready, and then says nothing."""

    def __init__(self, workers: Mapping[int, ScriptedWorker]) -> None:
        self._workers = workers

    def start(self, plan: WorkerPlan) -> ScriptedWorker:
        return self._workers.get(plan.rank) or ScriptedWorker([ready(plan.rank)])


def ready(rank: int) -> bytes:
    return encode(
        ReadyMessage(rank=rank, addresses=[Address("127.0.0.1", 5000)], pid=1, versions={})
    )


def event(kind: str, **fields: Any) -> bytes:
    """The line of an event, whatever it says."""
    return msgspec.json.encode({"type": "event", "data": {"event": kind, **fields}}) + b"\n"


def run(
    folder: Path,
    workers: Mapping[int, ScriptedWorker],
    *,
    ranks: int = 2,
    events: list[Event] | None = None,
    rows: RowSource | None = None,
) -> RunOutcome:
    """How a run with these workers ends."""
    host = ScriptedHost(workers)
    heard = events if events is not None else []
    return Driver(
        plans(folder, {}, ranks=ranks, steps=3),
        lambda plan: (plan, host),
        [*([StreamServer(rows)] if rows is not None else []), Listener(heard)],
        limits=Limits(grace_s=0.05, exit_s=0.05, settle_s=0.01, kill_s=1.0),
    ).run()
