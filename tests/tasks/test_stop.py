"""task=stop: a run in the background, stopped from another process."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from smolrun.driver import runs
from smolrun.driver.runs import OpenRun
from smolrun.errors import HostError
from smolrun.tasks import stop
from smolrun.tracking.run_view import Request, View
from tests.cli.command import smolrun
from tests.tasks.background import in_background
from tests.tasks.test_whole_runs import finish, start
from tests.tracking.test_past_runs import a_run
from tests.waiting import until


@pytest.mark.soak
@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="Windows cannot freeze a process")
@pytest.mark.timeout(120)
def test_twice_is_at_once(tmp_path: Path) -> None:
    """A frozen rank agrees on nothing, so the first wish cannot be met."""
    with in_background(tmp_path, "mesh.liveness=normal") as run:
        workers = run.until_it_trains()
        workers[0].suspend()
        first = start(tmp_path, "task=stop")
        until(lambda: run.path.joinpath("stop").exists(), 20)
        second = start(tmp_path, "task=stop")
        code, out, _ = finish(second)
        assert code == 0 and "stop requested, at once" in out
        assert finish(first)[0] == 0
        run.until_it_is_gone(workers)
        summary = run.read("summary.json")
        assert (summary["status"], summary["exit_code"]) in (("stopped", 131), ("failed", 3))


def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, views: list[object]) -> list[Request]:
    """What is asked of a run that answers with these views; "ctrl-c" comes while it waits."""
    requests: list[Request] = []

    def ask(request: Request) -> View:
        requests.append(request)
        answer = views.pop(0)
        if answer == "ctrl-c":
            raise KeyboardInterrupt
        if answer == "silence":
            raise HostError("mini1", "does not answer")
        assert isinstance(answer, View)
        return answer

    run = OpenRun(a_run(tmp_path), ask, every_s=0.0)
    stop._stopped(run, run.ask(Request("", stop=True)))
    return requests


def test_ctrl_c_while_it_waits_hurries_and_a_second_one_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    running, hurried = View("running", asked=1), View("running", asked=2)
    requests = asked(
        tmp_path / "a", monkeypatch, [running, running, "ctrl-c", hurried, hurried, View("stopped")]
    )
    assert [request.stop for request in requests] == [True, False, False, True, False, False]
    assert "stop requested, at once" in capsys.readouterr().out
    with pytest.raises(KeyboardInterrupt):
        asked(tmp_path / "b", monkeypatch, [running, "ctrl-c", hurried, "ctrl-c"])


def test_a_machine_that_is_out_of_reach_for_a_moment_ends_no_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = View("running", asked=1)
    views: list[object] = [running, "silence", "silence", running, View("stopped")]
    assert len(asked(tmp_path / "a", monkeypatch, views)) == 5
    monkeypatch.setattr(runs, "OUT_OF_REACH_S", 0.0)
    with pytest.raises(HostError, match="mini1"):
        asked(tmp_path / "b", monkeypatch, [running, "silence"])


def test_it_does_not_wait_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A driver that lives, but reads no wishes: this process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(stop, "_wait_s", lambda run: 0.3)
    folder = a_run(tmp_path / "outputs")
    folder.write_driver(steps=5)
    folder.become_latest()
    config = SimpleNamespace(stop=SimpleNamespace(run="latest"))
    assert stop.drive(config) == 3
    told = capsys.readouterr()
    assert "has not stopped yet; to stop it at once" in told.err
    assert folder.stop_requests() == 1


def test_a_run_that_has_died_needs_no_stopping(tmp_path: Path) -> None:
    folder = a_run(tmp_path / "outputs")
    ended = smolrun(tmp_path, "task=stop", f"run={folder.run_id}")
    assert ended.code == 0
    assert "has no driver: its process" in ended.out
    assert not (folder.path / "stop").exists()


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    folder = a_run(tmp_path / "outputs")
    folder.write_driver(steps=5)  # by this process, which lives
    folder.path.chmod(0o500)
    ended = smolrun(tmp_path, "task=stop", f"run={folder.run_id}")
    folder.path.chmod(0o700)
    assert ended.code == 3 and "cannot be asked" in ended.error
    assert psutil.pid_exists(os.getpid())
