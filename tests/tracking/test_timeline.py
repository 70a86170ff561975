"""timeline.json: Chrome's trace format, all ranks in one file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from smolrun.events import EvalDone, Timeline
from smolrun.tracking.timeline import TimelineFile

COMPUTE = ["forward_backward", "compute", 5, 0.001, 0.02]
NETWORK = [["all_reduce 1", "network", 5, 0.01, 0.02], ["all_reduce 2", "network", 5, 0.02, 0.02]]
LATER = ["all_reduce 3", "network", 6, 0.05, 0.01]


def rows(path: Path, kind: str) -> list[dict[str, Any]]:
    return [row for row in json.loads(path.read_text())["traceEvents"] if row["ph"] == kind]


def test_spans_of_all_ranks_become_rows_in_microseconds(tmp_path: Path):
    path = tmp_path / "timeline.json"
    file = TimelineFile(path, ["mini", "pi5"])
    file.record(Timeline(5, 1, [COMPUTE]))
    file.record(EvalDone(5, 1.0, 1))
    assert not path.exists(), "rank 0 has not told"
    file.record(Timeline(5, 0, [COMPUTE, *NETWORK, LATER]))
    first, *rest = rows(path, "X")
    assert first == {
        "name": "forward_backward", "cat": "compute", "ph": "X", "pid": 0, "tid": 0,
        "ts": 1000.0, "dur": 20000.0, "args": {"step": 5},
    }  # fmt: skip
    assert [row["pid"] for row in rest] == [0, 0, 0, 1]
    names = [row["args"]["name"] for row in rows(path, "M") if row["name"] == "process_name"]
    assert names == ["rank 0 (mini)", "rank 1 (pi5)"]


def test_what_overlaps_lies_in_rows_below_each_other(tmp_path: Path):
    file = TimelineFile(tmp_path / "timeline.json", ["a"])
    file.record(Timeline(5, 0, [*NETWORK, LATER]))
    tids = {row["name"]: row["tid"] for row in rows(tmp_path / "timeline.json", "X")}
    assert tids["all_reduce 1"] != tids["all_reduce 2"]
    assert tids["all_reduce 3"] == tids["all_reduce 1"], "there is room again"


def test_a_run_that_ended_early_keeps_what_was_told(tmp_path: Path):
    path = tmp_path / "timeline.json"
    silent = TimelineFile(path, ["a", "b"])
    silent.close()
    assert not path.exists()
    file = TimelineFile(path, ["a", "b"])
    file.record(Timeline(5, 1, [COMPUTE]))
    file.close()
    assert len(rows(path, "X")) == 1


def test_a_worker_that_overlaps_everything_gets_a_hundred_rows(tmp_path: Path):
    file = TimelineFile(tmp_path / "timeline.json", ["a"])
    file.record(
        Timeline(0, 0, [("x", "compute", 0, 0.0, 1.0)] * 150 + [("y", "wait", 0, 0.0, 1.0)])
    )
    tids = {row["tid"] for row in rows(tmp_path / "timeline.json", "X") if row["name"] == "x"}
    assert tids == {*range(100)}, "and none of another lane's"
