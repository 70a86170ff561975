from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from smolrun.cli.compose import compose
from smolrun.config import redacted
from smolrun.driver.runs import config_of, find_run, opened, ranks_of
from smolrun.errors import ConfigError
from smolrun.tasks import attach, status, stop
from smolrun.tracking.run_view import Request
from tests.tracking.test_past_runs import a_run


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_by_name_by_path_and_the_newest(tmp_path: Path) -> None:
    older = a_run(tmp_path / "outputs", "20260131-142501-x-aaaa")
    newer = a_run(tmp_path / "outputs", "20260131-142502-x-bbbb")
    newer.become_latest()
    assert find_run("stop.run", "latest").path == Path("outputs") / newer.run_id
    assert find_run("stop.run", older.run_id).path == Path("outputs") / older.run_id
    assert find_run("stop.run", str(older.path)).path == Path("outputs") / older.run_id
    elsewhere = a_run(tmp_path / "other", "20260131-142503-x-cccc")
    assert find_run("stop.run", str(elsewhere.path)).path == elsewhere.path


def test_what_is_no_run_is_refused_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"stop.run = latest: .*there is no folder"):
        find_run("stop.run", "latest")
    name = a_run(tmp_path / "outputs", "20260131-142501-x-aaaa").run_id
    (tmp_path / "outputs" / "empty").mkdir()
    (tmp_path / "outputs" / "old" / "checkpoints").mkdir(parents=True)
    for wanted in ("empty", "old", "latest", "20260131-142501-x-aaab"):
        with pytest.raises(ConfigError, match=rf"; the newest:\n(  old\n)?  {name}"):
            find_run("stop.run", wanted)


def test_a_run_of_this_machine_is_asked_here(tmp_path: Path) -> None:
    folder = a_run(tmp_path / "outputs")
    folder.write_driver(steps=7)
    with opened(find_run("stop.run", folder.run_id)) as run:
        assert run.driver_host is None
        assert run.ask(Request("", figures=True)).figures["steps"] == 7


def test_a_configuration_of_another_version_is_none(tmp_path: Path) -> None:
    assert config_of(a_run(tmp_path / "outputs")) is None
    assert ranks_of(None) == 1


def test_looking_at_a_run_imports_nothing_that_its_configuration_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only resuming it does, and asks before."""
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "evil_of_a_test.py").write_text("open('ran', 'w').close()\n")
    folder = a_run(tmp_path / "outputs", "20260131-142501-x-aaaa")
    config = compose(["model.target=evil_of_a_test:build", "data.target=evil_of_a_test:data"])
    folder.write_config(msgspec.yaml.encode(redacted(config)).decode())
    folder.write_summary({"status": "failed", "exit_code": 3})
    folder.become_latest()
    found = config_of(folder)
    assert found is not None and found.model.target == "evil_of_a_test:build"
    assert status.drive(compose(["task=status"])) == 0
    assert attach.drive(compose(["task=attach"])) == 3
    assert stop.drive(compose(["task=stop"])) == 0
    assert not (tmp_path / "ran").exists()
