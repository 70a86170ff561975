"""Driver and real workers: every failure ends in time, names the culprit, leaves nobody behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from smolrun.events import Event, Note, RankStep, StepDone
from smolrun.launch.driver import InterruptCounter
from smolrun.launch.moves import Outcome
from tests.launch.deadline import is_running, until
from tests.launch.tiny_driver import SECRET, make_driver

posix_only = pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
TINY_DRIVER = Path(__file__).with_name("tiny_driver.py")


def pid_of(folder: Path, name: str) -> int:
    """The pid that a tiny worker left; waits for it."""
    until((folder / name).exists)
    return int((folder / name).read_text())


@pytest.fixture(autouse=True)
def nobody_is_left(tmp_path: Path) -> Iterator[None]:
    """No test of this file may leave a worker, or a worker's child, running."""
    yield
    pids = [int(path.read_text()) for path in tmp_path.iterdir() if path.name[:3] in ("pid", "chi")]
    until(lambda: not any(map(is_running, pids)), within_s=2.0)


def run_while(driver_run: Callable[[], Outcome], meanwhile: Callable[[], None]) -> Outcome:
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


@posix_only
def test_kill_9_is_seen_within_a_second(tmp_path: Path) -> None:
    driver = make_driver(tmp_path, ranks=1, steps=10_000)
    killed_at: list[float] = []

    def kill() -> None:
        pid = pid_of(tmp_path, "pid0")
        killed_at.append(time.monotonic())
        os.kill(pid, signal.SIGKILL)

    assert run_while(driver.run, kill).exit_code == 3
    assert time.monotonic() - killed_at[0] < 1.0


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
    driver = make_driver(tmp_path, {"1": "exit_early"})
    outcome = driver.run()
    assert "rank 1 on local died with exit code 7 while it started" in outcome.reason
    assert driver.log_tail(1) == ["no such thing as a GPU"]


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


class DriverProcess:
    """A driver in a process of its own, which a test may mistreat."""

    def __init__(
        self, folder: Path, environment: dict[str, str] | None = None, **options: Any
    ) -> None:
        self.folder = folder
        argument = json.dumps({"folder": str(folder), **options})
        self.process = subprocess.Popen(
            [sys.executable, str(TINY_DRIVER), argument],
            stdout=subprocess.PIPE,
            env={**os.environ, **(environment or {})},
            text=True,
        )

    def worker_pids(self, ranks: int, state: str = "pid") -> list[int]:
        return [pid_of(self.folder, f"{state}{rank}") for rank in range(ranks)]

    def outcome(self) -> tuple[int, dict[str, Any]]:
        output, _ = self.process.communicate(timeout=20)
        return self.process.returncode, json.loads(output)


@pytest.fixture
def start_driver(tmp_path: Path) -> Iterator[Callable[..., DriverProcess]]:
    started: list[DriverProcess] = []

    def start(**options: Any) -> DriverProcess:
        started.append(DriverProcess(tmp_path, **options))
        return started[-1]

    yield start
    for driver in started:
        driver.process.kill()
        driver.process.communicate(timeout=10)


StartDriver = Callable[..., DriverProcess]


@posix_only
def test_kill_9_of_the_driver_ends_all_workers_within_five_seconds(
    start_driver: StartDriver,
) -> None:
    driver = start_driver(ranks=3, steps=10_000, behave={"2": "ignore_stop"})
    pids = driver.worker_pids(3)
    driver.process.kill()
    until(lambda: not any(map(is_running, pids)), within_s=5.0)


@posix_only
def test_workers_of_a_frozen_driver_end_when_the_lease_is_over(start_driver: StartDriver) -> None:
    # The second one fills its log pipe, which a frozen driver does not empty: no last word may hold
    # it up.
    driver = start_driver(
        ranks=2, steps=10_000, behave={"1": "chatty"}, environment={"TINY_LEASE_S": "1.0"}
    )
    pids = driver.worker_pids(2, "running")
    driver.process.send_signal(signal.SIGSTOP)
    until(lambda: not any(map(is_running, pids)), within_s=5.0)
    driver.process.send_signal(signal.SIGCONT)
    code, outcome = driver.outcome()
    assert code == 3
    assert "no longer heard the driver" in outcome["reason"]


