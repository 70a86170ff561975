"""Sweeps that really train: the jobs are processes of the command itself."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest

from smolrun.tracking.sweep_folder import SweepFolder, find_sweep
from tests.sweep.fakes import text_of
from tests.tasks.test_whole_runs import SMALL, finish, is_alive, start
from tests.waiting import until

ONE = [*SMALL, "algorithm=single", "training.eval_every=0", "training.sample_tokens=0"]


def summary(folder: SweepFolder, job: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder.path / job / "summary.json").read_text())
    return found


def losses(folder: SweepFolder, job: str) -> list[float]:
    lines = map(json.loads, text_of(folder.path / job / "metrics.jsonl").splitlines())
    return [line["loss"] for line in lines if line["event"] == "step"]


def newest(folder: Path) -> SweepFolder:
    found = find_sweep("latest", folder / "outputs")
    assert found is not None
    return found


@pytest.mark.timeout(180)
def test_a_detached_sweep_trains_compares_and_ends(tmp_path: Path):
    words = ["-m", *ONE, "training.steps=3", "optimizer.lr=0.001,0.01", "detach=true"]
    code, out, err = finish(start(tmp_path, *words), 150)
    assert code == 0, err
    assert "runs in the background" in out
    sweep = newest(tmp_path)
    driver = psutil.Process(json.loads((sweep.path / "driver.json").read_text())["pid"])
    until(lambda: not is_alive(driver), 150)
    jobs = ["optimizer.lr=0.001", "optimizer.lr=0.01"]
    found = [summary(sweep, job) for job in jobs]
    assert [one["status"] for one in found] == ["done", "done"]
    assert "optimizer.lr=0.01" in found[1]["overrides"]
    # The same samples in the same order: nothing was learnt before the first update.
    assert losses(sweep, jobs[0])[0] == losses(sweep, jobs[1])[0]
    assert losses(sweep, jobs[0])[2] != losses(sweep, jobs[1])[2]
    assert (sweep.path / "comparison.html").is_file()
    assert not (tmp_path / "outputs" / "latest").exists()
    # The first has prepared tokenizer and tokens for all.
    log = text_of(sweep.path / jobs[1] / "driver.log")
    assert re.findall(r"preparing: (.*)", log) in ([], ["reading text"])
    assert "job 2 of 2 done" in text_of(sweep.path / "driver.log")


@pytest.mark.soak
@pytest.mark.skipif(os.name == "nt", reason="Ctrl-C of another process")
@pytest.mark.timeout(400)
def test_a_stopped_job_resumes_to_the_same_weights(tmp_path: Path):
    words = ["-m", *SMALL, "cluster.ranks=2", "training.steps=400", "algorithm=classicdp,fsdp"]
    stopped = start(tmp_path, *words)
    until(lambda: find_sweep("latest", tmp_path / "outputs") is not None, 60)
    sweep = newest(tmp_path)
    until(lambda: len(losses(sweep, "algorithm=classicdp")) > 20, 100)
    stopped.send_signal(signal.SIGINT)
    code, _, err = finish(stopped)
    assert code == 130, err
    assert summary(sweep, "algorithm=classicdp")["status"] == "stopped"
    assert len(losses(sweep, "algorithm=classicdp")) < 400
    code, out, err = finish(start(tmp_path, "-m", "sweep.resume=latest"), 200)
    assert code == 0, err
    assert "1 stopped, 1 waiting" in out
    whole = finish(start(tmp_path, *SMALL, "cluster.ranks=2", "training.steps=400"), 100)
    assert whole[0] == 0, whole[2]
    alone = json.loads((tmp_path / "outputs" / "latest" / "summary.json").read_text())
    resumed = summary(sweep, "algorithm=classicdp")
    assert resumed["final_train_loss"] == alone["final_train_loss"]
    assert len(losses(sweep, "algorithm=classicdp")) == 400
