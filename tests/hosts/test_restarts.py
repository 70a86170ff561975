"""cluster.restart on hosts that are apart: a host is cut off for good, or a rank is killed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hosts.lab import Lab
from tests.hosts.runs import SMALL, Driver, assert_clean, finish, workers
from tests.waiting import until

pytestmark = [pytest.mark.hosts, pytest.mark.timeout(180)]

LONG = [*SMALL, "training.steps=60", "mesh.liveness=fast"]


@pytest.fixture
def driver(lab3: Lab, tmp_path: Path) -> Iterator[Driver]:
    restart = {"max": 2, "wait_s": 3.0, "min_hosts": 2}
    the_driver = Driver(lab3, tmp_path, connect_timeout_s=3, restart=restart)
    yield the_driver
    for host in lab3.hosts:
        host.heal()
    the_driver.end()


@pytest.mark.soak
def test_a_host_that_is_cut_off_is_left_out_and_the_run_ends_done(driver: Driver) -> None:
    """No FIN, no RST: its network is just gone."""
    run = driver.start(*LONG)
    driver.wait_for_step(20)
    driver.lab.hosts[1].cut()
    code, out, err = finish(run, 120)
    assert code == 0, out + err
    (row,) = driver.summary["restarts"]
    assert row["lost_host"] == "lab2" and row["hosts"] == ["lab1", "lab3"]
    assert row["lost_steps"] == row["step"] - row["resumed_from"] < row["step"]
    assert "probing the hosts" in out
    assert "restart 1 of 2 after step" in out and "on lab1, lab3 (without lab2)" in out
    assert driver.summary["world_size"] == 2
    assert [step["step"] for step in driver.rows("step")] == list(range(60))
    assert "name: lab2" in (driver.latest / "config.yaml").read_text()
    until(lambda: not any(workers(host) for host in driver.lab.hosts), 20)


@pytest.mark.soak
def test_a_rank_that_is_killed_goes_on_on_its_host(driver: Driver) -> None:
    run = driver.start(*LONG)
    driver.wait_for_step(20)
    lost = driver.lab.hosts[2]
    lost.kill(*workers(lost))
    code, out, err = finish(run, 120)
    assert code == 0, out + err
    (row,) = driver.summary["restarts"]
    assert (row["lost_host"], row["hosts"]) == ("lab3", ["lab1", "lab2", "lab3"])
    assert [step["step"] for step in driver.rows("step")] == list(range(60))
    assert_clean(driver.lab.hosts)


@pytest.mark.soak
def test_too_few_hosts_end_the_run_with_what_is_missing(driver: Driver) -> None:
    run = driver.start(*LONG, "cluster.restart.min_hosts=3")
    driver.wait_for_step(20)
    driver.lab.hosts[1].cut()
    code, out, err = finish(run, 120)
    assert code == 3, out + err
    assert "lab2 did not answer within 3 s; left: lab1, lab3" in err
    assert "checkpoint.resume=" in err and driver.summary["restarts"] == []
