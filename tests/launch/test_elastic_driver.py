"""The driver of an elastic run and real workers: the lost ones come back, and nobody is left."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import psutil
import pytest

from smolrun.events import Event, Note
from smolrun.launch.control import Links, Security, StartMessage
from smolrun.launch.driver import Driver
from smolrun.launch.elastic_worker import Elasticity
from smolrun.launch.hosts import WorkerPlan
from smolrun.launch.local import LocalHost
from smolrun.launch.supervisor import Limits
from smolrun.mesh.certificates import issue_credentials
from tests.launch.deadline import is_running, pid_of
from tests.launch.test_driver import has_steps, run_while
from tests.launch.tiny_driver import SECRET, Listener, make_driver
from tests.waiting import until

posix_only = pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
SOON = Elasticity(min_ranks=2, first_pause_s=0.05, longest_pause_s=0.1, farewell_s=2.0)


def program(module: str) -> str:
    """The folder of the tests is no package that is installed."""
    return f"""
import runpy, sys
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
runpy.run_module({module!r}, run_name="__main__")
"""


def notes(events: list[Event]) -> list[str]:
    return [event.message for event in events if isinstance(event, Note)]


def real_workers(
    folder: Path, ranks: int, pids: int, links: Links = "star", security: Security = "tls"
) -> list[WorkerPlan]:
    config = {
        "task": "stand_in",
        "pids": pids,
        "cluster": {"start_timeout_s": 30.0},
        "mesh": {"kind": "tcp", "timeout_s": 20.0, "liveness": "fast", "heartbeat_ms": 50},
    }
    return [
        WorkerPlan(
            StartMessage(
                rank=rank,
                world_size=ranks,
                host="local",
                run_id="run",
                config=config,
                config_hash="0",
                secret=SECRET,
                addresses=["127.0.0.1"],
                device="cpu",
                threads=1,
                security=security,
                credentials=keys if security == "tls" else None,
                links=links,
            ),
            folder / f"rank{rank}.log",
        )
        for rank, keys in enumerate(issue_credentials("run", ranks))
    ]


@posix_only
@pytest.mark.timeout(120)
def test_a_killed_worker_is_started_again_and_joins_the_others_over_tls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A test beside this one may let Linux end processes of this machine for their memory.
    monkeypatch.setattr("smolrun.launch.local.ended_by_linux", lambda *_: None)
    events: list[Event] = []
    host = LocalHost([sys.executable, "-c", program("tests.launch.elastic_rank")])
    driver = Driver(
        real_workers(tmp_path, ranks=3, pids=3),
        lambda plan: (plan, host),
        [Listener(events)],
        limits=Limits(start_s=60.0),
        elastic=SOON,
    )
    killed: list[int] = []

    def kill() -> None:
        until(lambda: has_steps(events, 1) and has_steps(events, 2, 25), 60.0)
        process = driver._monitors[2]._process
        assert process is not None
        killed.append(process.pid)  # type: ignore[attr-defined]
        assert psutil.Process(killed[0]).net_connections("tcp")
        os.kill(killed[0], signal.SIGKILL)

    outcome = run_while(driver.run, kill)
    assert (outcome.status, outcome.reason) == ("done", ""), outcome
    seen = {(rank, pid): count for rank, pid, count in outcome.summaries[0]["pushes"]}
    assert (2, killed[0]) in seen
    assert (2, outcome.summaries[2]["pid"]) in seen
    assert sorted(rank for rank, _ in seen) == [1, 2, 2]
    (row,) = outcome.departures
    assert row["rank"] == 2 and row["away_s"] > 0
    told = [line for line in notes(events) if "rank 2" in line]
    assert "died from signal 9" in told[0] and "continues with 2 of 3 ranks" in told[0]
    assert told[1].startswith("rank 2 on local is back after ")
    assert len(told) == 2
    assert not is_running(killed[0]) and not is_running(outcome.summaries[2]["pid"])


class Generations(Listener):
    """The ranks of every generation, and events as a Listener."""

    def __init__(self, events: list[Event]) -> None:
        super().__init__(events)
        self.ranks: list[list[int]] = []
        self.restarted: list[int] = []

    def on_regrouped(self, ranks: list[int], generation: int) -> None:
        assert generation >= len(self.ranks)
        self.ranks.append(ranks)

    def on_restart(self, rank: int) -> None:
        self.restarted.append(rank)


@posix_only
@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    "security", ["tls", pytest.param("loopback_plain", marks=pytest.mark.soak)]
)
def test_survivors_keep_their_process_and_add_up_with_those_that_are_there(
    security: Security, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("smolrun.launch.local.ended_by_linux", lambda *_: None)
    events: list[Event] = []
    host = LocalHost([sys.executable, "-c", program("tests.launch.group_rank")])
    generations = Generations(events)
    driver = Driver(
        real_workers(tmp_path, ranks=3, pids=3, links="group", security=security),
        lambda plan: (plan, host),
        [generations],
        limits=Limits(start_s=60.0),
        elastic=Elasticity(links="group", first_pause_s=1.0, farewell_s=5.0),
    )
    pids: list[int] = []

    def kill() -> None:
        until(lambda: all(has_steps(events, rank, 5) for rank in range(3)), 60.0)
        pids.extend(monitor._process.pid for monitor in driver._monitors)  # type: ignore[union-attr]
        assert psutil.Process(pids[1]).net_connections("tcp")
        os.kill(pids[1], signal.SIGKILL)

    outcome = run_while(driver.run, kill)
    assert (outcome.status, outcome.reason) == ("done", ""), outcome
    # Of every generation: its ranks, and the sum that an all_reduce over them gave, each time.
    assert generations.ranks == [[0, 1, 2], [0, 2], [0, 1, 2]]
    assert generations.restarted == [1]
    for rank in (0, 2):
        assert outcome.summaries[rank]["sums"] == [[0, 7], [1, 5], [2, 7]]
        assert outcome.summaries[rank]["pid"] == pids[rank]
    assert outcome.summaries[1]["sums"] == [[2, 7]]
    assert outcome.summaries[1]["pid"] != pids[1]
    assert not any(map(is_running, pids))


@posix_only
def test_a_worker_that_always_ends_at_once_is_given_up_and_the_run_goes_on(tmp_path: Path) -> None:
    events: list[Event] = []
    given_up = "5 times in a row, so it is not started again"

    def is_given_up() -> int:  # then the run may end: a busy machine starts workers slowly
        return sum(given_up in line for line in notes(events))

    outcome = make_driver(
        tmp_path, {"2": "exit_early"}, ranks=3, steps=1_000_000, events=events, elastic=SOON,
        stop_requests=is_given_up,
    ).run()  # fmt: skip
    assert outcome.status == "stopped"
    (row,) = outcome.departures
    assert row["given_up"] is True
    assert sum("rank 2 on local died with exit code 7" in line for line in notes(events)) == 2
    assert is_given_up() == 1
    assert driver_log(tmp_path, 2).count("no such thing as a GPU") == 5


@posix_only
def test_the_run_ends_where_too_few_are_left(tmp_path: Path) -> None:
    outcome = make_driver(
        tmp_path, {"1": "exit_early"}, ranks=2, steps=1_000_000, elastic=SOON
    ).run()
    assert (outcome.exit_code, outcome.failed_rank) == (3, 1)
    assert "1 of the 2 ranks that it needs are left (algorithm.min_ranks=2)" in outcome.reason
    assert not is_running(pid_of(tmp_path, "pid0"))


@posix_only
def test_the_death_of_rank_0_leaves_nobody(tmp_path: Path) -> None:
    events: list[Event] = []
    driver = make_driver(tmp_path, ranks=3, steps=1_000_000, events=events, elastic=SOON)

    def kill() -> None:
        until(lambda: all(has_steps(events, rank) for rank in range(3)))
        os.kill(pid_of(tmp_path, "pid0"), signal.SIGKILL)

    outcome = run_while(driver.run, kill)
    assert (outcome.exit_code, outcome.failed_rank, outcome.is_lost) == (3, 0, True)
    assert not any(is_running(pid_of(tmp_path, f"pid{rank}")) for rank in range(3))


@posix_only
def test_stop_ends_a_run_with_a_frozen_worker(tmp_path: Path) -> None:
    events: list[Event] = []
    asked: list[bool] = []
    driver = make_driver(
        tmp_path,
        ranks=3,
        steps=1_000_000,
        events=events,
        elastic=SOON,
        stop_requests=lambda: len(asked),
    )

    def freeze() -> None:
        until(lambda: all(has_steps(events, rank) for rank in range(3)))
        os.kill(pid_of(tmp_path, "pid2"), signal.SIGSTOP)
        asked.append(True)

    outcome = run_while(driver.run, freeze)
    assert (outcome.status, outcome.exit_code) == ("stopped", 130)
    assert not any(is_running(pid_of(tmp_path, f"pid{rank}")) for rank in range(3))


def driver_log(folder: Path, rank: int) -> str:
    return (folder / "logs" / f"rank{rank}-local.log").read_text()
