"""Waiting in tests: for a condition, never for luck."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import psutil

from tests.waiting import SOON_S

T = TypeVar("T")


def until(condition: Callable[[], T], *, within_s: float = SOON_S) -> T:
    """The first true value of `condition`; AssertionError when the time is over."""
    end = time.monotonic() + within_s
    while True:
        if value := condition():
            return value
        assert time.monotonic() < end, f"waited {within_s:g} s in vain"
        time.sleep(0.01)


def is_running(pid: int) -> bool:
    """Whether this process still runs; a zombie does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def pid_of(folder: Path, name: str) -> int:
    """The pid that a tiny worker left in a file of this name; waits for it."""
    until((folder / name).exists)
    return int((folder / name).read_text())
