"""Whole comparisons: the end of a sweep, a full disk, and large inputs."""

from __future__ import annotations

import errno
import json
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from smolrun.comparison import compare, compare_sweep
from smolrun.comparison.run_figures import read_run
from smolrun.comparison.selection import Job, Selection
from smolrun.tracking.run_folder import RunFolder
from tests.comparison.runs import config, events, write_run
from tests.comparison.test_selection import FSDP, SWEEP, a_sweep


def test_the_end_of_a_sweep(tmp_path: Path):
    sweep, said = a_sweep(tmp_path / SWEEP), []
    page = compare_sweep(sweep.path, say=said.append)
    assert page == sweep.path / "comparison.html"
    assert [path.suffix for path in sorted(sweep.path.glob("comparison.*"))] == [
        ".csv",
        ".html",
        ".md",
    ]
    head, first, _ = (sweep.path / "comparison.csv").read_text().splitlines()
    assert head.startswith("job,status,algorithm,") and first.startswith(f'"{FSDP}",done,fsdp,')


def test_a_sweep_without_jobs_has_no_comparison(tmp_path: Path):
    said: list[str] = []
    assert compare_sweep(tmp_path, say=said.append) is None
    assert said and list(tmp_path.iterdir()) == []


def full_disk(*_: Any, **__: Any) -> Any:
    @contextmanager
    def writer() -> Iterator[None]:
        raise OSError(errno.ENOSPC, "No space left on device")
        yield

    return writer()


def test_a_full_disk_ends_no_sweep_and_leaves_no_half_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    sweep, said = a_sweep(tmp_path / SWEEP), []
    assert compare_sweep(sweep.path, say=said.append) is not None
    before = (sweep.path / "comparison.html").read_bytes()
    monkeypatch.setattr("smolrun.files.atomic_writer", full_disk)
    assert compare_sweep(sweep.path, say=said.append) is None
    assert "No space left on device" in said[-1]
    assert (sweep.path / "comparison.html").read_bytes() == before


def test_a_link_where_the_page_goes_is_replaced(tmp_path: Path):
    sweep, victim = a_sweep(tmp_path / SWEEP), tmp_path / "victim"
    victim.write_text("mine")
    (sweep.path / "comparison.html").symlink_to(victim)
    assert compare_sweep(sweep.path, say=lambda _: None) is not None
    assert victim.read_text() == "mine"


def long_run(path: Path, steps: int) -> None:
    folder = write_run(path, rows=[])
    with folder.metrics.open("w") as file:
        for number in range(0, steps, 100):
            rows = events(steps=100)
            for row in rows:
                row["step"] += number
                if row["event"] == "step":
                    row["time_s"] += number
                file.write(json.dumps(row) + "\n")


def test_a_long_run_is_read_in_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("smolrun.tracking.run_folder.MAX_SUMMARY_BYTES", 1 << 19)
    long_run(tmp_path / "a", 5000)
    folder = RunFolder(tmp_path / "a")
    tracemalloc.start()
    try:
        run = read_run(folder)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert run.steps == 5000 and run.bytes_sent == 5000 * 200
    assert peak < 1.5e6, peak  # 15,000 rows


@pytest.mark.soak
@pytest.mark.usefixtures("with_plots")
def test_a_run_of_100_000_steps_and_a_grid_of_500_jobs(tmp_path: Path):
    long_run(tmp_path / "long", 100_000)
    began = time.monotonic()
    assert read_run(RunFolder(tmp_path / "long")).steps == 100_000
    assert time.monotonic() - began < 20
    jobs = []
    for number in range(500):
        folder = write_run(
            tmp_path / f"run{number}", config(optimizer__lr=number / 1000), events(steps=100)
        )
        jobs.append(Job(folder, folder.run_id))
    began = time.monotonic()
    page = compare.compare_runs(Selection(jobs, tmp_path, "500 jobs"), say=lambda _: None)
    assert time.monotonic() - began < 60
    assert page.stat().st_size < 2e6
    assert "Plots show the first 6 of 500 rows" in page.read_text()
