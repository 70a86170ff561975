"""What every update reports: loss, gradient norm, times, traffic, norms by layer, and how this
process and its machine are doing."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
import torch

from smolrun.algorithms.base import Algorithm, StepResult
from smolrun.algorithms.experts import expert_tokens
from smolrun.errors import TrainingError
from smolrun.events import (
    Event,
    ExpertTokens,
    GradientDropped,
    Norms,
    RankStep,
    StepDone,
    StepSkipped,
)
from smolrun.training.trainer import Callback

# A float16 run skips a few steps while its loss scale settles; more in a row means that something
# is broken.
_MAX_SKIPPED = 20
# Reading system metrics costs a fraction of a millisecond; their sources change no faster.
_INTERVAL_S = 0.5
# A Raspberry Pi's firmware reports, as hexadecimal bits: under-voltage, frequency capped,
# throttled, soft temperature limit, all now. Higher bits: it has happened since boot.
_PI = Path("/sys/devices/platform/soc/soc:firmware/get_throttled")
_PI_NOW = 0xF
_CPU = Path("/sys/devices/system/cpu")


class StepMetrics(Callback):
    """Emits the events of every update: `RankStep` of this rank, `StepDone` of the run, `Norms`
    where they were taken, `ExpertTokens` of a model with experts, `GradientDropped` and the
    algorithm's own."""

    def __init__(self, algorithm: Algorithm, emit: Callable[[Event], None]) -> None:
        self._mesh = algorithm.context.mesh
        self._emit = emit
        self._system = SystemMetrics()
        self._bytes = (0, 0)
        self._started_at = 0.0
        self._interval_began_at = 0.0
        self._earlier_s = 0.0  # training time before the run was interrupted

    def before_training(self) -> None:
        """Starts the clocks."""
        self._bytes = (self._mesh.bytes_sent, self._mesh.bytes_received)
        self._started_at = self._interval_began_at = time.perf_counter()

    def restart_interval(self) -> None:
        """Excludes the time since the last update from the next one's tokens per second."""
        self._interval_began_at = time.perf_counter()

    def after_update(self, result: StepResult) -> None:
        """Emits the events of the update."""
        now = time.perf_counter()
        interval_s, self._interval_began_at = now - self._interval_began_at, now
        sent, received = self._mesh.bytes_sent, self._mesh.bytes_received
        figures: dict[str, Any] = {
            "compute_s": max(0.0, result.compute_s),  # a difference of sums: rounding may go below
            "wait_s": result.wait_s,
            "bytes_sent": sent - self._bytes[0],
            "bytes_received": received - self._bytes[1],
        }
        self._bytes = (sent, received)
        for event in result.events:
            self._emit(event)
        samples = result.stats.of(self._mesh.rank, "samples")
        self._emit(
            RankStep(
                result.step,
                self._mesh.rank,
                waited_for=result.waited_for,
                samples=None if samples is None else int(samples),
                **figures,
                **self._system.read(),
            )
        )
        self._emit(
            StepDone(
                step=result.step,
                time_s=self._earlier_s + now - self._started_at,
                loss=result.loss,
                grad_norm=result.grad_norm,
                lr=result.learning_rate,
                tokens=result.num_targets,
                tokens_per_s=result.num_targets / interval_s if interval_s > 0 else 0.0,
                **figures,
            )
        )
        if (norms := result.norms) is not None:
            by_kind = (norms["gradients"], norms.get("parameters"), norms.get("updates"))
            self._emit(Norms(result.step, *by_kind))
        if (experts := expert_tokens(result.stats)) is not None:
            tokens, dropped = experts
            imbalance = max(max(layer) * len(layer) / max(1, sum(layer)) for layer in tokens)
            self._emit(ExpertTokens(result.step, tokens, dropped, imbalance))
        for rank, so_far in result.late.items():
            self._emit(GradientDropped(result.step, rank, so_far))

    def state(self) -> dict[str, Any]:
        """The run's training time so far."""
        return {"time_s": self._earlier_s + time.perf_counter() - self._started_at}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continues the run's training time."""
        self._earlier_s = float(state["time_s"])


