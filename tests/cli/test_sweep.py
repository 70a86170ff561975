"""`smolrun -m`: every job is checked before the first starts; then they run in turn."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from smolrun.cli import driver, sweep
from smolrun.cli.compose import compose
from smolrun.config import RunConfig, resolved
from smolrun.errors import ConfigError, SmolrunError
from tests.cli.command import smolrun
from tests.sweep.fakes import Run, command_with_fakes, newest, text_of


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """`smolrun` in an empty folder, with stand-ins for the processes of the jobs."""
    return command_with_fakes(monkeypatch, tmp_path)


def logs() -> list[str]:
    """What each job said first, in the order of the jobs; empty for one that never started."""
    folder = newest()
    return [text_of(folder.job(job.name).driver_log) for job in folder.record().jobs]


def test_all_combinations_run(run: Run, capsys: pytest.CaptureFixture[str]):
    assert run("-m", "algorithm=single,classicdp", "seed=range(1,3)", "training.steps=4") == 0
    jobs = newest().record().jobs
    assert [job.overrides for job in jobs] == [
        ["algorithm=single", "seed=1", "training.steps=4"],
        ["algorithm=single", "seed=2", "training.steps=4"],
        ["algorithm=classicdp", "seed=1", "training.steps=4"],
        ["algorithm=classicdp", "seed=2", "training.steps=4"],
    ]
    assert [line.split()[5] for line in logs()] == ["1", "2", "1", "2"]
    out = capsys.readouterr().out
    assert ": 4 jobs; how long they take is known after the first one" in out
    assert "job 1 of 4 starts: algorithm=single seed=1" in out
    assert "job 4 of 4 done: algorithm=classicdp seed=2: 4 steps in 0:00:02, loss 2.0030" in out


def test_one_bad_job_stops_all_of_them(
    run: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    assert run("-m", "training.steps=5,0,7", "seed=1,2") == 2
    assert list(tmp_path.iterdir()) == []
    assert "training.steps = 0: too small; allowed: an integer >= 1 (job 3, 4 of 6)" in (
        capsys.readouterr().err
    )


def test_a_wrong_choice_in_one_job_is_told_with_the_rest(tmp_path: Path):
    done = smolrun(tmp_path, "-m", "algorithm=single,diloco", "optimizer.lr=0.1,-1")
    assert done.code == 2
    allowed = "allowed: classicdp, edp, ep, fsdp, mp, mp_pipeline, single, syncps"
    assert f"algorithm = diloco: not built yet; {allowed} (job 3, 4 of 4)" in done.error
    assert "optimizer.lr = -1: too small; allowed: a number > 0 (job 2, 4 of 4)" in done.error
    assert done.seen == "['import hydra']"
    assert list(tmp_path.iterdir()) == []


def test_a_list_is_one_value(run: Run):
    assert run("-m", "optimizer.betas=[0.9,0.95],[0.8,0.9]") == 0
    assert [job.overrides[-1] for job in newest().record().jobs] == [
        "optimizer.betas=[0.9,0.95]",
        "optimizer.betas=[0.8,0.9]",
    ]
    assert [job.name for job in newest().record().jobs] == [
        "optimizer.betas=0.9-0.95",
        "optimizer.betas=0.8-0.9",
    ]


def test_an_experiment_may_name_the_axes(run: Run, tmp_path: Path):
    folder = tmp_path / "conf" / "experiment"
    folder.mkdir(parents=True)
    axes = "hydra: {sweeper: {params: {seed: '1,2,3'}}}\n"
    (folder / "seeds.yaml").write_text("# @package _global_\n# Three seeds\n" + axes)
    assert run("-m", "experiment=seeds") == 0
    assert [job.overrides[0] for job in newest().record().jobs] == ["seed=1", "seed=2", "seed=3"]


def test_a_job_that_fails_is_named_at_the_end_and_the_rest_runs(
    run: Run, capsys: pytest.CaptureFixture[str]
):
    assert run("-m", "run_name=ok,fails,killed,broken,fine") == 3
    out, err = capsys.readouterr()
    assert "job 5 of 5 done: run_name=fine" in out
    assert "3 of 5 jobs failed" in err
    for name, reason in (
        ("fails", "rank 1 was lost"),
        ("killed", "killed: its process was ended by SIGKILL; out of memory?"),
        ("broken", "nothing was started: there is no data (exit code 2)"),
    ):
        if os.name != "nt" or name != "killed":
            assert f"run_name={name}: {reason}" in err
        assert str(Path(f"run_name={name}", "driver.log")) in err


def test_fail_fast_ends_the_sweep_at_the_first_failure(
    run: Run, capsys: pytest.CaptureFixture[str]
):
    assert run("-m", "run_name=fails,ok", "sweep.fail_fast=true") == 3
    assert logs()[1] == ""
    assert "to run the other 2 jobs: smolrun -m sweep.resume=" in capsys.readouterr().err


def test_keys_of_sweeps_need_one(run: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    assert run("algorithm=single", "sweep.repeats=3") == 2
    assert "sweep.repeats: a key of sweeps; write smolrun -m" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full_is_a_sentence(run: Run, capsys: pytest.CaptureFixture[str]):
    Path("outputs").write_text("a file in the way")
    assert run("-m", "seed=1,2") == 2
    assert "cannot write to" in capsys.readouterr().err


def test_repeats_have_other_seeds_that_all_cells_share(run: Run):
    assert run("-m", "algorithm=single,classicdp", "sweep.repeats=2", "seed=5") == 0
    assert [line.split()[5] for line in logs()] == ["5", "5", "6", "6"]
    jobs = newest().record().jobs
    assert [job.cell for job in jobs] == [0, 1, 0, 1]
    # What one would type for that job alone.
    typed = newest().job(jobs[3].name).summary()["overrides"]
    assert typed == ["algorithm=classicdp", "seed=6"]


def test_seeds_of_a_grid_reach_their_jobs(run: Run):
    assert run("-m", "algorithm=single,classicdp", "seed=3,4") == 0
    assert [line.split()[5] for line in logs()] == ["3", "4", "3", "4"]
    assert [job.cell for job in newest().record().jobs] == [0, 0, 1, 1]


@pytest.mark.parametrize("where", ["_expected_s", "written"])
def test_ctrl_c_before_the_first_job_leaves_nothing(
    run: Run, monkeypatch: pytest.MonkeyPatch, where: str
):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep, where, interrupted)
    monkeypatch.setattr(sweep, "_MANY", 2)
    monkeypatch.setattr(sweep, "_expected_s" if where == "written" else "written", lambda *_: None)
    with contextlib.suppress(KeyboardInterrupt):
        assert run("-m", "seed=1,2") == 130
    assert not list(Path().glob("outputs/sweeps/*"))


def test_jobs_do_not_resume_one_run(tmp_path: Path):
    config = compose([])
    config = config.model_copy(
        update={"checkpoint": config.checkpoint.model_copy(update={"resume": "3fa9"})}
    )
    with pytest.raises(ConfigError, match="RUN begins with its weights"):
        sweep.new_sweep([], [["seed=1"]], [config])


def test_what_own_code_prints_is_no_estimate(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def loud(config: RunConfig) -> None:
        print("loading")
        raise SmolrunError("no data")

    monkeypatch.setattr("smolrun.driver.prepare.spec_of", loud)
    order = io.TextIOWrapper(io.BytesIO(msgspec.json.encode([resolved(compose([]))])))
    monkeypatch.setattr(sys, "stdin", order)
    assert driver.estimate_main() == 0
    out, err = capsys.readouterr()
    assert (out, err) == ("null\n", "loading\n")


def test_repeats_of_a_grid_over_seeds_are_refused(
    run: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    assert run("-m", "seed=1,2", "sweep.repeats=2") == 2
    assert "sweep.repeats = 2: seed has several values already" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_keys_of_the_sweep_itself_do_not_vary(run: Run, capsys: pytest.CaptureFixture[str]):
    assert run("-m", "sweep.repeats=1,2") == 2
    assert "keys of `sweep` are about all jobs" in capsys.readouterr().err


def test_wandb_groups_the_jobs_by_the_sweep(run: Run):
    assert run("-m", "seed=1,2", "tracker=wandb") == 0
    folder = newest()
    config = folder.job("seed=2").config.read_text()
    assert f"group: {folder.path.name}\n" in config
    assert run("-m", "seed=1", "tracker=wandb", "tracker.group=mine") == 0
    folder = newest()
    assert "group: mine\n" in folder.job("job").config.read_text()


def test_other_tasks_run_in_turn_and_the_worst_exit_code_wins():
    codes = iter([0, 3, -9, 0])
    assert sweep.run_jobs([[], [], [], []], [], lambda job: next(codes)) == 3
    codes = iter([0, 130, 0])
    assert sweep.run_jobs([[], [], []], [], lambda job: next(codes)) == 130
    assert next(codes) == 0


def test_a_job_of_another_task_is_a_command_of_its_own(capfd: pytest.CaptureFixture[str]):
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
