"""Runs in the background: started by the command itself, and never left behind by a test."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from tests.tasks.test_whole_runs import SMALL, finish, is_alive, start
from tests.waiting import until

# Thousands of steps of a few milliseconds: long enough to be looked at, ended by the test.
LONG = [*SMALL, "training.steps=50000", "training.eval_every=0", "training.sample_tokens=0"]


class Background:
    """A detached run in `folder`."""

    def __init__(self, folder: Path, *overrides: str) -> None:
        self.folder = folder
        code, self.out, err = finish(start(folder, *LONG, "detach=true", *overrides))
        assert code == 0, err
        named = re.match(r"(\S+) runs in the background\n", self.out)
        assert named is not None
        self.run_id = named[1]
        self.path = folder / "outputs" / self.run_id
        self.driver = psutil.Process(self.read("driver.json")["pid"])

    def read(self, name: str) -> dict[str, Any]:
        read: dict[str, Any] = json.loads((self.path / name).read_text())
        return read

    def log(self) -> str:
        return (self.path / "driver.log").read_text(encoding="utf-8")

    def steps(self) -> int:
        metrics = self.path / "metrics.jsonl"
        return metrics.read_text().count('"event": "step"') if metrics.exists() else 0

    def until_it_trains(self) -> list[psutil.Process]:
        """Its workers, once it does."""
        until(lambda: self.steps() > 3, 50)
        return [child for child in self.driver.children() if is_alive(child)]

    def until_it_is_gone(self, processes: list[psutil.Process]) -> None:
        until(lambda: not any(is_alive(process) for process in (self.driver, *processes)), 20)

    def close(self) -> None:
        """Ends the driver; its workers end with it."""
        with contextlib.suppress(psutil.NoSuchProcess):
            self.driver.kill()


def process_of(rank: int, run: Path) -> psutil.Process:
    """The newest worker of that rank, as its log in the run's folder says."""
    (log,) = (run / "logs").glob(f"rank{rank}-*.log")
    pids = re.findall(rf"rank {rank} of \d+ is process (\d+)", log.read_text(encoding="utf-8"))
    return psutil.Process(int(pids[-1]))


@contextlib.contextmanager
def in_background(folder: Path, *overrides: str) -> Iterator[Background]:
    """A detached run, ended at the latest with the block."""
    run = Background(folder, *overrides)
    try:
        yield run
    finally:
        run.close()
