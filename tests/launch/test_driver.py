"""Driver and real workers: every failure ends in time, names the culprit, leaves nobody behind."""

from __future__ import annotations

import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from smolrun.events import Event, Note, RankStep, StepDone
from smolrun.launch.hosts import WorkerPlan, WorkerProcess
from smolrun.launch.local import LocalHost
from smolrun.launch.supervisor_events import Exited, Input, RunOutcome
from smolrun.launch.worker_monitor import WorkerMonitor
from tests.launch.deadline import is_running, pid_of, until
from tests.launch.tiny_driver import WORKER, make_driver, plans

posix_only = pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")


def run_while(driver_run: Callable[[], RunOutcome], meanwhile: Callable[[], None]) -> RunOutcome:
    """The outcome of a driver in this thread, while another one does something to its workers."""
    errors: list[BaseException] = []

    def act() -> None:
        try:
            meanwhile()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=act)
    thread.start()
    outcome = driver_run()
    thread.join(10.0)
    assert not errors, errors
    return outcome


def has_steps(events: list[Event], rank: int, count: int = 3) -> bool:
    return sum(isinstance(event, RankStep) and event.rank == rank for event in events) >= count


def test_a_run_that_goes_well(tmp_path: Path) -> None:
    events: list[Event] = []
    outcome = make_driver(tmp_path, ranks=3, steps=4, events=events).run()
    assert (outcome.status, outcome.exit_code, outcome.steps) == ("done", 0, 4)
    assert outcome.summaries == {rank: {"rank": rank} for rank in range(3)}
    # Every rank tells its own steps; what all tell alike counts once, from rank 0.
    assert [event.step for event in events if isinstance(event, StepDone)] == [0, 1, 2, 3]
    assert sum(isinstance(event, RankStep) for event in events) == 12


def test_leases_keep_a_worker_alive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINY_LEASE_S", "0.5")
    assert make_driver(tmp_path, ranks=1, steps=100, lease_every_s=0.1).run().exit_code == 0


def test_a_worker_that_is_still_being_started_when_it_must_end(tmp_path: Path) -> None:
    class SlowHost:
        """As a host over a slow network: the order to end comes before the worker is there."""

        def start(self, plan: WorkerPlan) -> WorkerProcess:
            until(lambda: doomed)
            return LocalHost(WORKER).start(plan)

    posted: queue.SimpleQueue[Input] = queue.SimpleQueue()
    doomed: list[bool] = []
    (plan,) = plans(tmp_path, {}, ranks=1, steps=10_000)
    monitor = WorkerMonitor(plan, SlowHost(), lambda item, _: posted.put(item))
    monitor.send(plan.start)
    monitor.begin()
    monitor.kill()
    doomed.append(True)
    assert posted.get(timeout=20) == Exited(0, -9 if os.name != "nt" else 1)
    assert monitor.join(20)


def test_what_a_worker_prints_goes_to_its_log_and_its_children_read_nothing(tmp_path: Path) -> None:
    outcome = make_driver(tmp_path, {"1": "print"}).run()
    assert outcome.exit_code == 0
    log = (tmp_path / "logs" / "rank1-local.log").read_text()
    assert log.splitlines() == ["this is no JSON", "neither is this", "True"]


@posix_only
def test_kill_9_of_a_worker_is_named_with_signal_step_and_log(tmp_path: Path) -> None:
    events: list[Event] = []
    driver = make_driver(tmp_path, ranks=3, steps=10_000, events=events, grace_s=0.3)

    def kill() -> None:
        until(lambda: has_steps(events, 2))
        os.kill(pid_of(tmp_path, "pid2"), signal.SIGKILL)

    outcome = run_while(driver.run, kill)
    assert outcome.exit_code == 3
    assert (outcome.failed_rank, outcome.failed_host) == (2, "local")
    assert "rank 2 on local died from signal 9 (killed) at step " in outcome.reason
    assert outcome.reason.endswith(f"log: {tmp_path}/logs/rank2-local.log")


def seen_after_s(folder: Path) -> float:
    """Seconds from a kill -9 of the only worker to the end of the run."""
    folder.mkdir()
    driver = make_driver(folder, ranks=1, steps=10_000)
    killed_at: list[float] = []

    def kill() -> None:
        pid = pid_of(folder, "pid0")
        killed_at.append(time.monotonic())
        os.kill(pid, signal.SIGKILL)

    assert run_while(driver.run, kill).exit_code == 3
    return time.monotonic() - killed_at[0]


@posix_only
def test_kill_9_is_seen_within_a_second(tmp_path: Path) -> None:
    """One of some runs, as the machine may have other work in that second."""
    assert any(seen_after_s(tmp_path / str(number)) < 1.0 for number in range(4))


