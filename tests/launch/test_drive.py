"""task=train on the driver, with tiny workers: the folder it leaves, what it says, how it exits."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import smolrun.tasks.train as train
from smolrun.cli.compose import compose
from smolrun.config import RunConfig, config_hash, resolved
from smolrun.errors import ConfigError
from smolrun.launch.local import LocalHost
from smolrun.targets import load_target
from tests.launch.tiny_driver import WORKER

Drive = Callable[..., int]


def composed(*overrides: str) -> RunConfig:
    small = ("model=mlp", "data=digits", "data.train_size=64", "data.eval_size=16")
    return compose([*small, *overrides])


@pytest.fixture
def drive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Drive:
    """Runs `train.drive` in an empty folder; keyword arguments tell the tiny workers what to do."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setattr("smolrun.driver.fleet.LocalHost", lambda **_: LocalHost(WORKER))
    monkeypatch.setattr("platformdirs.user_cache_path", lambda name: tmp_path / "cache" / name)

    def run(*overrides: str, behave: dict[str, str] | None = None) -> int:
        config: dict[str, Any] = {"folder": str(tmp_path), "behave": behave or {}, "steps": 3}
        monkeypatch.setenv("TINY_CONFIG", json.dumps(config))
        return train.drive(composed(*overrides))

    return run


def test_a_good_run_leaves_its_folder(drive: Drive, capfd: pytest.CaptureFixture[str]) -> None:
    assert drive() == 0
    (folder,) = [path for path in Path("outputs").iterdir() if path.name != "latest"]
    assert Path("outputs/latest").resolve() == folder.resolve()
    assert "-classicdp-mlp-" in folder.name
    names = {path.name for path in folder.iterdir()}
    assert names == {"config.yaml", "driver.json", "metrics.jsonl", "summary.json", "logs"}
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "done"
    assert (summary["reason"], summary["failed_rank"], summary["failed_host"]) == (None, None, None)
    assert (summary["steps"], summary["world_size"], summary["algorithm"]) == (3, 2, "classicdp")
    assert (summary["final_train_loss"], summary["final_eval_loss"]) == (1.0, None)
    assert summary["versions"] == {"python": "3.11"}
    assert summary["config_hash"] == config_hash(composed())
    rows = [json.loads(row) for row in (folder / "metrics.jsonl").read_text().splitlines()]
    assert sorted({row["event"] for row in rows}) == ["rank_step", "step"]
    said = capfd.readouterr()
    assert re.search(r"done: 3 steps in [\d.]+ s \(0:00:0\d from start to end\)", said.out)
    assert f"run folder: {folder}" in said.out
    assert said.err == ""


def test_the_config_it_leaves_is_the_resolved_one(drive: Drive) -> None:
    import yaml

    drive("seed=5", "run_name=mine")
    text = Path("outputs/latest/config.yaml").read_text()
    assert yaml.safe_load(text) == resolved(composed("seed=5", "run_name=mine"))
    assert "-mine-" in Path("outputs/latest").resolve().name


def test_a_failed_run_names_the_culprit_and_shows_its_log(
    drive: Drive, capfd: pytest.CaptureFixture[str]
) -> None:
    assert drive(behave={"1": "exit_early"}) == 3
    assert not Path("outputs/latest").exists()  # it did not begin to train
    (folder,) = Path("outputs").iterdir()
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["status"], summary["failed_rank"], summary["failed_host"]) == (
        "failed",
        1,
        "local",
    )
    log = folder / "logs" / "rank1-local.log"
    reason = (
        "rank 1 on local died with exit code 7 while it started; 1 other rank ended with it; "
        f"log: {log}"
    )
    assert summary["reason"] == reason
    assert log.read_text() == "no such thing as a GPU\n"
    said = capfd.readouterr()
    nothing = "no checkpoint yet: one is saved every 100 steps (checkpoint.every)"
    assert said.err == f"smolrun: {reason}\n  | no such thing as a GPU\nsmolrun: {nothing}\n"


def test_a_single_rank(drive: Drive) -> None:
    assert drive("algorithm=single") == 0
    assert json.loads(Path("outputs/latest/summary.json").read_text())["world_size"] == 1


def test_a_folder_that_cannot_be_written_starts_nothing(drive: Drive) -> None:
    Path("outputs").write_text("a file")
    with pytest.raises(ConfigError, match="cannot write to "):
        drive()


def test_a_foreign_thing_called_latest_costs_a_warning(
    drive: Drive, capfd: pytest.CaptureFixture[str]
) -> None:
    Path("outputs/latest/mine").mkdir(parents=True)
    assert drive() == 0
    assert "warning: outputs/latest still points to an older run" in capfd.readouterr().out


def test_what_cannot_be_loaded_is_told() -> None:
    for path in ("no_such_module:build", "smolrun.errors:NoSuchThing"):
        with pytest.raises(ConfigError, match=f"{path}: cannot be loaded"):
            load_target(path)
