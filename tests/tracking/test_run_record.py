"""The last figures of a run, and the keys of summary.json."""

from __future__ import annotations

from typing import Any

import pytest

from smolrun.events import (
    CheckpointSaved,
    EvalDone,
    GradientDropped,
    RankStep,
    StepDone,
    TextSample,
)
from smolrun.tracking.run_record import RunRecord


def heard(record: RunRecord) -> None:
    """Four steps, of which another rank missed two, and what follows them."""
    for step in range(4):
        record.record(RankStep(step, 0, 0.1, 0.0, None, 0, 0))
        record.record(StepDone(step, 0.5 * (step + 1), 3.0 - step, 1, 1, 100, 200, 0, 0, 0, 0))
    record.record(EvalDone(3, 1.25, 50, 0.5))
    for so_far in (1, 2):
        record.record(GradientDropped(so_far, 1, so_far))
    record.record(CheckpointSaved(3, "step-00000004", 100, 0.1, 0.2))
    record.record(TextSample(4, "def ", "f():"))


def test_the_summary_has_exactly_the_keys_of_the_design() -> None:
    record = RunRecord()
    heard(record)
    summary = record.summary(
        status="failed",
        reason="rank 1 on pi5 died",
        failed_rank=1,
        failed_host="pi5",
        wall_s=12.34567,
        world_size=2,
        algorithm="classicdp",
        config_hash="c0ffee",
        versions={"python": "3.11.7"},
        time={"computing": 1.0},
        peak_memory_bytes=[5, None],
        exit_code=3,
        restarts=[{"step": 4}],
    )
    assert summary == {
        "status": "failed",
        "exit_code": 3,
        "reason": "rank 1 on pi5 died",
        "failed_rank": 1,
        "failed_host": "pi5",
        "steps": 4,
        "wall_s": 12.346,
        "final_train_loss": 0.0,
        "final_eval_loss": 1.25,
        "final_eval_accuracy": 0.5,
        "checkpoint": "step-00000004",
        "world_size": 2,
        "algorithm": "classicdp",
        "config_hash": "c0ffee",
        "versions": {"python": "3.11.7"},
        "host_versions": {},
        "peak_memory_bytes": [5, None],
        "time": {"computing": 1.0},
        "gradients_dropped": {"1": 2},
        "restarts": [{"step": 4}],
        "departures": [],
        "emulated": [],
        "pushes": {},
    }
    assert record.tokens_per_s == 200.0
    assert record.sample == TextSample(4, "def ", "f():")


def test_a_run_that_never_stepped_has_no_figures() -> None:
    record = RunRecord()
    assert (record.steps, record.train_loss, record.eval_loss) == (0, None, None)
    assert record.tokens_per_s is None


@pytest.mark.parametrize(
    ("losses", "divergence"),
    [
        ([3.0, 2.0], ""),
        ([3.0, float("nan"), 2.0], ""),
        ([3.0, None, 2.0, float("inf"), None], "the loss is not a number since step 4"),
    ],
)
def test_a_loss_that_is_no_number_in_the_end_is_the_reason(losses: list[Any], divergence: str):
    record = RunRecord()
    for step, loss in enumerate(losses):
        record.record(StepDone(step, 0.5, loss, 1, 1, 100, 200, 0, 0, 0, 0))
    summary = record.summary(
        status="done",
        reason="",
        failed_rank=None,
        failed_host=None,
        wall_s=1.0,
        world_size=1,
        algorithm="single",
        config_hash="c0ffee",
        versions={},
        time=None,
        peak_memory_bytes=[],
    )
    assert (record.divergence, summary["reason"]) == (divergence, divergence or None)
