"""For the tests of the launcher: drivers in processes of their own, and nobody left behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.launch.deadline import is_running, until
from tests.launch.driver_process import DriverProcess


@pytest.fixture(autouse=True)
def nobody_is_left(tmp_path: Path) -> Iterator[None]:
    """No test of this folder may leave a tiny worker, or a worker's child, running."""
    yield
    pids = [int(path.read_text()) for path in tmp_path.iterdir() if path.name[:3] in ("pid", "chi")]
    until(lambda: not any(map(is_running, pids)), within_s=2.0)


@pytest.fixture
def start_driver(tmp_path: Path) -> Iterator[Callable[..., DriverProcess]]:
    started: list[DriverProcess] = []

    def start(**options: Any) -> DriverProcess:
        started.append(DriverProcess(tmp_path, **options))
        return started[-1]

    yield start
    for driver in started:
        driver.process.kill()
        driver.process.communicate(timeout=50)
