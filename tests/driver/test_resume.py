"""checkpoint.resume of a run folder from somewhere else: nothing outside of it is touched."""

from __future__ import annotations

import os
import shutil
from contextlib import ExitStack
from pathlib import Path

import pytest

from smolrun.cli.compose import compose
from smolrun.driver.resume import find_resume_point
from smolrun.errors import ConfigError
from smolrun.tracking.run_folder import RunFolder
from tests.checkpoints.saves import save

RUN_ID = "20260131-142501-x-aaaa"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """A run with a checkpoint; `precious` lies beside it."""
    monkeypatch.chdir(tmp_path)
    folder = RunFolder(tmp_path / "outputs" / RUN_ID)
    folder.logs.mkdir(parents=True)
    folder.write_config("{}")
    save(folder.checkpoints, 1, 1)
    (tmp_path / "precious").write_text("all I have")
    return folder


def find(name: str = RUN_ID) -> Path:
    with ExitStack() as closing:
        found = find_resume_point(compose([f"checkpoint.resume={name}"]), print, closing)
        assert found is not None
        return found.folder.path


def test_a_run_is_called_as_when_it_began(run: RunFolder, tmp_path: Path) -> None:
    assert [find(name) for name in (RUN_ID, "aaaa", str(run.path))] == [Path("outputs", RUN_ID)] * 3
    elsewhere = run.path.rename(tmp_path / "kept")
    assert find("kept") == elsewhere.resolve()


def test_a_run_with_the_links_of_wandb_can_be_resumed(run: RunFolder, tmp_path: Path) -> None:
    """One within the run's folder, and one from a log to W&B's cache."""
    logs = run.path / "wandb" / "run-1" / "logs"
    logs.mkdir(parents=True)
    (logs / "debug-core.log").symlink_to(tmp_path / "precious")
    (run.path / "wandb" / "latest-run").symlink_to("run-1", target_is_directory=True)
    find()


@pytest.mark.parametrize("name", ["checkpoints", "metrics.jsonl", "logs/rank0-x.log", "logs"])
def test_a_run_with_a_link_out_of_its_folder_is_refused(run: RunFolder, name: str) -> None:
    path, target = run.path / name, run.path.parents[1] / "precious"
    if path.is_dir():
        target = target.with_name("elsewhere")
        shutil.move(path, target)
    path.symlink_to(target, target_is_directory=target.is_dir())
    with pytest.raises(ConfigError) as raised:
        find()
    (problem,) = raised.value.problems
    assert problem.startswith("checkpoint.resume") and str(target) in problem
    assert not (run.path / "driver.lock").exists()


@pytest.mark.skipif(not hasattr(os, "O_NOFOLLOW"), reason="Windows")
def test_a_stop_is_written_through_no_link(run: RunFolder) -> None:
    precious = run.path.parents[1] / "precious"
    (run.path / "stop").symlink_to(precious)
    with pytest.raises(OSError, match="symbolic links"):
        run.ask_to_stop()
    assert precious.read_text() == "all I have"
