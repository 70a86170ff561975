"""`smolrun -m`: every job is checked before the first starts; then they run in turn."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from smolrun import cli
from smolrun.cli import sweep
from tests.cli.command import smolrun


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[str]]:
    """The arguments of every job, none of which is really started."""
    jobs: list[list[str]] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sweep, "start_job", lambda arguments: jobs.append(arguments) or 0)
    return jobs


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["smolrun", *arguments])
    return cli.main()


def test_all_combinations_run(
    monkeypatch: pytest.MonkeyPatch, started: list[list[str]], tmp_path: Path
):
    assert (
        run(monkeypatch, "-m", "algorithm=single,classicdp", "seed=range(1,3)", "run_name=x") == 0
    )
    assert [job[-3:] for job in started] == [
        ["algorithm=single", "seed=1", "run_name=x"],
        ["algorithm=single", "seed=2", "run_name=x"],
        ["algorithm=classicdp", "seed=1", "run_name=x"],
        ["algorithm=classicdp", "seed=2", "run_name=x"],
    ]
    assert list(tmp_path.iterdir()) == []


def test_one_bad_job_stops_all_of_them(
    monkeypatch: pytest.MonkeyPatch, started: list[list[str]], capsys: pytest.CaptureFixture[str]
):
    assert run(monkeypatch, "-m", "training.steps=5,0,7", "seed=1,2") == 2
    assert started == []
    assert "training.steps = 0: too small; allowed: an integer >= 1 (job 3, 4 of 6)" in (
        capsys.readouterr().err
    )


def test_a_wrong_choice_in_one_job_is_told_with_the_rest(tmp_path: Path):
    done = smolrun(tmp_path, "-m", "algorithm=single,ep", "optimizer.lr=0.1,-1")
    assert done.code == 2
    allowed = "allowed: classicdp, edp, fsdp, mp, mp_pipeline, single, syncps"
    assert f"algorithm = ep: not built yet; {allowed} (job 3, 4 of 4)" in done.error
    assert "optimizer.lr = -1: too small; allowed: a number > 0 (job 2, 4 of 4)" in done.error
    assert done.seen == "['import hydra']"
    assert list(tmp_path.iterdir()) == []


def test_a_list_is_one_value(monkeypatch: pytest.MonkeyPatch, started: list[list[str]]):
    assert run(monkeypatch, "-m", "optimizer.betas=[0.9,0.95],[0.8,0.9]") == 0
    assert [job[-1] for job in started] == [
        "optimizer.betas=[0.9,0.95]",
        "optimizer.betas=[0.8,0.9]",
    ]


def test_an_experiment_may_name_the_axes(
    monkeypatch: pytest.MonkeyPatch, started: list[list[str]], tmp_path: Path
):
    folder = tmp_path / "conf" / "experiment"
    folder.mkdir(parents=True)
    axes = "hydra: {sweeper: {params: {seed: '1,2,3'}}}\n"
    (folder / "seeds.yaml").write_text("# @package _global_\n# Three seeds\n" + axes)
    assert run(monkeypatch, "-m", "experiment=seeds") == 0
    assert [job[-2] for job in started] == ["seed=1", "seed=2", "seed=3"]


def test_the_worst_exit_code_wins_and_a_stop_stops():
    codes = iter([0, 3, -9, 0])
    assert sweep.run_jobs([[], [], [], []], [], lambda job: next(codes)) == 3
    codes = iter([0, 130, 0])
    assert sweep.run_jobs([[], [], []], [], lambda job: next(codes)) == 130
    assert next(codes) == 0


def test_a_job_is_a_run_of_its_own(capfd: pytest.CaptureFixture[str]):
    assert sweep.start_job(["--version"]) == 0
    assert sweep.start_job(["algorithm=nonsense"]) == 2
    out = capfd.readouterr()
    assert out.out.startswith("smolrun 0.")
    assert "algorithm = nonsense" in out.err


JOB = """
import os, sys, time
from smolrun.cli import sweep
sys.executable = sys.argv[1]
print(os.getpid(), flush=True)
sys.exit(sweep.start_job([]))
"""


@pytest.mark.skipif(os.name == "nt", reason="signals of another process are a POSIX matter")
def test_a_terminated_sweep_ends_its_job(tmp_path: Path):
    fake_python = tmp_path / "python"
    fake_python.write_text("#!/bin/sh\necho job $$\nexec sleep 30\n")
    fake_python.chmod(0o755)
    process = subprocess.Popen(
        [sys.executable, "-c", JOB, str(fake_python)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    process.stdout.readline()
    job = int(process.stdout.readline().split()[1])
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 130
    with pytest.raises(ProcessLookupError):
        os.kill(job, 0)
