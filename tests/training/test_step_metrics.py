"""System metrics, on file trees like those of a Raspberry Pi and a PC."""

from __future__ import annotations

from pathlib import Path

import pytest

from smolrun.events import RankStep
from smolrun.training.step_metrics import SystemMetrics, throttled


@pytest.mark.parametrize(
    ("bits", "expected"),
    [("0x0\n", False), ("4", True), ("50005", True), ("50000", False), ("", None)],
)
def test_throttling_of_a_raspberry_pi_is_read_from_its_bits(
    tmp_path: Path, bits: str, expected: bool | None
):
    file = tmp_path / "get_throttled"
    file.write_text(bits)
    assert throttled(file, tmp_path / "no_cpu") is expected


def cores(folder: Path, *limits: tuple[str, str]) -> Path:
    for index, (now, most) in enumerate(limits):
        core = folder / f"cpu{index}" / "cpufreq"
        core.mkdir(parents=True)
        (core / "scaling_max_freq").write_text(now)
        (core / "cpuinfo_max_freq").write_text(most)
    (folder / "cpufreq").mkdir(exist_ok=True)  # is there too, and not a core
    return folder


def test_throttling_of_a_pc_is_read_from_its_frequency_limits(tmp_path: Path):
    nothing = tmp_path / "nothing"
    full = cores(tmp_path / "full", ("3000000\n", "3000000\n"), ("3000000\n", "3000000\n"))
    capped = cores(tmp_path / "capped", ("3000000\n", "3000000\n"), ("1200000\n", "3000000\n"))
    assert throttled(nothing, full) is False
    assert throttled(nothing, capped) is True
    assert throttled(nothing, nothing) is None


def test_system_metrics_are_fields_of_the_event():
    metrics = SystemMetrics().read()
    event = RankStep(0, 0, 1.0, 1.0, None, 0, 0, **metrics)
    assert event.memory_bytes is not None
    assert event.memory_bytes > 10_000_000
