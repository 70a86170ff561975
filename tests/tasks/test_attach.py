"""task=attach: a run in the background, seen from another process."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import time
from pathlib import Path

import pytest

from smolrun.driver import runs
from smolrun.driver.runs import OpenRun
from smolrun.errors import HostError
from smolrun.tasks import attach
from smolrun.tracking.run_view import Chunk, FilePosition, Request, View
from tests.cli.command import smolrun
from tests.tasks.background import in_background
from tests.tasks.test_whole_runs import finish, start
from tests.tracking.test_past_runs import a_run, step, write_steps


def follow(folder: Path, *overrides: str) -> tuple[subprocess.Popen[str], str]:
    """task=attach in a process of its own, and its first line."""
    showing = start(folder, "task=attach", *overrides)
    assert showing.stdout is not None
    return showing, showing.stdout.readline()


@pytest.mark.timeout(120)
def test_it_shows_the_run_and_a_stop_ends_it_at_an_agreed_step_saved(tmp_path: Path) -> None:
    with in_background(tmp_path, "checkpoint.every=100000") as run:
        workers = run.until_it_trains()
        showing, first = follow(tmp_path)
        assert first == f"{run.run_id} is running; Ctrl-C detaches from it\n"
        assert showing.stdout is not None
        shown = ""
        while "step 1/50000" not in shown:
            line = showing.stdout.readline()
            assert line, shown
            shown += line
        assert "training 147,552 parameters on 2 ranks" in shown
        showing.send_signal(signal.SIGINT)
        code, out, err = finish(showing)
        assert (code, err) == (0, "")
        assert (
            f"{run.run_id} keeps running; to stop it: smolrun task=stop stop.run={run.run_id}"
            in out
        )
        before = run.steps()
        showing, _ = follow(tmp_path, f"run={run.run_id}")
        code, out, err = finish(start(tmp_path, "task=stop"))
        assert (code, err) == (0, "")
        assert "stop requested, at the next agreed step" in out
        assert f"to resume: smolrun checkpoint.resume={run.run_id}" in out
        code, out, err = finish(showing)
        assert (code, err) == (130, "")
        assert "stopped (stopped by the user)" in out and "to resume: smolrun" in out
        assert run.steps() >= before
        run.until_it_is_gone(workers)
        summary = run.read("summary.json")
        assert (summary["status"], summary["exit_code"]) == ("stopped", 130)
        assert summary["checkpoint"] == f"step-{summary['steps']:08}"
    ended = smolrun(tmp_path, "task=stop")
    assert ended.code == 0 and "has ended already" in ended.out
    ended = smolrun(tmp_path, "task=attach")
    assert ended.code == 130
    assert ended.out.startswith("stopped (stopped by the user): ")
    assert ended.seen == "['import hydra']"  # no torch, nothing started


@pytest.mark.soak
@pytest.mark.timeout(120)
def test_a_driver_that_is_killed_is_told_with_what_goes_on(tmp_path: Path) -> None:
    with in_background(tmp_path) as run:
        workers = run.until_it_trains()
        showing, _ = follow(tmp_path)
        run.driver.kill()
        code, out, _ = finish(showing)
        assert code == 3
        assert f"{run.run_id} has no driver: its process" in out
        assert f"smolrun checkpoint.resume={run.run_id}" in out
        run.until_it_is_gone(workers)
        code, out, _ = finish(start(tmp_path, "task=attach"))
        assert code == 3 and "has no driver: its process" in out
        assert "died" in finish(start(tmp_path, "task=status"))[1]


@pytest.mark.soak
@pytest.mark.timeout(120)
def test_a_run_of_another_terminal_is_shown_from_its_events(tmp_path: Path) -> None:
    overrides = ["training.steps=400", "training.eval_every=100", "training.sample_tokens=0"]
    small = ["data.max_mb=1", "model.layers=1", "model.width=32", "model.heads=2"]
    run = start(tmp_path, *small, "data.sequence_length=16", *overrides)
    latest = tmp_path / "outputs" / "latest" / "metrics.jsonl"
    deadline = time.monotonic() + 50
    while not (latest.exists() and '"step": 3,' in latest.read_text()):
        assert run.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    showing, _ = follow(tmp_path)
    code, out, err = finish(showing)
    assert finish(run)[0] == 0
    assert (code, err) == (0, "")
    assert "after step 400: evaluation loss" in out and "step 400/400" in out
    assert "done: 400 steps in " in out


def show(tmp_path: Path, answers: list[View | HostError], monkeypatch: pytest.MonkeyPatch) -> str:
    """What `Show` writes for these views; the last one is of a run that has ended."""
    stream = io.StringIO()
    monkeypatch.setattr("sys.stdout", stream)

    def ask(request: Request) -> View:
        answer = answers.pop(0)
        if isinstance(answer, HostError):
            raise answer
        return answer

    run = OpenRun(a_run(tmp_path), ask, every_s=0.0)
    first = answers.pop(0)
    assert isinstance(first, View)
    attach.Show(run, first).follow(first)
    return stream.getvalue()


def test_what_is_told_twice_is_shown_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = {"steps": 100, "has_log": True}
    log = Chunk([f"line {number}" for number in range(30)], FilePosition(1, 100), is_fresh=True)
    metrics = Chunk([step(9).strip(), '{"event": "eval", "step": 9, "loss": 1.0, "tokens": 5}'])
    views: list[View | HostError] = [
        View("running", driver, log=log, metrics=metrics),
        View(
            "running",
            driver,
            log=Chunk(["after step 10: evaluation loss 1.0"], FilePosition(1, 200)),
        ),
        View("done", driver, log=Chunk(["done: 100 steps"], FilePosition(1, 220))),
        View("done", driver),
    ]
    shown = show(tmp_path, views, monkeypatch)
    assert shown.count("after step 10") == 1 and shown.count("done: ") == 1
    assert "line 29" in shown and "line 19" not in shown


def test_an_end_that_the_log_does_not_have_yet_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = Chunk(["after step 10: evaluation loss 1.0"], FilePosition(1, 100), is_fresh=True)
    views: list[View | HostError] = [View("running", {"has_log": True}, log=log)]
    shown = show(tmp_path, [*views, View("done", {"has_log": True})], monkeypatch)
    assert shown.count("done: ") == 1


def test_a_machine_that_is_out_of_reach_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = HostError("mini1", "no answer")
    views: list[View | HostError] = [View("running"), lost, lost, View("done")]
    shown = show(tmp_path, [*views, View("done")], monkeypatch)
    assert shown.count("mini1: no answer; trying again for 60 s") == 1
    monkeypatch.setattr(runs, "OUT_OF_REACH_S", 0.0)
    with pytest.raises(HostError):
        show(tmp_path / "again", [View("running"), lost, lost], monkeypatch)


def test_lines_that_make_no_sense_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = Chunk(["{", json.dumps({"event": "from the future"}), "[]"])
    show(tmp_path, [View("running", metrics=odd), View("done"), View("done")], monkeypatch)
    assert capsys.readouterr().err.count("invalid line in metrics.jsonl") == 3


def test_an_unknown_run_is_refused(tmp_path: Path) -> None:
    ended = smolrun(tmp_path, "task=attach", "run=nothing")
    assert ended.code == 2 and "attach.run = nothing: there is no run" in ended.error


def test_a_run_whose_number_went_to_another_process_has_died(tmp_path: Path) -> None:
    folder = a_run(tmp_path / "outputs")
    folder.write_driver(steps=5)
    write_steps(folder, 0)
    file = folder.path / "driver.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "process_created": 1.0}))
    ended = smolrun(tmp_path, "task=attach", f"run={folder.run_id}")
    assert ended.code == 3 and "has no driver: its process" in ended.out
