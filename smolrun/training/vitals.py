"""How this process and its machine are doing, as far as the system tells."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

# Reading them costs a fraction of a millisecond; more often than this tells nothing new.
_INTERVAL_S = 0.5
# A Raspberry Pi's firmware tells, as hexadecimal bits: under-voltage, frequency capped, throttled,
# soft temperature limit, all now. Higher bits say that it has happened since boot.
_PI = Path("/sys/devices/platform/soc/soc:firmware/get_throttled")
_PI_NOW = 0xF
_CPU = Path("/sys/devices/system/cpu")


class Vitals:
    """Samples the process at most every half second; None where this machine cannot tell."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._process.cpu_percent()  # the first call only starts the clock
        self._read_at = 0.0
        self._last: dict[str, Any] = {}
        self._device_util = _device_util_reader()

    def read(self) -> dict[str, Any]:
        """cpu_percent (100 is one core), memory_bytes, temperature_c, throttled, and the device's
        where there is one."""
        now = time.monotonic()
        if now - self._read_at >= _INTERVAL_S:
            self._read_at = now
            self._last = {
                "cpu_percent": self._process.cpu_percent(),
                "memory_bytes": self._process.memory_info().rss,
                "device_memory_bytes": _device_memory(),
                "device_util": self._device_util(),
                "temperature_c": _temperature(),
                "throttled": throttled(),
            }
        return self._last


def peak_memory() -> int | None:
    """The most memory this process ever had, in bytes; None where the system keeps no such mark."""
    try:
        import resource
    except ImportError:  # Windows
        return getattr(psutil.Process().memory_info(), "peak_wset", None)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(most if sys.platform == "darwin" else most * 1024)


def throttled(pi: Path = _PI, cpu: Path = _CPU) -> bool | None:
    """Whether the machine makes itself slower right now, by heat or a weak power supply; None where
    it does not tell."""
    if (bits := _number(pi, 16)) is not None:
        return bits & _PI_NOW != 0
    limits = [
        (_number(core / "scaling_max_freq"), _number(core / "cpuinfo_max_freq"))
        for core in cpu.glob("cpu[0-9]*/cpufreq")
    ]
    told = [now < most for now, most in limits if now is not None and most is not None]
    return any(told) if told else None


def _number(file: Path, base: int = 10) -> int | None:
    try:
        return int(file.read_text(encoding="ascii").strip(), base)
    except (OSError, ValueError):  # not there, not ours to read, or not a number
        return None


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


def _device_util_reader() -> Callable[[], float | None]:
    """A function that tells the load of the accelerator; where it once cannot, it never can."""
    import torch

    can_tell = torch.cuda.is_available()

    def read() -> float | None:
        nonlocal can_tell
        if not can_tell:
            return None
        try:
            return float(torch.cuda.utilization())
        except Exception:  # the driver's own library is missing or too old: many kinds of errors
            can_tell = False
            return None

    return read
