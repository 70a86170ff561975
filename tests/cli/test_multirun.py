"""`smolrun -m` with a launcher or sweeper of Hydra's: jobs of its own, which gets their metrics.

With a sweeper and a launcher made for this (plugins/), real processes, and jobs that train nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
from hydra.core.plugins import Plugins
from hydra.core.singleton import Singleton

from smolrun import cli
from tests.cli.command import Done, smolrun
from tests.waiting import until

PLUGINS = Path(__file__).parent / "plugins"
LR = "optimizer.lr=interval(0.001,1.0)"
SMALL = ("model=mlp", "algorithm=single")


def environment() -> dict[str, str]:
    """With the plugins installed, and with jobs that train nothing."""
    path = os.pathsep.join(filter(None, [str(PLUGINS), os.environ.get("PYTHONPATH")]))
    return {"PYTHONPATH": path, "SMOLRUN_TESTS_FAKE_JOB": str(PLUGINS / "fake_job.py")}


def sweep(cwd: Path, *arguments: str, values: str = "[0.1]") -> Done:
    words = ("-m", "hydra/sweeper=listed", f"hydra.sweeper.values={values}", LR, *SMALL)
    return smolrun(cwd, *words, *arguments, environment=environment())


def folder(cwd: Path) -> Path:
    (found,) = [path for path in (cwd / "outputs" / "sweeps").iterdir() if not path.is_symlink()]
    return found


def told(cwd: Path) -> list[Any]:
    found: list[Any] = json.loads((folder(cwd) / "told.json").read_text())
    return found


def jobs(cwd: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = msgspec.yaml.decode((folder(cwd) / "sweep.yaml").read_bytes())[
        "jobs"
    ]
    return found


def summary(cwd: Path, job: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder(cwd) / job / "summary.json").read_text())
    return found


def test_a_sweeper_gets_the_metric_of_each_job(tmp_path: Path):
    """And a failure for a job that failed, one without a metric, and one that could not start."""
    values = "[0.1,0.01,0.0123456789,0.1,7.0,8.0,-1,'${oc.env:HOME}']"
    done = sweep(tmp_path, "seed=5", "optimizer.betas=[0.9, 0.95]", "tracker=wandb", values=values)
    assert told(tmp_path)[:4] == [1.0, 0.0, pytest.approx(0.00837, abs=1e-4), 1.0]
    failed, unknown, wrong, no_number = told(tmp_path)[4:]
    assert failed == "optimizer.lr=7.0: failed: the disk is full (exit code 3)"
    assert unknown == "optimizer.lr=8.0: done, but its final_eval_loss is not a number"
    assert "optimizer.lr = -1: too small; allowed: a number > 0" in wrong
    assert "optimizer.lr = " in no_number
    names = [job["name"] for job in jobs(tmp_path)]
    assert names[:3] == ["optimizer.lr=0.1", "optimizer.lr=0.01", "optimizer.lr=0.01235"]
    assert names[3] == "optimizer.lr=0.1-2", "the same value again has a folder of its own"
    places = [(job["cell"], job["repeat"]) for job in jobs(tmp_path)[:4]]
    assert places == [(0, 0), (1, 0), (2, 0), (0, 1)], "and counts as its repeat"
    third = jobs(tmp_path)[2]
    assert third["differs"] == {"optimizer.lr": "0.01235"}
    assert "optimizer.lr=0.0123456789" in third["overrides"]
    config = msgspec.yaml.decode((folder(tmp_path) / names[2] / "config.yaml").read_bytes())
    assert (config["optimizer"]["lr"], config["seed"]) == (0.0123456789, 5)
    assert config["tracker"]["group"] == folder(tmp_path).name
    assert summary(tmp_path, names[4])["status"] == "failed"
    assert done.code == 3, "as jobs have failed"
    assert "best final_eval_loss: 0.0000, of optimizer.lr=0.01 (4 of 8 jobs)" in done.out
    assert "its values: optimizer.lr=0.01\n" in done.out
    assert (tmp_path / "outputs" / "sweeps" / "latest").resolve() == folder(tmp_path).resolve()
    assert [path.name for path in (tmp_path / "outputs").iterdir()] == ["sweeps"]
    assert [path.name for path in tmp_path.iterdir()] == ["outputs"]


def test_fail_fast_ends_the_sweep_at_the_first_failure(tmp_path: Path):
    done = sweep(tmp_path, "sweep.fail_fast=true", values="[0.1,7.0,0.01]")
    assert done.code == 3
    assert "smolrun: optimizer.lr=7.0 failed, and sweep.fail_fast ends the sweep" in done.error
    assert len(jobs(tmp_path)) == 2


@pytest.mark.soak
def test_a_sweeper_that_gives_up_is_explained_by_the_failures(tmp_path: Path):
    done = sweep(tmp_path, "hydra.sweeper.max_failure_rate=0.5", values="[7.0,0.1]")
    assert done.code == 3
    reason = (
        "no job has a final_eval_loss; the last one: optimizer.lr=7.0: failed: the disk is full"
    )
    assert reason in done.error
    assert "its output: " in done.error


@pytest.mark.parametrize("value", ["1,2", pytest.param("1 seed=2", marks=pytest.mark.soak)])
def test_a_job_that_is_none_ends_the_sweep(value: str, tmp_path: Path):
    done = sweep(tmp_path, values=f"['{value}']")
    assert done.code == 3
    assert f"the sweeper wants a job with optimizer.lr={value}: not one value" in done.error
    assert not list(folder(tmp_path).rglob("*/driver.log"))


def test_a_sweep_of_a_plugin_is_not_resumed_without_it(tmp_path: Path):
    record = {"id": "x", "version": "0", "started": "", "metric": "final_eval_loss"}
    job = {"name": "optimizer.lr=0.1", "overrides": ["optimizer.lr=0.1"], "differs": {}, "cell": 0}
    typed = ["hydra/sweeper=listed", LR]
    place = tmp_path / "outputs" / "sweeps" / "x"
    place.mkdir(parents=True)
    content = msgspec.yaml.encode({**record, "overrides": typed, "jobs": [job]})
    (place / "sweep.yaml").write_bytes(content)
    done = smolrun(tmp_path, "-m", "sweep.resume=x")
    assert done.code == 2
    assert "sweep.resume = x: not with hydra/sweeper=listed, which decided which jobs" in done.error


Command = Callable[..., tuple[int, str]]


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Command:
    """`smolrun -m` in this process, with the plugins: its exit code, and what it complained about.

    Nothing may have been written."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(PLUGINS), *sys.path])
    monkeypatch.delitem(Singleton._instances, Plugins, raising=False)  # it finds them again
    monkeypatch.delitem(sys.modules, "hydra_plugins", raising=False)

    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["smolrun", "-m", *arguments])
        code = cli.main()
        assert list(tmp_path.iterdir()) == []
        return code, capsys.readouterr().err

    return run


