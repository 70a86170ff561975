"""The last figures of a run, and the keys of summary.json."""

from __future__ import annotations

from typing import Any

import pytest

from smolrun.algorithms.edp.protocol import DropReason
from smolrun.algorithms.edp.server import DROP_TEXTS
from smolrun.events import (
    CheckpointSaved,
    EvalDone,
    GradientDropped,
    PushApplied,
    PushDropped,
    RankStep,
    RunStarted,
    StepDone,
    TextSample,
)
from smolrun.tracking.run_record import PushRecord, RunRecord


def heard(record: RunRecord) -> None:
    """Four steps, of which another rank missed two, and what follows them."""
    record.record(RunStarted(1000, 4, 50, 5, "cpu"))
    for step in range(4):
        record.record(RankStep(step, 0, 0.1, 0.0, None, 0, 0))
        record.record(StepDone(step, 0.5 * (step + 1), 3.0 - step, 1, 1, 100, 200, 0, 0, 0, 0))
    record.record(EvalDone(3, 1.25, 50, 0.5))
    for so_far in (1, 2):
        record.record(GradientDropped(so_far, 1, so_far))
    record.record(CheckpointSaved(3, "step-00000004", 100, 0.1, 0.2))
    record.record(TextSample(4, "def ", "f():"))


def test_the_last_figures() -> None:
    record = RunRecord()
    heard(record)
    assert record.summary() == {
        "diverged": False,
        "steps": 4,
        "parameters": 1000,
        "tokens_per_s": 200.0,
        "final_train_loss": 0.0,
        "final_eval_loss": 1.25,
        "final_eval_accuracy": 0.5,
        "checkpoint": "step-00000004",
        "gradients_dropped": {"1": 2},
        "pushes": {},
    }
    assert record.tokens_per_s == 200.0
    assert record.sample == TextSample(4, "def ", "f():")


def test_the_summary_of_a_resumed_run_is_about_all_starts() -> None:
    record = RunRecord(earlier_s=10.0, tokens=1000, steps=10)
    record.record(StepDone(10, 12.0, 3.0, 1, 1, 1000, 200, 0, 0, 0, 0))
    assert record.tokens_per_s == 500.0, "of this start"
    assert record.summary()["tokens_per_s"] == pytest.approx(2000 / 12, abs=1e-3)


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
        ([2.3, 2.1, *[4.5] * 10], ""),
        ([2.3, 2.1, *[355_658.0] * 10], "the loss was 2.3000 in the beginning and is 355658.0000"),
        ([2.3, *[355_658.0] * 4, *[2.2] * 6], ""),  # it has come back
        ([0.1, *[1.9] * 10], ""),  # of a model that was trained before, whose samples differ
        ([5.5, "skipped", "skipped", 5.5], ""),
        ([5.5, *["skipped"] * 3], "there is no update since step 2, as the gradient is not finite"),
    ],
)
def test_a_run_that_diverged_says_how(losses: list[Any], divergence: str) -> None:
    record = RunRecord()
    for step, loss in enumerate(losses):
        loss, norm = (1.0, None) if loss == "skipped" else (loss, 1.0)
        record.record(StepDone(step, 0.5, loss, norm, 1, 100, 200, 0, 0, 0, 0))
    assert record.divergence == divergence
    assert record.summary()["diverged"] is bool(divergence)


def test_progress_is_what_this_start_made_in_the_time_of_training() -> None:
    record = RunRecord()
    assert record.progress(12.0) == "0 steps in 0:00:12", "it never trained"
    heard(record)
    assert record.progress(12.0) == "4 steps in 2.0 s (0:00:12 from start to end)"
    resumed = RunRecord(earlier_s=100.0, steps=138)
    assert resumed.progress(12.0) == "0 steps in 0:00:12"
    for step in (138, 139, 140):
        time_s = 100.0 + 20.0 * (step - 137)
        resumed.record(StepDone(step, time_s, 3.0, 1, 1, 100, 200, 0, 0, 0, 0))
        if step == 138:
            assert resumed.progress(42.0).startswith("1 step (139) in 0:00:20 (0:00:42 ")
    told = "3 steps (139 to 141) in 0:01:00 (0:01:12 from start to end)"
    assert resumed.progress(72.0) == told


def test_who_was_away_for_long_missed_more_steps_than_gradients() -> None:
    record = RunRecord(steps=100, earlier_s=9.0)
    for step in range(100, 110):
        record.record(StepDone(step, 10.0, 3.0, 1, 1, 100, 200, 0, 0, 0, 0))
        record.record(RankStep(step, 0, 0.1, 0.0, None, 0, 0, samples=0))  # it only serves
        if step < 103 or step == 108:
            row = RankStep(step, 2, 0.1, 0.0, None, 0, 0, samples=0 if step == 108 else 8)
            record.record(row)
    assert record.missed == "", "nobody's gradient came too late"
    record.record(GradientDropped(103, 2, 1))
    assert record.missed == "rank 2 missed 7 of 10 steps"


def test_shares_ages_and_what_was_dropped() -> None:
    record = PushRecord()
    assert (record.line, record.summary()) == ("", {})
    for rank, age in ((1, 0), (1, 3), (2, 1)):
        record.record(PushApplied(0, rank, 7, 5, age, samples=8, grad_norm=1.0))
    for reason in ("its rank is gone", "its rank is gone", "it was not finite"):
        record.record(PushDropped(0, 2, 8, reason))
    assert record.summary()["1"] == {
        "pushes": 2,
        "samples": 16,
        "share": 0.6667,
        "mean_age": 1.5,
        "max_age": 3,
        "dropped": {},
    }
    assert record.summary()["2"]["dropped"] == {"its rank is gone": 2, "it was not finite": 1}
    assert record.line == (
        "rank 1 67% of the samples, mean staleness 1.5; "
        "rank 2 33% of the samples, mean staleness 1.0, 3 gradients dropped"
    )


def test_work_lost_to_a_slow_link_is_worth_advice() -> None:
    record = PushRecord()

    def happen(rank: int, applied: int, replaced: int, lost: int = 0) -> None:
        for _ in range(applied):
            record.record(PushApplied(0, rank, 7, 5, 0, samples=8, grad_norm=1.0))
        for why, count in ((DropReason.REPLACED, replaced), (DropReason.LOST, lost)):
            for _ in range(count):
                record.record(PushDropped(0, rank, 7, DROP_TEXTS[why]))

    happen(1, 90, 10, lost=50)
    assert record.advice(can_quantize=True) == "", "a tenth, and what is lost with a rank"
    happen(2, 8, 2)
    told = "rank 2: its link is slower than it computes, so newer gradients took the place of older"
    assert record.advice(can_quantize=True) == f"{told} ones; try quantization=int8"
    assert record.advice(can_quantize=False) == f"{told} ones"
    happen(3, 0, 1)
    assert record.advice(can_quantize=False).startswith("ranks 2 and 3: their links are slower")


def test_reasons_that_a_server_makes_up_are_counted_as_others() -> None:
    record = PushRecord()
    for number in range(1000):
        record.record(PushDropped(0, 1, number, f"reason {number}"))
    dropped = record.summary()["1"]["dropped"]
    assert len(dropped) <= 17 and sum(dropped.values()) == 1000