@posix_only
def test_a_frozen_worker_is_named_by_the_others_and_killed(tmp_path: Path) -> None:
    driver = make_driver(
        tmp_path, {"0": "lose_1", "2": "lose_1"}, ranks=3, steps=10_000, grace_s=0.3
    )

    def freeze() -> None:
        os.kill(pid_of(tmp_path, "pid1"), signal.SIGSTOP)

    outcome = run_while(driver.run, freeze)
    assert (outcome.exit_code, outcome.failed_rank) == (3, 1)
    assert "rank 1 on local stopped answering" in outcome.reason


@posix_only
def test_a_worker_frozen_during_the_start_blocks_nobody(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)"]
    outcome = make_driver(tmp_path, command=command, lease_every_s=0.001, start_s=0.5).run()
    assert "rank 0 on local, rank 1 on local not ready within 0.5 s" in outcome.reason


def test_a_worker_that_never_becomes_ready_is_named(tmp_path: Path) -> None:
    outcome = make_driver(tmp_path, {"1": "never_ready"}, start_s=1.5).run()
    assert outcome.exit_code == 3
    assert "rank 1 on local not ready within 1.5 s" in outcome.reason


def test_a_worker_that_dies_early_is_told_with_the_end_of_its_log(tmp_path: Path) -> None:
    outcome = make_driver(tmp_path, {"1": "exit_early"}).run()
    assert "rank 1 on local died with exit code 7 while it started" in outcome.reason
    assert outcome.log_tail == ["no such thing as a GPU"]


def test_a_worker_that_cannot_be_started_is_told(tmp_path: Path) -> None:
    outcome = make_driver(tmp_path, command=[str(tmp_path / "no-python")]).run()
    assert outcome.exit_code == 3
    assert "could not be started" in outcome.reason
    assert "no-python" in outcome.reason


@pytest.mark.parametrize(
    ("behave", "words"),
    [
        ("garbage", "broke the control protocol: it sent a line that is no message"),
        ("endless_line", "broke the control protocol: it sent a line of more than 16777216 bytes"),
        ("raise", "failed before its first step: ValueError: shapes do not fit"),
    ],
)
def test_a_worker_that_misbehaves_ends_the_run(tmp_path: Path, behave: str, words: str) -> None:
    outcome = make_driver(tmp_path, {"1": behave}, steps=10_000, grace_s=0.2).run()
    assert (outcome.exit_code, outcome.failed_rank) == (3, 1)
    assert words in outcome.reason


def test_noise_before_the_channel_is_there_is_told_with_its_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TINY_NOISE", "1")
    assert "'Welcome to this host!'" in make_driver(tmp_path).run().reason


def test_a_worker_that_hangs_after_its_result_does_not_spoil_the_run(tmp_path: Path) -> None:
    outcome = make_driver(tmp_path, {"1": "hang_after_result"}, exit_s=0.3).run()
    assert outcome.exit_code == 0


@posix_only
def test_children_of_a_worker_end_with_it(tmp_path: Path) -> None:
    outcome = make_driver(tmp_path, {"0": "child"}, ranks=1).run()
    assert outcome.exit_code == 0
    until(lambda: not is_running(pid_of(tmp_path, "child")), within_s=2.0)


def test_an_error_of_the_driver_itself_leaves_nobody_behind(tmp_path: Path) -> None:
    class Breaks(list[Event]):
        def append(self, event: Event) -> None:
            raise RuntimeError("a defect")

    with pytest.raises(RuntimeError, match="a defect"):
        make_driver(tmp_path, steps=10_000, events=Breaks()).run()
    assert not any(is_running(pid_of(tmp_path, f"pid{rank}")) for rank in range(2))


def test_a_full_disk_or_a_missing_folder_costs_the_log_and_not_the_run(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("a file where a folder should be")
    events: list[Event] = []
    outcome = make_driver(tmp_path, {"1": "print"}, events=events).run()
    assert outcome.exit_code == 0
    assert any(isinstance(event, Note) and "no log of rank 1" in event.message for event in events)


def test_without_sessions_and_fork_as_on_windows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("setsid", "fork", "killpg", "sched_getaffinity"):
        monkeypatch.delattr(os, name, raising=False)
    assert make_driver(tmp_path).run().exit_code == 0
    outcome = make_driver(tmp_path, {"1": "garbage"}, steps=10_000, grace_s=0.2).run()
    assert (outcome.exit_code, outcome.failed_rank) == (3, 1)


@pytest.mark.parametrize(("asked", "code"), [(1, 130), (2, 131)])
def test_another_process_can_ask_it_to_stop(tmp_path: Path, asked: int, code: int) -> None:
    events: list[Event] = []
    outcome = make_driver(
        tmp_path,
        steps=1_000_000,
        events=events,
        stop_requests=lambda: asked if has_steps(events, 0) else 0,
    ).run()
    assert (outcome.status, outcome.exit_code) == ("stopped", code)
