"""A driver in a process of its own, which a test may mistreat."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.launch.deadline import pid_of
from tests.waiting import until

TINY_DRIVER = Path(__file__).with_name("tiny_driver.py")


class DriverProcess:
    """A driver in a process of its own, which a test may mistreat."""

    def __init__(
        self, folder: Path, environment: dict[str, str] | None = None, **options: Any
    ) -> None:
        self.folder = folder
        argument = json.dumps({"folder": str(folder), **options})
        self.process = subprocess.Popen(
            [sys.executable, str(TINY_DRIVER), argument],
            stdout=subprocess.PIPE,
            env={**os.environ, **(environment or {})},
            text=True,
        )

    def worker_pids(self, ranks: int, state: str = "pid") -> list[int]:
        return [pid_of(self.folder, f"{state}{rank}") for rank in range(ranks)]

    def wait_until_it_heard(self) -> None:
        """Until some rank has told the driver of its work: the run has begun then."""
        until((self.folder / "heard").exists)

    def outcome(self) -> tuple[int, dict[str, Any]]:
        output, _ = self.process.communicate(timeout=50)
        return self.process.returncode, json.loads(output)
