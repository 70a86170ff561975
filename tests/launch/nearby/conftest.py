from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from smolrun.launch.nearby.pairing import ThisMachine
from tests.launch.nearby.machines import Coordinator, coordinator, machine


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Coordinator]:
    """A coordinator `anna@mini` that listens."""
    with coordinator(tmp_path) as running:
        yield running


@pytest.fixture
def joiner(tmp_path: Path) -> ThisMachine:
    """A machine `anna@pi` that nobody remembers."""
    return machine(tmp_path, "pi")
