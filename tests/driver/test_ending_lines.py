"""The end of a run that another process drove, as task=attach and task=stop print it."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from smolrun.cli.compose import compose
from smolrun.driver.run_summary import RunSummary, end_of, exit_code
from smolrun.driver.trackers import time_report
from smolrun.events import EvalDone, RankStep, RunStarted, StepDone, TextSample
from smolrun.launch.supervisor_events import RunOutcome
from smolrun.tracking.console import Console
from smolrun.tracking.run_end import RunEnd
from smolrun.tracking.run_folder import RunFolder
from smolrun.tracking.run_record import RunRecord
from smolrun.tracking.run_view import View
from tests.tracking.test_run_end import Terminal

FOLDER = RunFolder(Path("outputs/20260131-142501-x-aaaa"))
FIGURES = {"steps": 12, "wall_s": 65.0, "final_train_loss": 2.5, "final_eval_loss": 2.75}


def lines(view: View, folder: RunFolder = FOLDER) -> list[str]:
    return list(end_of(folder, view).lines())


@pytest.mark.parametrize(
    ("state", "summary", "expected"),
    [
        (
            "done",
            {"reason": None},
            ["done: 12 steps, 0:01:05 from start to end, loss 2.5000, evaluation loss 2.7500"],
        ),
        (
            "stopped",
            {"reason": "stopped by the user", "checkpoint": "step-00000012"},
            ["stopped (stopped by the user): 12 steps", "checkpoint.resume=20260131-142501"],
        ),
        (
            "failed",
            {"reason": "rank 1 died"},
            ["failed (rank 1 died): 12", "no checkpoint was saved"],
        ),
    ],
)  # fmt: skip
def test_a_run_of_an_earlier_version(
    state: Any, summary: dict[str, Any], expected: list[str]
) -> None:
    shown = "\n".join(lines(View(state, summary={**FIGURES, **summary})))
    assert all(line in shown for line in expected)
    assert "run folder: outputs" in shown


def test_a_driver_that_is_gone_is_named_with_the_command_that_resumes() -> None:
    shown = lines(View("died", driver={"host": "mini1"}))
    assert "has no driver: its process on mini1 was killed" in shown[0]
    assert shown[1] == f"to resume: smolrun checkpoint.resume={FOLDER.run_id}"
    terminal = Terminal()
    Console(steps=1, world_size=1, stream=terminal).show_end(end_of(FOLDER, View("died")))
    assert "has no driver" in terminal.getvalue()


def test_a_server_whose_driver_is_gone_is_not_resumed(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.write_config("task: serve\n")
    summary = {"status": "serving", "url": "http://mini1:7665"}
    end = end_of(folder, View("died", summary=summary, driver={"host": "mini1"}))
    assert "its process on mini1 was killed" in end.headline
    assert not end.commands


@pytest.mark.parametrize(
    ("state", "summary", "code"),
    [("done", {}, 0), ("stopped", {}, 130), ("stopped", {"exit_code": 131}, 131),
     ("failed", {}, 3), ("died", {}, 3), ("done", {"exit_code": 256}, 0),
     ("done", {"exit_code": True}, 0), ("failed", {"exit_code": "0"}, 3)],
)  # fmt: skip
def test_the_exit_code_is_the_runs_own(state: Any, summary: dict[str, Any], code: int) -> None:
    assert exit_code(View(state, summary=summary)) == code


def test_a_server_says_how_long_it_served(tmp_path: Path) -> None:
    ended = {"reason": "stopped by the user", "wall_s": 61.0, "url": "http://x"}
    assert lines(View(state="stopped", summary=ended), RunFolder(tmp_path)) == [
        "stopped (stopped by the user): served for 0:01:01",
        f"run folder: {tmp_path}",
    ]


def a_run(folder: Path, outcome: RunOutcome, stream: io.StringIO) -> RunFolder:
    """A run of two ranks and two steps, shown on the stream and kept in the folder."""
    config = compose(["cluster.ranks=2"])
    record, times = RunRecord(checkpoint="step-00000002"), time_report(config, print)
    for event in (
        RunStarted(8, 2, 4, 4, "cpu"),
        TextSample(0, "def f(", "x"),
        *(StepDone(step, 1.0 + step, 2.5, 1.0, 1.0, 8, 8, 0, 0, 0, 0) for step in range(2)),
        *(RankStep(1, rank, 0.6, 0.4, None, 100, 4) for rank in range(2)),
        EvalDone(1, 2.0, 1),
        TextSample(2, "def f(", "y):\n    return"),
    ):
        record.record(event)
        times.record(event)
    run = RunFolder(folder)
    run.write_config(yaml.safe_dump(config.model_dump(mode="json")))
    summary = RunSummary(config, run, record, times, {})
    summary.report(outcome, 12.0, Console(steps=2, world_size=2, stream=stream))
    return run


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
@pytest.mark.parametrize("status", ["done", "stopped"])
def test_it_is_what_the_run_itself_has_shown(
    stream: type[io.StringIO], status: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    shown, again = stream(), stream()
    run = a_run(tmp_path, RunOutcome(status, 0, "stopped by the user"), shown)
    assert "perplexity" in shown.getvalue() and "computing" in shown.getvalue()
    end = end_of(run, View(status, summary=run.summary()))
    Console(steps=2, world_size=2, stream=again).show_end(end)
    assert again.getvalue() == shown.getvalue()


def test_a_failed_run_has_its_reason_and_figures(tmp_path: Path) -> None:
    run = a_run(tmp_path, RunOutcome("failed", 3, "rank 1 died"), io.StringIO())
    shown = lines(View("failed", summary=run.summary()), run)
    assert shown[0].startswith("failed (rank 1 died): 2 steps in 2.0 s (0:00:12 from start to end)")
    assert shown[-1] == f"to resume: smolrun checkpoint.resume={tmp_path}"


@pytest.mark.parametrize(
    "end",
    [
        None, "done", [], {"status": "done"}, {"status": "done", "headline": 3},
        {"status": "done", "headline": "done", "shares": [[1.5, "x"]]},
        {"status": "done", "headline": "done", "shares": [[0.1, "x"]] * 6},
        {"status": "done", "headline": "done", "figures": [["loss"]]},
    ],
)  # fmt: skip
def test_an_end_that_is_none_is_replaced_by_figures(end: Any) -> None:
    shown = end_of(FOLDER, View("done", summary={**FIGURES, "end": end}))
    assert shown.headline == "done: 12 steps, 0:01:05 from start to end"


@pytest.mark.parametrize("value", ["?", True, -1, 1e999, [], {}, None])
def test_figures_of_other_types_count_as_absent(value: Any) -> None:
    shown = lines(View("done", summary=dict.fromkeys((*FIGURES, "checkpoint", "url"), value)))
    if value == "?":
        assert shown[0] == "done: served"  # it may be an address
    else:
        assert shown[0].startswith("done: unknown steps")


def test_an_end_from_elsewhere_commands_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    evil = "x\x1b]0;y\x07\x1b[2J"
    row = (evil, evil)
    end = RunEnd(
        evil, evil, [row], [(0.5, evil)], evil, evil, [row], evil, [row], False, evil, [row]
    )
    terminal = Terminal()
    view = View("done", summary={"end": msgspec.to_builtins(end), "checkpoint": evil})
    Console(steps=1, world_size=1, stream=terminal).show_end(end_of(FOLDER, view))
    text = terminal.getvalue()
    assert "to export it" in text and "run folder" in text
    assert "\x1b]" not in text and "\x1b[2J" not in text and "\x07" not in text
