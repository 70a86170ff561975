"""algorithm=syncps as a user starts it: real processes, one of them frozen, and going on as another
algorithm."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.tasks.background import in_background, process_of
from tests.tasks.test_fsdp_runs import KEYS, losses
from tests.tasks.test_whole_runs import summary
from tests.waiting import until

GO_ON = ["checkpoint.resume=latest"]
SYNCPS = ["algorithm=syncps", "algorithm.bucket_mb=0.01", "cluster.ranks=3"]


@pytest.mark.timeout(120)
def test_the_others_go_on_while_a_worker_is_frozen(tmp_path: Path) -> None:
    with in_background(tmp_path, *SYNCPS, "algorithm.straggler_timeout_s=2.0") as run:
        run.until_it_trains()
        frozen = process_of(2, run.path)

        def rows(kind: str) -> list[dict[str, Any]]:
            lines = (run.path / "metrics.jsonl").read_text().splitlines()
            found = [json.loads(line) for line in lines if line.endswith("}")]
            return [row for row in found if row["event"] == kind]

        whole = rows("step")[0]["tokens"]
        frozen.suspend()
        try:
            before = run.steps()
            until(lambda: run.steps() > before + 5, 20)
            assert [row["so_far"] for row in rows("gradient_dropped")] == [1]
            assert rows("step")[-1]["tokens"] < whole
        finally:
            frozen.resume()
        until(lambda: rows("step")[-1]["tokens"] == whole, 20)
        (dropped,) = rows("gradient_dropped")
        assert dropped["rank"] == 2


@pytest.mark.soak
@pytest.mark.timeout(300)
def test_a_run_goes_on_as_another_algorithm_on_other_ranks(tmp_path: Path) -> None:
    keys = [*KEYS, "training.warmup_steps=2", "training.lr_schedule=constant"]
    plain, pushed = tmp_path / "plain", tmp_path / "pushed"
    for folder in (plain, pushed):
        folder.mkdir()
    expected = losses(plain, [*keys, "training.steps=8"])
    found = losses(
        pushed,
        [
            *(*keys, "training.steps=3", "cluster.ranks=4"),
            *("algorithm=fsdp", "algorithm.stage=3", "algorithm.bucket_mb=0.01"),
        ],
        [*GO_ON, "training.steps=5", "algorithm=classicdp", "cluster.ranks=2"],
        [*GO_ON, "training.steps=6", *SYNCPS],
        [
            *(*GO_ON, "training.steps=8", "algorithm=syncps", "cluster.ranks=2"),
            "algorithm.server_trains=false",
        ],
    )
    assert found == pytest.approx(expected, abs=1e-5)
    assert summary(pushed)["algorithm"] == "syncps"
    assert summary(pushed)["gradients_dropped"] == {}
    assert summary(pushed)["final_eval_loss"] == pytest.approx(
        summary(plain)["final_eval_loss"], abs=1e-5
    )
