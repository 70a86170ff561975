"""How this process and its machine are doing, as far as the system tells."""

from __future__ import annotations

import time
from typing import Any

import psutil

# Reading them costs a fraction of a millisecond; more often than this tells nothing new.
_INTERVAL_S = 0.5


class Vitals:
    """Samples the process at most every half second; None where this machine cannot tell."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._process.cpu_percent()  # the first call only starts the clock
        self._read_at = 0.0
        self._last: dict[str, Any] = {}

    def read(self) -> dict[str, Any]:
        """cpu_percent (100 is one core), memory_bytes, temperature_c, and the device's where there
        is one."""
        now = time.monotonic()
        if now - self._read_at >= _INTERVAL_S:
            self._read_at = now
            self._last = {
                "cpu_percent": self._process.cpu_percent(),
                "memory_bytes": self._process.memory_info().rss,
                "device_memory_bytes": _device_memory(),
                "temperature_c": _temperature(),
            }
        return self._last


def _temperature() -> float | None:
    sensors = getattr(psutil, "sensors_temperatures", None)  # Linux and FreeBSD only
    if sensors is None:
        return None
    try:
        sensors_now = sensors()
    except OSError:
        return None  # a machine may have sensors and not let us read them
    readings = [
        entry.current for entries in sensors_now.values() for entry in entries if entry.current
    ]
    return max(readings, default=None)


def _device_memory() -> int | None:
    import torch

    return torch.cuda.memory_allocated() if torch.cuda.is_available() else None
