"""A driver process for tests: runs tiny workers as its one argument (JSON) says.

Prints the outcome and exits with its code.

Also imported by tests that run a driver in their own process.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from smolrun.events import Event, Note
from smolrun.launch.control import StartMessage
from smolrun.launch.driver import Driver, Subscriber
from smolrun.launch.elastic_worker import Elasticity
from smolrun.launch.hosts import WorkerPlan
from smolrun.launch.local import LocalHost
from smolrun.launch.streams import RowSource, StreamServer
from smolrun.launch.supervisor import Limits

WORKER = [sys.executable, str(Path(__file__).with_name("tiny_worker.py"))]
SECRET = "5ec4e7" * 10 + "0000"


def plans(folder: Path, behave: dict[str, str], *, ranks: int, steps: int) -> list[WorkerPlan]:
    config = {"folder": str(folder), "behave": behave, "steps": steps}
    return [
        WorkerPlan(
            StartMessage(
                rank=rank,
                world_size=ranks,
                host="local",
                run_id="tiny",
                config=config,
                config_hash="0",
                secret=SECRET,
                addresses=["127.0.0.1"],
                device="cpu",
                threads=1,
            ),
            folder / "logs" / f"rank{rank}-local.log",
        )
        for rank in range(ranks)
    ]


class Listener(Subscriber):
    """Appends events to a list."""

    def __init__(self, events: list[Event]) -> None:
        self._events = events

    def on_event(self, event: Event) -> None:
        self._events.append(event)


def make_driver(
    folder: Path,
    behave: dict[str, str] | None = None,
    *,
    ranks: int = 2,
    steps: int = 3,
    events: list[Event] | None = None,
    command: list[str] | None = None,
    lease_every_s: float = 0.2,
    rows: RowSource | None = None,
    stop_requests: Callable[[], int] = lambda: 0,
    elastic: Elasticity | None = None,
    **limits: Any,
) -> Driver:
    host = LocalHost(command or WORKER)
    heard = events if events is not None else []

    class Touch(Listener):
        def on_event(self, event: Event) -> None:
            super().on_event(event)
            if not isinstance(event, Note):
                (folder / "heard").touch()

    return Driver(
        plans(folder, behave or {}, ranks=ranks, steps=steps),
        lambda plan: (plan, host),
        [*([StreamServer(rows)] if rows is not None else []), Touch(heard)],
        limits=Limits(lease_every_s=lease_every_s, **limits),
        stop_requests=stop_requests,
        elastic=elastic,
    )


if __name__ == "__main__":
    options = json.loads(sys.argv[1])
    outcome = make_driver(Path(options.pop("folder")), **options).run()
    print(json.dumps({"status": outcome.status, "reason": outcome.reason}), flush=True)
    sys.exit(outcome.exit_code)
