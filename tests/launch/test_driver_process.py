"""What becomes of the workers when the driver gets signals, is killed, or freezes."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import psutil
import pytest

from smolrun.launch.driver import InterruptCounter
from tests.launch.deadline import is_running, pid_of, until
from tests.launch.driver_process import DriverProcess
from tests.launch.tiny_driver import SECRET

posix_only = pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
StartDriver = Callable[..., DriverProcess]


@posix_only
def test_kill_9_of_the_driver_ends_all_workers_within_five_seconds(
    start_driver: StartDriver,
) -> None:
    driver = start_driver(ranks=3, steps=10_000, behave={"0": "child", "2": "ignore_stop"})
    pids = [*driver.worker_pids(3), pid_of(driver.folder, "child")]
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
    driver.wait_until_it_heard()
    driver.process.send_signal(signal.SIGINT)
    sent_at = time.monotonic()
    until(lambda: not is_running(pids[0]))  # it obeyed, so the first Ctrl-C has been dealt with
    assert is_running(pids[1])
    until(lambda: time.monotonic() > sent_at + 0.1)  # anything sooner counts as the same Ctrl-C
    driver.process.send_signal(signal.SIGINT)
    code, outcome = driver.outcome()
    assert (code, outcome["status"]) == (131, "stopped")


@posix_only
def test_a_worker_that_ignores_stop_is_killed_at_the_deadline(start_driver: StartDriver) -> None:
    driver = start_driver(ranks=2, steps=10_000, behave={"1": "ignore_stop"}, stop_s=0.5)
    driver.worker_pids(2, "running")
    driver.wait_until_it_heard()
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
    for at in (100.0, 100.02, 100.04, 101.0):
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