def test_what_is_wrong_is_told_before_anything_starts(command: Command):
    code, said = command(
        "hydra/sweeper=listed", "hydra.sweeper.direction=maximize", "sweep.repeats=3",
        "sweep.resume=latest", "sweep.fail_fast=true,false", "detach=true", "task=bench",
        "data=nonsense", "training.steps=0", "optimizer.betas=[2,0],[0,3]",
        "optimizer.lr=interval(-1,0.1)", "seed=range(-3,100000000)",
    )  # fmt: skip
    assert code == 2
    for line in (
        "data = nonsense: no such choice",
        "training.steps = 0: too small",
        "optimizer.betas[0] = 2: too large",
        "optimizer.betas[1] = 3: too large",
        "optimizer.lr = -1.0: too small",
        "seed = -3: too small",
        "sweep.fail_fast: -m cannot vary it",
        "hydra/sweeper=listed: only for runs that train",
        "hydra/sweeper=listed: not with detach or driver",
        "sweep.repeats = 3: not with hydra/sweeper=listed, which decides how often a job runs",
        "sweep.resume = latest: not with hydra/sweeper=listed, which decides which jobs run",
        "hydra.sweeper.direction = maximize: a smaller final_eval_loss is better",
    ):
        assert line in said


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            "hydra/sweeper=optuna",
            "hydra/sweeper = optuna: not installed; to install it: pip install 'smolrun[optuna]'",
        ),
        ("hydra/launcher=joblibb", "hydra/launcher = joblibb: no such plugin; installed: basic"),
        ("hydra/launcher=submitit_slurm seed=1,2", "pip install 'smolrun[submitit]'"),
        ("hydra/launcher=pool sweep.metric=loss", "sweep.metric = loss: no such choice; allowed: "),
        ("hydra/sweeper=listed sweep.metric=tokens_per_s", "a larger tokens_per_s is better"),
        ("seed=interval(1,2)", "intervals need a sweeper, such as hydra/sweeper=optuna"),
    ],
)
def test_what_cannot_be_is_one_sentence(words: str, line: str, command: Command):
    code, said = command(*words.split(), *SMALL)
    assert code == 2
    assert "smolrun: one problem in the configuration" in said
    assert line in said


