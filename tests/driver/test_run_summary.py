"""The last lines of a run, for ends made by hand."""

from __future__ import annotations

import io
from datetime import datetime
from pathlib import Path

import pytest

from smolrun.cli.compose import compose
from smolrun.config import config_hash
from smolrun.driver.run_summary import RunSummary, with_advice
from smolrun.driver.trackers import time_report
from smolrun.estimate import dry_run
from smolrun.events import PushApplied, PushDropped, StepDone
from smolrun.launch.supervisor_events import RunOutcome
from smolrun.tracking.console import Console
from smolrun.tracking.run_folder import RunFolder
from smolrun.tracking.run_record import RunRecord


def told(folder: Path, outcome: RunOutcome, record: RunRecord, *overrides: str) -> str:
    """What stdout gets."""
    config = compose([*overrides, "cluster.ranks=2"])
    stream = io.StringIO()
    ending = RunSummary(config, RunFolder(folder), record, time_report(config, print), {})
    console = Console(steps=1, world_size=2, stream=stream)
    ending.report(outcome, 12.0, console)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("every", "checkpoint", "expected"),
    [
        (20, None, "no checkpoint yet: one is saved every 20 steps (checkpoint.every)"),
        (1, None, "no checkpoint yet: one is saved every step (checkpoint.every)"),
        (0, None, "no checkpoints are saved: checkpoint.every=100 saves one every 100 steps"),
        (20, "step-00000020", "to resume from step-00000020: smolrun checkpoint.resume="),
    ],
)
def test_a_failure_says_what_is_saved(
    every: int,
    checkpoint: str | None,
    expected: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    record = RunRecord(checkpoint=checkpoint)
    failed = RunOutcome("failed", 3, "rank 1 died", failed_rank=1)
    told(tmp_path, failed, record, f"checkpoint.every={every}")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "smolrun: rank 1 died"
    assert lines[1].startswith(f"smolrun: {expected}")


def test_the_summary_has_exactly_the_keys_of_the_design(tmp_path: Path) -> None:
    config = compose(["cluster.ranks=2"])
    failed = RunOutcome(
        "failed", 3, "rank 1 on pi5 died", 1, "pi5",
        versions={"python": "3.11.7"}, summaries={0: {"peak_memory_bytes": 5}},
    )  # fmt: skip
    record, folder, times = RunRecord(), RunFolder(tmp_path), time_report(config, print)
    restarts = [{"step": 4}]
    config = config.with_typed(["-m", "cluster.ranks=2", "data.path=https://me:secret@host/x y"])
    summary = RunSummary(config, folder, record, times, {}, restarts, 60.0).summary(
        failed, 12.34567
    )
    began, ended = (
        datetime.fromisoformat(summary.pop(f"{key}_at")) for key in ("started", "ended")
    )
    assert 11 <= (ended - began).total_seconds() <= 14
    assert summary == {
        "status": "failed",
        "exit_code": 3,
        "reason": "rank 1 on pi5 died",
        "failed_rank": 1,
        "failed_host": "pi5",
        "command": "smolrun -m cluster.ranks=2 'data.path=https://***@host/x y'",
        "overrides": ["cluster.ranks=2", "data.path=https://***@host/x y"],
        **record.summary(),
        "wall_s": 72.346,  # with that of earlier starts
        "world_size": 2,
        "algorithm": "classicdp",
        "config_hash": config_hash(config),
        "versions": {"python": "3.11.7"},
        "host_versions": {},
        "peak_memory_bytes": [5, None],
        "time": None,
        "restarts": [{"step": 4}],
        "departures": [],
        "emulated": [],
    }


def test_a_run_that_diverged_has_that_for_a_reason(tmp_path: Path) -> None:
    config, record = compose([]), RunRecord()
    for step in range(3):
        record.record(StepDone(step, 1.0, float("nan"), 1.0, 1.0, 8, 8, 0, 0, 0, 0))
    ending = RunSummary(config, RunFolder(tmp_path), record, time_report(config, print), {})
    summary = ending.summary(RunOutcome("done", 0), 1.0)
    assert summary["diverged"] and summary["reason"] == record.divergence


def test_gradients_lost_to_a_slow_link_are_worth_advice_once(tmp_path: Path) -> None:
    record = RunRecord()
    record.record(PushApplied(0, 1, 0, 0, 0, samples=8, grad_norm=1.0))
    record.record(PushDropped(0, 1, 1, "a newer one took its place"))
    done = RunOutcome("done", 0, "")
    assert "try quantization=int8" in told(tmp_path, done, record, "algorithm=edp")
    again = told(tmp_path, done, record, "algorithm=edp", "quantization=int8")
    assert "its link is slower than it computes" in again
    assert "try quantization=int8" not in again


def test_a_run_that_diverged_is_done_and_says_so(tmp_path: Path) -> None:
    record = RunRecord()
    for step, loss in enumerate([2.3, 355_658.0, 355_658.0]):
        record.record(StepDone(step, 1.0, loss, 1.0, 1.0, 8, 8, 0, 0, 0, 0))
    shown = told(tmp_path, RunOutcome("done", 0, ""), record)
    assert shown.startswith("done (diverged): 3 steps")
    assert "the run diverged: the loss was 2.3000 in the beginning" in shown


def outcome(is_memory: bool) -> RunOutcome:
    return RunOutcome("failed", 3, "rank 0 on local ran out of memory", 0, "local", is_memory)


def test_a_run_that_ran_out_of_memory_gets_the_two_best_remedies(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dry_run, "start_probe", lambda: None)
    told = with_advice(compose(["model=gpt_small", "data.sequence_length=512"]), outcome(True))
    start, _, advice = told.reason.partition("; try ")
    assert start == "rank 0 on local ran out of memory"
    first, second = advice.split(" or ")
    assert first.startswith("training.micro_batch_size=1 (saves about ")
    assert second.startswith("training.recompute=true (saves about ")


def test_other_ends_get_no_advice() -> None:
    plain = outcome(False)
    assert with_advice(compose([]), plain) is plain


def test_no_estimate_does_not_hide_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no torch here")

    monkeypatch.setattr(dry_run, "estimate", broken)
    reason = with_advice(compose([]), outcome(True)).reason
    assert reason.endswith("a smaller training.micro_batch_size (no estimate: no torch here)")


def test_what_fits_a_model_of_own_code_and_an_own_loss_is_offered(tmp_path: Path) -> None:
    record = RunRecord(checkpoint="step-00000020", eval_loss=2.0)
    done = RunOutcome("done", 0)
    ours = told(tmp_path, done, record)
    assert "perplexity 7.4" in ours
    assert 'smolrun task=generate prompt="def main("' in ours, "its data are Python's sources"
    own_loss = told(tmp_path, done, record, "model.loss=json:loads")
    assert "perplexity" not in own_loss, "e to the power of another loss means nothing"
    own = told(tmp_path, done, record, "model.target=json:loads", "data=digits")
    assert f'in Python: model, tokenizer = smolrun.load("{tmp_path}")' in own
    assert "task=generate" not in own
    assert all("smolrun task=export model.run=" in text for text in (ours, own))
