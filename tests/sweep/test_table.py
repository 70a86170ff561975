"""The table of a sweep: what is shown of few and of many jobs, and the time that is left."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
import rich.console

from smolrun.sweep import table
from smolrun.sweep.runner import last_words
from smolrun.sweep.table import SweepConsole, SweepProgress, counts_text, ending_lines, left_s
from smolrun.tracking.run_folder import RunFolder
from smolrun.tracking.sweep_folder import JobView, SweepFolder, SweepJob, SweepRecord


def view(number: int, state: str, cell: int | None = None, **figures: object) -> JobView:
    differs = {"algorithm": "classicdp", "optimizer.lr": f"0.{number:04}"}
    job = SweepJob(f"lr={number}", [], differs, cell=number if cell is None else cell)
    return JobView(job, state, **figures)  # type: ignore[arg-type]


def drawn(views: list[JobView], width: int, height: int, monkeypatch: pytest.MonkeyPatch) -> str:
    """The last picture on a terminal of that size, without colours."""
    stream = io.StringIO()

    def screen(**_: object) -> rich.console.Console:
        return rich.console.Console(
            file=stream, width=width, height=height, force_terminal=True, color_system=None
        )

    monkeypatch.setattr(table, "Screen", screen)
    monkeypatch.setenv("TERM", "xterm")
    record = SweepRecord("id", "0", "", [], "wall_s", [view.job for view in views])
    console = SweepConsole(SweepProgress(SweepFolder(Path("nowhere")), record))
    console.show(views)
    console.close()
    return stream.getvalue().rpartition("\x1b[2K")[2]  # behind what erases the one before


MANY = [
    *(view(n, "done", wall_s=60.0, step=200, steps=200, loss=3.5) for n in range(200)),
    view(200, "failed", reason="x"),
    *(view(n, "done", wall_s=60.0, step=200, steps=200, loss=3.5) for n in range(201, 250)),
    view(250, "running", step=50, steps=200, loss=4.25, tokens_per_s=12_345.0, left_s=45.0),
    *(view(n, "waiting") for n in range(251, 500)),
]


def test_500_jobs_fit_into_80_columns_and_24_lines(monkeypatch: pytest.MonkeyPatch):
    lines = drawn(MANY, 80, 24, monkeypatch).splitlines()
    assert len(lines) < 24
    assert all(len(line) <= 80 for line in lines[1:-1])  # without the cursor's codes
    shown = "\n".join(lines)
    assert "0.0250" in shown and "running" in shown  # what runs
    assert "0.0200" in shown and "failed" in shown
    assert "0.0249" in shown and "0.0251" in shown  # the newest and the next
    assert "0.0499" not in shown
    assert "249 of 500 jobs done, 1 failed, 1 running, 249 waiting" in shown
    assert "not shown" in shown
    assert "4:09:45 left" in shown  # 249 of a minute, and 45 s of the running one


def test_a_few_jobs_are_all_shown(monkeypatch: pytest.MonkeyPatch):
    views = [view(1, "done", wall_s=5.0), view(2, "running", step=3, steps=9, left_s=2.0)]
    shown = drawn(views, 100, 30, monkeypatch)
    assert "classicdp" in shown and "0.0001" in shown and "0:00:05" in shown
    assert "3/9" in shown and "0:00:02 left" in shown
    assert "not shown" not in shown


def test_many_keys_become_one_column(monkeypatch: pytest.MonkeyPatch):
    differs = {f"training.a_long_key_{n}": f"a_long_value_{n}" for n in range(8)}
    jobs = [SweepJob(f"j{n}", [], differs, n) for n in range(2)]
    shown = drawn([JobView(job, "waiting") for job in jobs], 80, 24, monkeypatch)
    assert "job" in shown and "\u2026" in shown and "waiting" in shown


def test_the_time_left_is_that_of_the_same_cell():
    done = [view(0, "done", cell=0, wall_s=10.0), view(1, "done", cell=1, wall_s=100.0)]
    assert left_s([*done, view(2, "waiting", cell=1)]) == 100.0
    assert left_s([*done, view(2, "waiting", cell=5)]) == 55.0
    assert left_s([view(0, "waiting")]) is None
    assert left_s(done) == 0.0


def test_a_job_that_will_run_again_waits(tmp_path: Path):
    """Also for those that attach: what it was before the sweep was resumed is not kept."""
    jobs = [SweepJob(name, [], {}, n) for n, name in enumerate(("failed", "stopped", "done"))]
    sweep = SweepFolder(tmp_path)
    progress = SweepProgress(sweep, SweepRecord("id", "0", "", [], "wall_s", jobs))
    for job in jobs:
        sweep.job(job.name).path.mkdir()
        sweep.job(job.name).write_summary({"status": job.name})
    before = (tmp_path / "failed" / "summary.json").stat().st_mtime_ns

    def states(**how: bool) -> list[str]:
        return [view.state for view in progress.look(**how)]

    assert states() == ["failed", "stopped", "done"]
    (tmp_path / "driver.json").touch()
    os.utime(tmp_path / "driver.json", ns=(before + 10**9, before + 10**9))
    assert states() == ["waiting", "waiting", "done"]
    assert states(is_alive=False) == ["failed", "stopped", "done"]
    sweep.job("failed").write_summary({"status": "done"})
    os.utime(tmp_path / "failed" / "summary.json", ns=(before + 2 * 10**9, before + 2 * 10**9))
    assert states() == ["done", "waiting", "done"]


def test_the_last_lines_name_what_failed_with_its_log():
    views = [view(1, "failed", reason="a\nb"), view(2, "stopped"), view(3, "done")]
    lines = ending_lines(SweepFolder(Path("outputs/sweeps/s")), views)
    assert lines[0] == "1 of 3 jobs failed:"
    assert "algorithm=classicdp optimizer.lr=0.0001: a b; log: " in lines[1]
    assert lines[2] == "to run the other 2 jobs: smolrun -m sweep.resume=s"
    assert counts_text(views) == "1 of 3 jobs done, 1 failed, 1 stopped"


def test_the_reason_of_a_job_that_failed_before_it_trained_is_what_it_printed(tmp_path: Path):
    log = tmp_path / "driver.log"
    problem = "one problem in the configuration, nothing was started:"
    log.write_text(f"preparing\nsmolrun: {problem}\n  optimizer.lr = -1: too small\nThe help\n")
    assert last_words(RunFolder(tmp_path), 2) == (
        f"{problem} optimizer.lr = -1: too small (exit code 2)"
    )
    log.write_text("Traceback\nKeyError: 'x'\n\n")
    assert last_words(RunFolder(tmp_path), 1) == "KeyError: 'x' (exit code 1)"
    log.unlink()
    assert last_words(RunFolder(tmp_path), 1) == "exit code 1"
