"""Whole runs as a user starts them: real processes, real sockets, and what is left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.waiting import until

SMALL = [
    "data.max_mb=1",
    "model.layers=1",
    "model.width=32",
    "model.heads=2",
    "data.sequence_length=16",
]


def start(folder: Path, *overrides: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "NO_COLOR": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "smolrun.cli", *overrides],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(run: subprocess.Popen[str], timeout_s: float = 100.0) -> tuple[int, str, str]:
    try:
        out, err = run.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        run.kill()
        out, err = run.communicate()
    return run.returncode, out, err


def rows(folder: Path, event: str) -> list[dict[str, Any]]:
    text = (folder / "outputs" / "latest" / "metrics.jsonl").read_text()
    lines = text.split("\n")[:-1]  # the last one may be half written
    return [row for row in map(json.loads, lines) if row["event"] == event]


def summary(folder: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(
        (folder / "outputs" / "latest" / "summary.json").read_text()
    )
    return loaded


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_run_trains_and_leaves_what_it_promises(tmp_path: Path) -> None:
    code, out, err = finish(
        start(
            tmp_path,
            *SMALL,
            "training.steps=6",
            "training.check_replicas=true",
            "training.sample_tokens=5",
        )
    )
    assert code == 0, err
    assert "sample:\n" in out
    steps = rows(tmp_path, "step")
    assert [row["step"] for row in steps] == list(range(6))
    promised = "event step rank time_s loss grad_norm lr tokens tokens_per_s"
    promised += " bytes_sent bytes_received compute_s wait_s"
    assert set(steps[0]) == set(promised.split())
    assert sorted(row["rank"] for row in rows(tmp_path, "rank_step")) == [0] * 6 + [1] * 6
    assert all(len(set(row["hashes"])) == 1 for row in rows(tmp_path, "replica_hash"))
    told = summary(tmp_path)
    assert (told["status"], told["steps"], told["world_size"]) == ("done", 6, 2)
    assert told["final_train_loss"] == steps[-1]["loss"]
    assert {path.name for path in (tmp_path / "outputs" / "latest").iterdir()} == {
        "config.yaml", "metrics.jsonl", "summary.json", "timeline.json", "driver.json",
        "tokenizer", "logs", "checkpoints",
    }  # fmt: skip


@pytest.mark.soak
def test_losses_do_not_depend_on_how_many_ranks_share_the_batch(tmp_path: Path) -> None:
    losses = []
    for choice in (["algorithm=single"], ["cluster.ranks=3"]):
        code, _, err = finish(
            start(
                tmp_path,
                *SMALL,
                "precision=float64",
                "training.steps=5",
                "training.sample_tokens=0",
                *choice,
            )
        )
        assert code == 0, err
        losses.append([row["loss"] for row in rows(tmp_path, "step")])
    assert losses[0] == pytest.approx(losses[1], abs=1e-12)


def test_a_killed_worker_ends_the_run_with_its_name_and_nothing_left(tmp_path: Path) -> None:
    run = start(tmp_path, *SMALL, "training.steps=100000", "training.eval_every=0")
    until(
        lambda: (
            (tmp_path / "outputs" / "latest" / "metrics.jsonl").exists()
            and len(rows(tmp_path, "step")) > 3
        ),
        100,
    )
    workers = psutil.Process(run.pid).children()
    assert len(workers) == 2
    assert all(worker.net_connections("tcp") for worker in workers), "they talk over TCP"
    workers[0].send_signal(signal.SIGKILL)
    code, _, err = finish(run)
    assert code == 3
    assert "died from signal 9" in err or "died from exit code" in err
    assert summary(tmp_path)["status"] == "failed"
    assert summary(tmp_path)["failed_rank"] in (0, 1)
    until(
        lambda: not any(worker.is_running() and worker.status() != "zombie" for worker in workers)
    )


def test_a_bench_writes_its_rows(tmp_path: Path) -> None:
    wanted = ["bench.sizes=[4096]", "bench.world_sizes=[2]", "bench.repeats=2"]
    code, out, err = finish(start(tmp_path, "task=bench", *wanted))
    assert code == 0, err
    assert not (tmp_path / "outputs" / "latest").exists()  # it is for what was trained
    (rows,) = (tmp_path / "outputs").glob("*/bench.jsonl")
    (line,) = rows.read_text().splitlines()
    row = json.loads(line)
    assert (row["bench"], row["op"], row["peer"]) == ("collectives", "all_reduce", "gloo")
    assert (row["bytes"], row["world_size"]) == (4096, 2)
    assert row["spread"][0] <= row["ratio"] <= row["spread"][1]
    assert "all_reduce" in out
