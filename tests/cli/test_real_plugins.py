"""Plugins of Hydra that people use, in an environment of their own: the sweeper needs an optuna
that nothing else here may have. Jobs train nothing.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import msgspec
import pytest

from tests.cli.test_multirun import SMALL, environment, folder, jobs, summary

pytestmark = [pytest.mark.soak, pytest.mark.timeout(900)]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of an environment with the extras, and with all that this one has."""
    home = tmp_path_factory.mktemp("plugins") / "venv"
    venv.create(home, symlinks=os.name != "nt")
    found = next(path for path in home.rglob("site-packages"))
    here = [path for path in sys.path if path.endswith("site-packages")]
    lines = [f"import site; site.addsitedir({path!r})\n" for path in here]
    (found / "borrowed.pth").write_text("".join(lines))
    executable = home / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    packages = [*extras["optuna"], *extras["joblib"], *extras["submitit"]]
    pip = [sys.executable, "-m", "pip", "--python", str(executable), "install", "-q"]
    done = subprocess.run([*pip, *packages], capture_output=True, text=True, timeout=600)
    if done.returncode != 0:
        pytest.skip(f"the plugins cannot be installed: {done.stderr.strip().splitlines()[-1]}")
    return executable


def sweep(python: Path, cwd: Path, *arguments: str) -> str:
    """Output of a sweep that must succeed; one folder of sweeps at a time."""
    shutil.rmtree(cwd / "outputs", ignore_errors=True)
    done = subprocess.run(
        [str(python), "-P", "-m", "smolrun.cli", "-m", *arguments, *SMALL],
        cwd=cwd,
        env={**os.environ, **environment()},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_optuna_finds_the_best_and_its_study_continues(python: Path, tmp_path: Path):
    """The loss of the jobs is least at 0.01."""
    words = [
        "hydra/sweeper=optuna",
        "optimizer.lr=tag(log,interval(1e-4,1.0))",
        "hydra.sweeper.n_trials=10",
        "hydra.sweeper.n_jobs=1",
        "hydra.sweeper.sampler.seed=0",
        "hydra.sweeper.sampler.n_startup_trials=4",
        "hydra.sweeper.storage=sqlite:///study.db",
        "hydra.sweeper.study_name=lr",
    ]
    for _ in range(2):
        said = sweep(python, tmp_path, *words)
        assert len(jobs(tmp_path)) == 10
        result = folder(tmp_path) / "optimization_results.yaml"
        best = msgspec.yaml.decode(result.read_bytes())
    assert "best final_eval_loss: " in said
    assert best["best_params"].keys() == {"optimizer.lr"}
    assert 0.003 < best["best_params"]["optimizer.lr"] < 0.03
    assert best["best_value"] < 0.2


def test_a_failed_job_does_not_end_a_study(python: Path, tmp_path: Path):
    words = ["hydra/sweeper=optuna", "hydra/sweeper/sampler=grid", "hydra.sweeper.n_trials=3"]
    with pytest.raises(AssertionError, match="1 of 3 jobs failed"):
        sweep(python, tmp_path, *words, "optimizer.lr=choice(7.0,0.1,0.01)")
    assert len(jobs(tmp_path)) == 3


def test_joblib_runs_two_jobs_of_a_study_at_once(python: Path, tmp_path: Path):
    words = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "hydra/sweeper=optuna"]
    sweep(python, tmp_path, *words, "hydra.sweeper.n_trials=2", "optimizer.lr=interval(6.1,6.9)")
    first, second = (summary(tmp_path, job["name"]) for job in jobs(tmp_path))
    assert first["began"] < second["ended"]
    assert second["began"] < first["ended"]


def test_submitit_runs_jobs_of_a_grid(python: Path, tmp_path: Path):
    sweep(python, tmp_path, "hydra/launcher=submitit_local", "optimizer.lr=0.1,0.2")
    states = [summary(tmp_path, job["name"])["status"] for job in jobs(tmp_path)]
    assert states == ["done", "done"]
