"""Cables that are cut, or bad, and a host that sleeps, while a run lives: nobody is told of it."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hosts.faults import (
    FAST_S,
    LONG,
    NORMAL_S,
    TIDY_S,
    assert_blamed,
    assert_checkpoint_is_whole,
    assert_gone,
    end_after,
    folders,
)
from tests.hosts.lab import Lab
from tests.hosts.runs import SMALL, Driver, assert_clean, finish, workers
from tests.waiting import until

pytestmark = [pytest.mark.hosts, pytest.mark.timeout(240)]

LEASE_S = 15.0  # so long a worker lives without a word of its driver


@pytest.fixture
def driver(lab3: Lab, tmp_path: Path) -> Iterator[Driver]:
    the_driver = Driver(lab3, tmp_path)
    yield the_driver
    for host in lab3.hosts:
        host.thaw()
        host.heal()
    the_driver.end()


@pytest.mark.parametrize(
    "how",
    [
        "cut",
        pytest.param("cut_in", marks=pytest.mark.soak),
        pytest.param("cut_out", marks=pytest.mark.soak),
    ],
)
def test_a_host_that_is_cut_off(driver: Driver, how: str) -> None:
    """Whoever is left is ended, and told what cannot be; that ends itself while it is cut off."""
    host = driver.lab.hosts[1]
    end = end_after(driver, getattr(host, how))
    assert_blamed(driver, end, host)
    assert "silent for" in end.sentence
    assert end.seen_s > 2.5  # the goal R2 of at most 4 s is for a quiet machine, in the tests below
    assert_gone(driver.lab.hosts)
    assert folders(driver.lab.hosts) == ["lab2"]
    assert "could not be removed: lab2: " in end.out
    assert_checkpoint_is_whole(driver)


@pytest.mark.soak
def test_a_host_that_is_cut_off_with_the_defaults(driver: Driver) -> None:
    host = driver.lab.hosts[2]
    end = end_after(driver, host.cut, LONG)
    assert_blamed(driver, end, host)
    assert end.seen_s < NORMAL_S  # goal R2
    assert end.seconds < NORMAL_S + TIDY_S
    assert_gone(driver.lab.hosts)


@pytest.mark.soak
def test_two_hosts_that_lose_each_other(driver: Driver) -> None:
    """The driver, and the third host, still reach both."""
    _, second, third = driver.lab.hosts
    end = end_after(driver, lambda: second.cut_from(third))
    assert end.code == 3, end.out + end.err
    for name in ("rank 1 on lab2", "rank 2 on lab3", "lost each other", "silent for 3."):
        assert name in end.sentence
    assert driver.summary["failed_host"] in ("lab2", "lab3")
    assert 2.5 < end.seen_s < FAST_S  # goal R2
    assert end.seconds < FAST_S + TIDY_S
    assert_clean(driver.lab.hosts)
    assert_checkpoint_is_whole(driver)


@pytest.mark.soak
def test_bad_cables_only_make_it_slow(driver: Driver) -> None:
    """5 % loss on one, 1 Mbit/s on another: no false alarm, and the same bytes everywhere."""
    slow = ["training.steps=12", "model.widths=[32]", "training.check_replicas=true"]
    run = driver.start(*SMALL, *slow, "mesh.liveness=fast", "checkpoint.every=4")
    driver.wait_for_step(2)
    driver.lab.hosts[0].lose(5)
    driver.lab.hosts[1].rate("1mbit")
    code, out, err = finish(run, 150)
    assert code == 0, out + err
    hashes = [row["hashes"] for row in driver.rows("replica_hash")]
    assert len(hashes) == 12 and all(len(set(found)) == 1 for found in hashes)
    assert_checkpoint_is_whole(driver)
    assert driver.summary["checkpoint"] == "step-00000012"
    manifest = driver.latest / "checkpoints" / "step-00000012" / "manifest.json"
    assert json.loads(manifest.read_text())["world_size"] == 3
    assert_clean(driver.lab.hosts)


@pytest.mark.soak
def test_a_host_that_sleeps_for_30_seconds(driver: Driver) -> None:
    """The run ends meanwhile; what wakes up finds that, and ends too."""
    host = driver.lab.hosts[1]

    def fall_asleep() -> None:
        host.cut()
        host.freeze(sshd=True)

    end = end_after(driver, fall_asleep, LONG)
    assert_blamed(driver, end, host)
    assert end.seconds < NORMAL_S + TIDY_S
    asleep = threading.Event()
    assert not asleep.wait(30.0 - end.seconds)
    assert len(workers(host)) == 1
    host.heal()
    host.thaw()
    assert_gone([host])


@pytest.mark.soak
def test_a_driver_that_is_cut_off_from_all(driver: Driver) -> None:
    """Its ranks reach each other, but nobody wants their work any more."""
    the_lab = driver.lab

    def cut_driver_off() -> None:
        for host in the_lab.hosts:
            host.cut_from(the_lab)

    end = end_after(driver, cut_driver_off, LONG)
    assert end.code == 3, end.out + end.err
    assert "no answer" in end.sentence
    assert end.seconds < LEASE_S + TIDY_S
    assert_gone(the_lab.hosts)
    for host in the_lab.hosts:
        host.heal()
    until(lambda: not any(workers(host) for host in the_lab.hosts))
