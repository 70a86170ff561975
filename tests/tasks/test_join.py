"""Machines that join, on loopback: real processes, real TLS, the code over stdin."""

from __future__ import annotations

import json
from pathlib import Path

import psutil
import pytest

from smolrun.launch.supervisor_events import EXIT_FAILED, EXIT_STOPPED
from tests.tasks.joining import Process, nearby
from tests.waiting import until

pytestmark = pytest.mark.soak

JOINED = r"joined cluster \S+ of \S+ as (\S+);"
LONG = ["training.steps=50000", "training.eval_every=0", "training.sample_tokens=0"]


def workers(joiner: Process) -> list[psutil.Process]:
    return psutil.Process(joiner.popen.pid).children(recursive=True)


def run_folder(begun: Process) -> Path:
    return (begun.folder / "outputs" / "latest").resolve()


def steps(begun: Process) -> int:
    metrics = list((begun.folder / "outputs").glob("*/metrics.jsonl"))
    return metrics[0].read_text().count('"event": "step"') if metrics else 0


@pytest.mark.timeout(400)
def test_three_machines_train_twice_and_their_replicas_are_equal(tmp_path: Path):
    short = ["training.steps=12", "training.check_replicas=true", "checkpoint.every=6"]
    with nearby(tmp_path) as lan:
        begun = lan.begin(*short, ranks=3)
        joiners = [lan.join(begun, name, "join.remember=true") for name in ("pi5", "jetson")]
        assert begun.wait(300.0) == 0
        folder = run_folder(begun)
        summary = json.loads((folder / "summary.json").read_text())
        assert (summary["status"], summary["world_size"], summary["steps"]) == ("done", 3, 12)
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        hashes = [row["hashes"] for row in rows if row["event"] == "replica_hash"]
        assert hashes
        assert all(len(set(one)) == 1 and len(one) == 3 for one in hashes)
        assert (folder / "checkpoints").is_dir()
        code = begun.until_it_says(r"pairing code: (\S+)")[1]
        for file in [*folder.rglob("*.yaml"), *folder.rglob("*.json*"), *folder.rglob("*.log")]:
            assert code not in file.read_text(encoding="utf-8", errors="replace")
        for joiner in joiners:
            joiner.until_it_says("the run has ended")
            assert workers(joiner) == []

        again = lan.begin(*short, ranks=3)  # the same machine: it remembers them, and they it
        for joiner in joiners:
            joiner.until_it_says(JOINED, times=2)
        assert again.wait(300.0) == 0
        assert [joiner.interrupt() for joiner in joiners] == [EXIT_STOPPED] * 2


@pytest.mark.timeout(300)
def test_a_wrong_code_is_refused_and_three_of_them_change_it(tmp_path: Path):
    with nearby(tmp_path) as lan:
        begun = lan.begin(*LONG)
        stranger = lan.join(begun, "stranger", code="0000-0000")
        for times in (1, 2):
            stranger.until_it_says("the code is wrong", times=times)
            stranger.type("0000-0000")
        begun.until_it_says("pairing code: ", times=2)
        stranger.popen.stdin.close()
        assert stranger.wait() == EXIT_FAILED
        lan.join(begun, "pi5").until_it_says(JOINED)


@pytest.mark.timeout(300)
def test_a_joiner_that_leaves_ends_a_run_that_needs_it(tmp_path: Path):
    with nearby(tmp_path) as lan:
        begun = lan.begin(*LONG)
        joiner = lan.join(begun)
        until(lambda: steps(begun) > 2, 100.0)
        children = workers(joiner)
        assert children
        assert joiner.interrupt() == EXIT_STOPPED
        assert begun.wait() == EXIT_FAILED
        assert "its user has stopped it" in begun.out
        until(lambda: not any(child.is_running() for child in children))


@pytest.mark.timeout(300)
def test_a_killed_coordinator_frees_the_joiner_and_leaves_no_orphan(tmp_path: Path):
    with nearby(tmp_path) as lan:
        begun = lan.begin(*LONG)
        joiner = lan.join(begun)
        until(lambda: steps(begun) > 2, 100.0)
        children = workers(joiner)
        begun.popen.kill()
        until(lambda: not any(child.is_running() for child in children), 15.0)
        joiner.until_it_says("trying again", timeout_s=15.0)
        again = lan.begin(*LONG)
        code = again.until_it_says(r"pairing code: (\S+)", times=2)[1]
        joiner.type(code)
        joiner.until_it_says(JOINED, times=2)


@pytest.mark.timeout(400)
def test_a_killed_agent_leaves_no_orphan_and_the_run_starts_again_when_it_is_back(tmp_path: Path):
    with nearby(tmp_path) as lan:
        restart = ["++cluster.restart.max=2", "++cluster.restart.wait_s=120"]
        begun = lan.begin(*LONG, *restart, "checkpoint.every=5")
        joiner = lan.join(begun)
        begun.until_it_says("step ")
        until(lambda: steps(begun) > 10, 100.0)
        children = workers(joiner)
        joiner.popen.kill()
        until(lambda: not any(child.is_running() for child in children), 20.0)
        begun.until_it_says("waiting 120 s for")
        lan.join(begun)
        begun.until_it_says("restart 1 of 2")
        before = steps(begun)
        until(lambda: steps(begun) > before + 3, 100.0)


@pytest.mark.timeout(400)
def test_edp_begins_without_one_and_takes_it_in_the_middle(tmp_path: Path):
    with nearby(tmp_path) as lan:
        begun = lan.begin(*LONG, "algorithm=edp", ranks=3)
        first = lan.join(begun, "pi5")
        until(lambda: steps(begun) > 3, 150.0)
        late = lan.join(begun, "jetson")
        begun.until_it_says(r"rank 2 on \S+ is back", timeout_s=150.0)
        assert workers(late)
        late.popen.kill()
        begun.until_it_says("the run continues with 2 of 3 ranks")
        before = steps(begun)
        until(lambda: steps(begun) > before + 3, 100.0)
        assert workers(first)
