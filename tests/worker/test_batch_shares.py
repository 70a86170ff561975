"""Shares by speed in whole runs: given, measured, taken up again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from smolrun.cli.compose import compose
from smolrun.data.prepared import Prepared
from smolrun.estimate.dry_run import largest_plan
from smolrun.parts.placement import BatchPlan, DataCoordinates, rank_speeds
from smolrun.worker.train import share_work
from tests.tasks.test_whole_runs import SMALL, finish, rows, start, summary

CONFIG = {"training": {"global_batch_size": 12, "micro_batch_size": "auto", "steps": 9}}
RUN = [*SMALL, "training.global_batch_size=16", "training.eval_every=0", "training.eval_batches=1"]
CLUSTER = """\
# Two hosts here, one of them five times slower
name: two
hosts:
  - {name: fast, speed: auto, emulate: {compute: 0.5}}
  - {name: slow, speed: auto, emulate: {compute: 0.1, bandwidth_mbps: 500, latency_ms: 0.5}}
"""


def coordinates(speeds: Sequence[float]) -> DataCoordinates:
    return DataCoordinates(0, speeds)


def prepared(stream: dict[str, Any] | None = None) -> Prepared:
    return Prepared("features", "", "", 10, 4, None, None, 12, 4, "", stream=stream)  # type: ignore[arg-type]


def test_numbers_are_used_as_they_are() -> None:
    plan, balance = share_work(CONFIG, prepared(), [3.0, 1.0, 0.0], coordinates, print)
    assert balance is None and isinstance(plan, BatchPlan) and plan.sizes == (9,)


@pytest.mark.parametrize(
    ("overrides", "largest"),
    [
        (["algorithm=edp"], 11),
        (["algorithm=edp", "algorithm.server_trains=true"], 8),
        (["algorithm=edp", "algorithm.pushes_per_batch=2"], 16),
        (["algorithm=syncps"], 8),
        (["algorithm=syncps", "algorithm.server_trains=false"], 11),
    ],
)
def test_a_server_that_does_not_train_has_no_share(overrides: list[str], largest: int) -> None:
    size = "training.global_batch_size=32"
    plan = largest_plan(compose([*overrides, "cluster.ranks=4", size]))
    assert plan.sizes == (largest,)


def test_one_auto_has_all_ranks_measured_and_a_stream_changes_later() -> None:
    plan, balance = share_work(CONFIG, prepared(), [2.0, "auto", "auto"], coordinates, print)
    assert balance is not None and plan.at(0).sizes == (6,)
    _, late = share_work(CONFIG, prepared({"prefetch_steps": 4}), [1.0, "auto"], coordinates, print)
    assert late is not None and (balance.prefetched_steps, late.prefetched_steps) == (0, 5)


def test_every_rank_of_a_host_has_its_speed() -> None:
    hosts = "[{name: a, ranks: 2, speed: 3.0}, {name: b, speed: auto}]"
    config = compose([f"cluster.hosts={hosts}"])
    assert rank_speeds(config.cluster.model_dump(), 3) == [3.0, 3.0, "auto"]
    assert rank_speeds({"hosts": None}, 2) == [1.0, 1.0]
    plan = largest_plan(compose([f"cluster.hosts={hosts}", "training.global_batch_size=7"]))
    assert plan.sizes == (3,)


def samples(folder: Path) -> dict[int, list[int]]:
    """Step -> samples of each rank."""
    found: dict[int, list[int]] = {}
    for row in sorted(rows(folder, "rank_step"), key=lambda row: row["rank"]):
        found.setdefault(row["step"], []).append(row["samples"])
    return found


@pytest.mark.timeout(120)
def test_a_slow_host_gets_less_and_a_run_that_goes_on_keeps_the_shares(tmp_path: Path) -> None:
    (tmp_path / "conf" / "cluster").mkdir(parents=True)
    (tmp_path / "conf" / "cluster" / "two.yaml").write_text(CLUSTER)
    keys = ["cluster=two", *RUN, "training.sample_tokens=0", "checkpoint.every=12"]
    code, out, err = finish(start(tmp_path, *keys, "training.steps=12"))
    assert code == 0, out + err
    assert "emulated: fast emulates 0.5x speed; slow emulates" in out
    first = samples(tmp_path)
    assert first[0] == [8, 8] and all(sum(counts) == 16 for counts in first.values())
    assert first[11][1] < 8, "five times slower, for half of the work"
    (told, *_) = [note["message"] for note in rows(tmp_path, "note") if "shares" in note["message"]]
    assert told.startswith("batch shares from step 11: ") and "rank 1 (slow)" in told
    assert f"info: {told}" in out
    assert len(summary(tmp_path)["emulated"]) == 2

    resume = ["checkpoint.resume=latest", "training.steps=14"]
    code, out, err = finish(start(tmp_path, *keys, *resume))
    assert code == 0, out + err
    assert [samples(tmp_path)[step] for step in (12, 13)] == [first[11]] * 2
