"""algorithm=edp on hosts that are apart: one comes late, one dies, one falls silent; the others go
on, and all of them are back in the end."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hosts.lab import Lab
from tests.hosts.runs import SMALL, Driver, assert_clean, finish, workers
from tests.waiting import until

pytestmark = [pytest.mark.hosts, pytest.mark.timeout(180)]

LONG = [*SMALL, "algorithm=edp", "training.steps=1000000", "mesh.liveness=fast"]


@pytest.fixture
def driver(lab3: Lab, tmp_path: Path) -> Iterator[Driver]:
    the_driver = Driver(lab3, tmp_path, connect_timeout_s=3)
    yield the_driver
    for host in lab3.hosts:
        host.heal()
    the_driver.end()


@pytest.mark.soak
def test_hosts_come_late_die_fall_silent_and_return(driver: Driver) -> None:
    def pushes(rank: int) -> int:
        return sum(row["rank"] == rank for row in driver.rows("push"))

    def pushes_again(rank: int) -> None:
        so_far = pushes(rank)
        until(lambda: pushes(rank) > so_far + 2, 60)

    def losses(rank: int) -> list[str]:
        rows = driver.rows("membership")
        return [row["reason"] for row in rows if row["rank"] == rank and not row["is_here"]]

    _, second, third = driver.lab.hosts
    third.stop_sshd()
    run = driver.start(*LONG)
    driver.wait_for_step(5)
    assert pushes(2) == 0 and not workers(third)
    third.start_sshd()
    pushes_again(2)

    second.kill(*workers(second))
    until(lambda: len(losses(1)) == 1, 30)
    pushes_again(2)
    pushes_again(1)

    third.cut()  # no FIN, no RST
    until(lambda: len(losses(2)) == 1, 30)
    pushes_again(1)
    third.heal()
    pushes_again(2)

    run.send_signal(signal.SIGINT)
    code, out, err = finish(run)
    assert code == 130, out + err
    assert losses(2)[0].startswith("silent for 3.")
    told = [(row["host"], row["away_s"] is not None) for row in driver.summary["departures"]]
    assert sorted(told) == [("lab2", True), ("lab3", True), ("lab3", True)]
    tickets = [row["ticket"] for row in driver.rows("push")]
    assert len(set(tickets)) == len(tickets), "no sample counts twice"
    assert_clean(driver.lab.hosts)
