"""algorithm=fsdp as a user starts it: real processes, shells instead of whole models, and going on
as another algorithm."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tasks.test_whole_runs import SMALL, finish, rows, start, summary

KEYS = [*SMALL, "training.sample_tokens=5", "training.eval_batches=2", "training.log_norms=all"]


def losses(folder: Path, *runs: list[str]) -> list[float]:
    """Of all steps, after one command and then the next, in one folder."""
    for overrides in runs:
        code, _, err = finish(start(folder, *overrides))
        assert (code, err) == (0, "")
    return [row["loss"] for row in rows(folder, "step")]


@pytest.mark.soak
@pytest.mark.timeout(180)
def test_a_run_goes_on_as_another_algorithm_on_other_ranks(tmp_path: Path) -> None:
    # A constant learning rate, as that of other schedules hangs on the number of steps.
    keys = [*KEYS, "training.warmup_steps=2", "training.lr_schedule=constant"]
    plain, cut = tmp_path / "plain", tmp_path / "cut"
    for folder in (plain, cut):
        folder.mkdir()
    fsdp = ["algorithm=fsdp", "algorithm.bucket_mb=0.01", "cluster.ranks=4"]
    expected = losses(plain, [*keys, "training.steps=8"])
    found = losses(
        cut,
        [*keys, *fsdp, "training.steps=4"],
        ["checkpoint.resume=latest", "training.steps=6", "algorithm=classicdp", "cluster.ranks=2"],
        ["checkpoint.resume=latest", "training.steps=8", "algorithm=fsdp", "algorithm.stage=1"],
    )
    assert found == pytest.approx(expected, abs=1e-5)
    assert summary(cut)["algorithm"] == "fsdp"
    assert summary(cut)["final_eval_loss"] == pytest.approx(
        summary(plain)["final_eval_loss"], abs=1e-5
    )
