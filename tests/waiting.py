"""Waiting in tests: for a condition, with a deadline, never for a time."""

from __future__ import annotations

import time
from collections.abc import Callable

# Bounds what ends within seconds if it does not hang, on a machine of any load. What would hang
# takes longer in every test that uses it.
SOON_S = 25.0


def until(condition: Callable[[], bool], timeout_s: float = SOON_S) -> None:
    """Returns as soon as `condition()` is true; fails after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"still not true after {timeout_s} s"
        time.sleep(0.005)