def test_a_launcher_runs_jobs_of_a_grid_at_once(tmp_path: Path):
    words = ("-m", "hydra/launcher=pool", "optimizer.lr=6.0", "seed=1,2", *SMALL)
    done = smolrun(tmp_path, *words, environment=environment())
    assert done.code == 0, done.error
    first, second = (summary(tmp_path, job["name"]) for job in jobs(tmp_path))
    assert first["began"] < second["ended"]
    assert second["began"] < first["ended"]
    assert [(job["cell"], job["repeat"]) for job in jobs(tmp_path)] == [(0, 0), (0, 1)]
    assert not list(folder(tmp_path).glob("*.pkl"))
    assert not (folder(tmp_path) / "multirun.yaml").exists(), "it has the passwords of a cluster"


@contextlib.contextmanager
def running(cwd: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A sweep with a job that runs until it is stopped; the block begins when it does."""
    process = subprocess.Popen(
        [sys.executable, "-m", "smolrun.cli", "-m", *arguments, *SMALL],
        cwd=cwd,
        env={**os.environ, **environment()},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        until(lambda: any(cwd.glob("outputs/sweeps/*/*/pid")) or process.poll() is not None, 60)
        yield process
    finally:
        process.kill()
        process.wait(30)


def is_gone(cwd: Path) -> bool:
    (pid,) = {int(path.read_text()) for path in cwd.glob("outputs/sweeps/2*/*/pid")}
    return not psutil.pid_exists(pid)


@pytest.mark.parametrize(
    "words",
    [
        ["hydra/sweeper=listed", "hydra.sweeper.values=[9.0,0.1]"],
        pytest.param(["hydra/launcher=pool", "optimizer.lr=9.0,0.1"], marks=pytest.mark.soak),
    ],
)
def test_ctrl_c_stops_the_job_and_starts_no_other(words: list[str], tmp_path: Path):
    with running(tmp_path, *words) as process:
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "stopping the jobs at an agreed step; Ctrl-C again: at once" in said
    assert summary(tmp_path, "optimizer.lr=9.0")["status"] == "stopped"
    if "sweeper" in words[0]:
        assert len(jobs(tmp_path)) == 1
    assert is_gone(tmp_path)


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL is a POSIX matter")
@pytest.mark.parametrize("who", ["terminal", pytest.param("hydra", marks=pytest.mark.soak)])
def test_no_job_outlives_a_sweep_that_is_killed(who: str, tmp_path: Path):
    with running(tmp_path, "hydra/launcher=pool", "optimizer.lr=9.0,0.1") as process:
        (hydra,) = psutil.Process(process.pid).children()
        others = hydra.children(recursive=True)
        (process if who == "terminal" else hydra).kill()
        said, _ = process.communicate(timeout=60)
        until(lambda: is_gone(tmp_path), 60)
        until(lambda: not any(other.is_running() for other in others), 60)
    if who == "hydra":
        assert process.returncode == 3
        assert "smolrun: killed: its process was ended by SIGKILL" in said
