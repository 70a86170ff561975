"""Whole runs with their trackers: who was waited for is named, and a broken W&B ends nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.tasks.test_whole_runs import SMALL, finish, rows, start, summary
from tests.tracking.fake_wandb import KEY, fake_wandb

SLOW_RANK = '''
import time
from smolrun.algorithms.classicdp import ClassicDP

class Slow(ClassicDP):
    """Rank 1 of this one computes longer."""

    def __init__(self, context):
        super().__init__(context, bucket_mb=1.0)

    def forward_backward(self, micro_batches):
        if self.context.mesh.rank == 1:
            time.sleep(0.2)
        return super().forward_backward(micro_batches)
'''
SLOW = ["algorithm.name=slow", "algorithm.target=slow_rank:Slow", "training.steps=10"]


@pytest.mark.soak
def test_a_slow_rank_is_named_by_verdict_summary_and_timeline(tmp_path: Path) -> None:
    (tmp_path / "slow_rank.py").write_text(SLOW_RANK)
    code, out, err = finish(start(tmp_path, *SMALL, *SLOW, "training.eval_batches=1"))
    assert code == 0, err
    (line,) = [line for line in out.splitlines() if line.startswith("where the time went: ")]
    assert re.search(r"waiting for rank 1 \([\d.]+x slower\)", line)
    time = summary(tmp_path)["time"]
    assert time["slow_rank"] == 1
    assert time["slow_factor"] > 2
    assert time["waiting_for_slower_ranks"] > 0.2
    trace = json.loads((tmp_path / "outputs" / "latest" / "timeline.json").read_text())
    waited = {0: 0.0, 1: 0.0}
    for row in trace["traceEvents"]:
        if row.get("cat") == "wait":
            waited[row["pid"]] += row["dur"] / 1e6
    assert waited[0] > 5 * 0.2 / 2 > waited[1]


@pytest.mark.soak
@pytest.mark.parametrize("fault", ["", "500", "slow", "garbage", "denied"])
def test_a_run_trains_to_its_end_whatever_the_wandb_server_does(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with fake_wandb(fault) as server:  # type: ignore[arg-type]
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        wanted = ["tracker=wandb", "tracker.timeout_s=1", "training.steps=6"]
        code, out, err = finish(start(tmp_path, *SMALL, *wanted, "training.sample_tokens=0"))
    assert code == 0, err
    assert len(rows(tmp_path, "step")) == 6
    warnings = [line for line in out.splitlines() if line.startswith("warning: ")]
    assert err == ""
    assert len(warnings) == (1 if fault else 0)
    if fault:
        assert "to upload it later: wandb sync outputs" in warnings[0]
    else:
        assert [run.steps for run in server.runs.values()] == [list(range(6))]
    files = [path for path in (tmp_path / "outputs").rglob("*") if path.is_file()]
    assert [path for path in files if KEY.encode() in path.read_bytes()] == []