class TerminateOnNonfinite(Callback):
    """Emits `StepSkipped` for an update without a finite gradient; TrainingError after
    _MAX_SKIPPED in a row."""

    def __init__(self, algorithm: Algorithm, emit: Callable[[Event], None]) -> None:
        self._is_rounded = algorithm.context.precision.is_rounded
        self._emit = emit
        self._skipped_in_a_row = 0

    def after_update(self, result: StepResult) -> None:
        """Counts; all ranks see the same results, so all raise at the same step."""
        if result.grad_norm is not None:
            self._skipped_in_a_row = 0
            return
        self._skipped_in_a_row += 1
        self._emit(StepSkipped(result.step, list(result.nonfinite_ranks)))
        if self._skipped_in_a_row >= _MAX_SKIPPED:
            ranks = ", ".join(str(rank) for rank in result.nonfinite_ranks) or "none alone"
            raise TrainingError(
                f"{_MAX_SKIPPED} steps in a row had a gradient that is not a number, "
                f"last of rank {ranks} at step {result.step}; "
                f"lower optimizer.lr{', or try precision=float32' if self._is_rounded else ''}"
            )

    def state(self) -> dict[str, Any]:
        """The count."""
        return {"skipped_in_a_row": self._skipped_in_a_row}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continues the count."""
        self._skipped_in_a_row = int(state["skipped_in_a_row"])


class SystemMetrics:
    """Samples the process at most every half second; None where this machine does not report it."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._process.cpu_percent()  # the first call only starts the clock
        self._read_at = 0.0
        self._last: dict[str, Any] = {}
        self._has_device = self._reports_util = torch.cuda.is_available()

    def read(self) -> dict[str, Any]:
        """cpu_percent (100 is one core), memory_bytes, temperature_c, throttled, and
        device_memory_bytes, device_util where there is an accelerator."""
        now = time.monotonic()
        if now - self._read_at >= _INTERVAL_S:
            self._read_at = now
            self._last = {
                "cpu_percent": self._process.cpu_percent(),
                "memory_bytes": self._process.memory_info().rss,
                "device_memory_bytes": torch.cuda.memory_allocated() if self._has_device else None,
                "device_util": self._device_util(),
                "temperature_c": _temperature(),
                "throttled": throttled(),
            }
        return self._last

    def _device_util(self) -> float | None:
        if not self._reports_util:
            return None
        try:
            return float(torch.cuda.utilization())
        except Exception:  # the driver's library is missing or too old: many kinds of errors
            self._reports_util = False
            return None


def peak_memory() -> int | None:
    """The process's peak memory in bytes; None where the system does not record it."""
    try:
        import resource
    except ImportError:  # Windows
        return getattr(psutil.Process().memory_info(), "peak_wset", None)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(most if sys.platform == "darwin" else most * 1024)


def throttled(pi: Path = _PI, cpu: Path = _CPU) -> bool | None:
    """Whether heat or a weak power supply slows the machine down right now; None where it does not
    report that."""
    if (bits := _number(pi, 16)) is not None:
        return bits & _PI_NOW != 0
    limits = [
        (_number(core / "scaling_max_freq"), _number(core / "cpuinfo_max_freq"))
        for core in cpu.glob("cpu[0-9]*/cpufreq")
    ]
    is_limited = [now < most for now, most in limits if now is not None and most is not None]
    return any(is_limited) if is_limited else None


def _number(file: Path, base: int = 10) -> int | None:
    try:
        return int(file.read_text(encoding="ascii").strip(), base)
    except (OSError, ValueError):  # missing, not readable for us, or not an integer
        return None


def _temperature() -> float | None:
    try:
        # Linux and FreeBSD only
        sensors: dict[str, Any] = getattr(psutil, "sensors_temperatures", dict)()
    except OSError:
        return None  # sensors that we may not read
    readings = [entry.current for entries in sensors.values() for entry in entries]
    return max(filter(None, readings), default=None)