@posix_only
def test_a_worker_that_was_frozen_itself_does_not_blame_the_driver(
    start_driver: StartDriver,
) -> None:
    driver = start_driver(ranks=1, steps=10_000, environment={"TINY_LEASE_S": "1.0"})
    (pid,) = driver.worker_pids(1, "running")
    os.kill(pid, signal.SIGSTOP)
    frozen_at = time.monotonic()
    until(lambda: time.monotonic() > frozen_at + 1.5)
    os.kill(pid, signal.SIGCONT)
    driver.process.send_signal(signal.SIGINT)
    assert driver.outcome()[0] == 130


@posix_only
def test_ctrl_c_during_the_start_ends_at_once(start_driver: StartDriver) -> None:
    driver = start_driver(ranks=2, behave={"1": "never_ready"})
    driver.worker_pids(2)
    driver.process.send_signal(signal.SIGINT)
    code, outcome = driver.outcome()
    assert code == 130
    assert "before training began" in outcome["reason"]


@posix_only
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_ctrl_c_stops_all_ranks_in_order(start_driver: StartDriver, number: int) -> None:
    driver = start_driver(ranks=2, steps=10_000)
    driver.worker_pids(2, "running")
    driver.process.send_signal(number)
    code, outcome = driver.outcome()
    assert (code, outcome["status"]) == (130, "stopped")


@posix_only
def test_the_second_ctrl_c_ends_all_now(start_driver: StartDriver) -> None:
    driver = start_driver(ranks=2, steps=10_000, behave={"1": "ignore_stop"})
    pids = driver.worker_pids(2, "running")
    driver.process.send_signal(signal.SIGINT)
    sent_at = time.monotonic()
    until(lambda: not is_running(pids[0]))  # it obeyed, so the first Ctrl-C has been dealt with
    assert is_running(pids[1])
    until(lambda: time.monotonic() > sent_at + 0.3)  # anything sooner counts as the same Ctrl-C
    driver.process.send_signal(signal.SIGINT)
    code, outcome = driver.outcome()
    assert (code, outcome["status"]) == (131, "stopped")


@posix_only
def test_a_worker_that_ignores_stop_is_killed_at_the_deadline(start_driver: StartDriver) -> None:
    driver = start_driver(ranks=2, steps=10_000, behave={"1": "ignore_stop"}, stop_s=0.5)
    driver.worker_pids(2, "running")
    driver.process.send_signal(signal.SIGINT)
    code, outcome = driver.outcome()
    assert code == 131
    assert "rank 1 on local did not stop within 0.5 s" in outcome["reason"]


@posix_only
def test_the_terminals_ctrl_c_does_not_reach_workers(start_driver: StartDriver) -> None:
    driver = start_driver(ranks=1, steps=10_000)
    (pid,) = driver.worker_pids(1)
    assert os.getsid(pid) == os.getpgid(pid) == pid
    driver.process.send_signal(signal.SIGTERM)
    assert driver.outcome()[0] == 130


@posix_only
def test_the_secret_is_in_no_command_line_and_no_environment(
    start_driver: StartDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "SSH_AUTH_SOCK"):
        monkeypatch.setenv(name, "hidden-canary")
    driver = start_driver(ranks=2, steps=10_000)
    for pid in driver.worker_pids(2):
        worker = psutil.Process(pid)
        seen = " ".join([*worker.cmdline(), *worker.environ().keys(), *worker.environ().values()])
        assert SECRET not in seen
        assert "hidden-canary" not in seen
        assert worker.environ()["OMP_NUM_THREADS"] == "1"
    driver.process.send_signal(signal.SIGTERM)
    driver.outcome()
    files = [path for path in driver.folder.rglob("*") if path.is_file()]
    assert files
    assert not any(SECRET.encode() in path.read_bytes() for path in files)


def test_one_ctrl_c_that_arrives_twice_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    interrupts = InterruptCounter()
    for at in (100.0, 100.05, 100.15, 101.0):
        now[0] = at
        interrupts()
    assert interrupts.count == 2
    for held_down in range(60):
        now[0] = 102.0 + held_down / 30
        interrupts()
    assert interrupts.count >= 8


@posix_only
def test_what_was_ignored_before_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with InterruptCounter().installed():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGHUP, before)
