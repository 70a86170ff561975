from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from smolrun.cli.compose import compose
from smolrun.config import redacted
from smolrun.driver import runs
from smolrun.driver.runs import OpenRun, config_of, find_run, opened, ranks_of
from smolrun.errors import ConfigError
from smolrun.tasks import attach, status, stop
from smolrun.tracking import past_runs
from smolrun.tracking.run_folder import RunFolder
from smolrun.tracking.run_view import Request, View
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


def a_server(tmp_path: Path, name: str, url: str | None = None) -> RunFolder:
    """A server that this process drives; ready where it has a `url`."""
    folder = a_run(tmp_path / "outputs", name)
    folder.write_config("task: serve\ntraining: {steps: 300}\n")
    folder.write_driver(steps=0)
    if url is not None:
        folder.write_summary({"status": "serving", "url": url})
    return folder


def test_without_a_name_the_server_that_is_alive_is_meant(tmp_path: Path) -> None:
    trained = a_run(tmp_path / "outputs", "20260131-142501-x-aaaa")
    trained.write_driver(steps=7)
    trained.write_summary({"status": "done"})
    trained.become_latest()
    server = a_server(tmp_path, "20260131-142502-serve-x-bbbb")
    assert find_run("stop.run", "latest").run_id == server.run_id
    server.write_summary({"status": "stopped"})
    assert find_run("stop.run", "latest").run_id == trained.run_id
    assert past_runs.look(server).steps is None  # not those of a training


def test_without_a_name_a_server_that_has_ended_is_meant_where_nothing_else_is(
    tmp_path: Path,
) -> None:
    a_server(tmp_path, "20260131-142501-serve-x-aaaa").write_summary({"status": "stopped"})
    newer = a_server(tmp_path, "20260131-142502-serve-x-bbbb")
    newer.write_summary({"status": "failed"})
    assert find_run("attach.run", "latest").run_id == newer.run_id


def test_of_several_that_are_alive_the_user_names_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trains = a_run(tmp_path / "outputs", "20260131-142501-x-aaaa")
    trains.write_driver(steps=7)
    url = "http://127.0.0.1:7665"
    server = a_server(tmp_path, "20260131-142502-serve-x-bbbb", url)
    with pytest.raises(ConfigError) as refused:
        find_run("stop.run", "latest")
    assert refused.value.problems == [
        "stop.run = latest: 2 runs are alive, so name one:\n"
        f"  {server.run_id}  serving at {url}\n  {trains.run_id}  running"
    ]
    answers = ["", "3", "x", "2"]
    for stream in ("stdin", "stdout"):
        monkeypatch.setattr(f"sys.{stream}.isatty", lambda: True)
    monkeypatch.setattr("builtins.input", lambda _: answers.pop(0))
    assert find_run("stop.run", "latest").run_id == trains.run_id
    assert f"1  {server.run_id}  serving at {url}" in capsys.readouterr().out
    assert not answers


def test_one_of_two_servers_that_has_ended_on_its_machine_is_not_asked_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = a_server(tmp_path, "20260131-142502-serve-x-bbbb")
    there = a_run(tmp_path / "outputs", "20260131-142503-serve-x-cccc")
    there.write_config("task: serve\n")
    there.write_remote({})
    views = {"serving": View("serving", summary={"url": "http://10.0.0.1:7665"})}

    @contextmanager
    def opened(folder: RunFolder) -> Iterator[OpenRun]:
        assert folder.run_id == there.run_id
        yield OpenRun(folder, lambda _: views.get("serving", View("stopped")), 0.0, "mini1")

    monkeypatch.setattr(runs, "opened", opened)
    with pytest.raises(ConfigError, match=r"serving at http://10\.0\.0\.1:7665 on mini1"):
        find_run("stop.run", "latest")
    views.clear()
    assert find_run("stop.run", "latest").run_id == here.run_id


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
