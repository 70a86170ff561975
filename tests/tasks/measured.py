"""Runs `smolrun` and watches how much memory its ranks ever had, beside what a dry run promises."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from smolrun.cli.compose import compose
from smolrun.driver.prepare import spec_of
from smolrun.estimate.dry_run import estimate

_LOOK_S = 0.05


@dataclass(frozen=True)
class Compared:
    """Bytes of one rank at its worst moment."""

    promised: int
    measured: int

    @property
    def ratio(self) -> float:
        return self.promised / self.measured


def compare(folder: Path, overrides: Sequence[str], *, limit_s: float = 400.0) -> Compared:
    """One run with these keys; AssertionError if it fails."""
    config = compose(list(overrides))
    made = estimate(config, spec_of(config))
    place = made.places[0]
    needs = [made.need(place, made.setting, number) for number in range(place.ranks)]
    promised = max(need.total for need in needs)
    command = [sys.executable, "-m", "smolrun.cli", *overrides]
    run = subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    peak, end = 0, time.monotonic() + limit_s
    try:
        while run.poll() is None:
            assert time.monotonic() < end, "the run takes too long"
            peak = max(peak, _largest_rank(run.pid))
            time.sleep(_LOOK_S)
    finally:
        run.kill()
        output, _ = run.communicate()
    assert run.returncode == 0, output
    return Compared(promised, peak)


def _largest_rank(driver: int) -> int:
    """The most that any child of the driver ever had; Linux keeps that figure itself."""
    found = [0]
    try:
        children = psutil.Process(driver).children()
    except psutil.NoSuchProcess:
        return 0
    for child in children:
        try:
            status = Path(f"/proc/{child.pid}/status").read_text()
        except OSError:
            continue
        found += [
            int(line.split()[1]) * 1024
            for line in status.splitlines()
            if line.startswith("VmHWM") and "--worker" in _arguments(child)
        ]
    return max(found)


def _arguments(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []
