"""Sweeps of other processes: task=status, attach, stop and clean."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from smolrun.sweep.attach import all_runs, look_at, meant_sweep
from tests.sweep.fakes import Run, command_with_fakes, newest


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """`smolrun` in an empty folder, with stand-ins for the processes of the jobs."""
    return command_with_fakes(monkeypatch, tmp_path)


def test_a_sweep_that_has_ended_is_seen_by_all_tasks(run: Run, capsys: pytest.CaptureFixture[str]):
    assert run("-m", "run_name=ok,fails") == 3
    sweep = newest()
    capsys.readouterr()

    assert run("task=status") == 0
    out = capsys.readouterr().out
    assert [line.split()[:4] for line in out.splitlines()[1:]] == [
        [sweep.path.name, "failed", "1/2", "jobs"]
    ]
    assert run("task=status", "--json") == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert (found["run"], found["kind"], found["step"], found["steps"]) == (
        sweep.path.name, "sweep", 1, 2,
    )  # fmt: skip

    assert run("task=attach", f"run={sweep.path.name[-4:]}") == 3
    said = capsys.readouterr()
    assert "1 of 2 jobs done, 1 failed" in said.out
    assert "rank 1 was lost" in said.err

    assert run("task=stop", f"run={sweep.path.name}") == 0
    assert "has ended already" in capsys.readouterr().out

    assert run("task=clean") == 0
    assert f"sweep {sweep.path.name} (failed, " in capsys.readouterr().out


def test_a_running_sweep_is_never_deleted(
    run: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    assert run("-m", "run_name=ok") == 0
    sweep = newest()
    (sweep.path / "summary.json").unlink()
    sweep.run.write_driver(1, unit="jobs")  # this process
    capsys.readouterr()
    assert look_at(sweep.run).state == "running"
    assert meant_sweep("latest") == sweep
    (tmp_path / "cache" / "data" / "mine-12").mkdir(parents=True)
    monkeypatch.setattr("platformdirs.user_cache_path", lambda name: tmp_path / "cache")
    assert run("task=clean") == 0
    out = capsys.readouterr().out
    assert f"{sweep.path.name}: running, so it stays" in out
    assert f"{sweep.path.name} uses it, so it stays" in out  # the next jobs need the data


def test_a_name_that_a_run_has_is_no_sweep(run: Run):
    assert run("-m", "run_name=ok") == 0
    alone = Path("outputs") / newest().path.name
    alone.mkdir()
    (alone / "config.yaml").touch()
    assert meant_sweep(alone.name) is None
    assert meant_sweep("latest") == newest()
    assert meant_sweep("nonsense") is None
    assert len(all_runs()) == 2


def test_a_damaged_sweep_is_still_listed(run: Run):
    assert run("-m", "run_name=ok") == 0
    newest().file.write_text("jobs: [")
    assert [look_at(folder).state for folder in all_runs()] == ["done"]
