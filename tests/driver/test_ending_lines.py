from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from smolrun.driver.run_summary import exit_code, last_lines
from smolrun.tracking.run_folder import RunFolder
from smolrun.tracking.run_view import View

FOLDER = RunFolder(Path("outputs/20260131-142501-x-aaaa"))
FIGURES = {"steps": 12, "wall_s": 65.0, "final_train_loss": 2.5, "final_eval_loss": 2.75}


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
def test_what_is_told(state: Any, summary: dict[str, Any], expected: list[str]) -> None:
    told = "\n".join(last_lines(FOLDER, View(state, summary={**FIGURES, **summary})))
    assert all(line in told for line in expected)
    assert "run folder: outputs" in told


def test_a_damaged_summary_is_told_as_far_as_it_goes() -> None:
    assert last_lines(FOLDER, View("done", summary={"steps": "?"}))[0] == "done: unknown steps"


def test_a_driver_that_is_gone_is_told_with_what_goes_on() -> None:
    told = last_lines(FOLDER, View("died", driver={"host": "mini1"}))
    assert "has no driver: its process on mini1 was killed" in told[0]
    assert told[1] == f"to resume: smolrun checkpoint.resume={FOLDER.run_id}"


@pytest.mark.parametrize(
    ("state", "summary", "code"),
    [("done", {}, 0), ("stopped", {}, 130), ("stopped", {"exit_code": 131}, 131),
     ("failed", {}, 3), ("died", {}, 3)],
)  # fmt: skip
def test_the_exit_code_is_the_runs_own(state: Any, summary: dict[str, Any], code: int) -> None:
    assert exit_code(View(state, summary=summary)) == code


def test_a_server_says_how_long_it_served(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    ended = {
        "status": "stopped",
        "reason": "stopped by the user",
        "wall_s": 61.0,
        "url": "http://x",
    }
    lines = last_lines(folder, View(state="stopped", summary=ended))
    assert lines == [
        "stopped (stopped by the user): served for 0:01:01",
        f"run folder: {tmp_path}",
    ]
