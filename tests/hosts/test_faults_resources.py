"""What a host lacks: room on its disk, a free port, torch; and two runs that share hosts."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hosts.faults import LONG, assert_checkpoint_is_whole
from tests.hosts.lab import Lab
from tests.hosts.runs import SMALL, Driver, assert_clean, finish
from tests.tasks.test_stream_runs import STREAM, write_documents

pytestmark = [pytest.mark.hosts, pytest.mark.timeout(180)]


@pytest.fixture
def driver(lab3: Lab, tmp_path: Path) -> Iterator[Driver]:
    the_driver = Driver(lab3, tmp_path)
    yield the_driver
    the_driver.end()


@pytest.mark.soak
def test_a_disk_that_is_full_for_a_while(driver: Driver) -> None:
    """Training goes on without checkpoints, and has them again as soon as there is room."""
    host = driver.lab.hosts[1]
    host.small_disk(64)
    try:
        run = driver.start(*LONG)
        driver.wait_for_step(7)
        host.run("sh", "-c", f"cat /dev/zero > {host.workdir}/full; true")
        driver.wait_for_step(17)
        host.run("rm", f"{host.workdir}/full")
        driver.wait_for_step(len(driver.rows("step")) + 3)
        run.send_signal(2)
        code, out, err = finish(run)
    finally:
        host.first_disk()
    words = "could not be written: rank 1: lab2: No space left on device"
    assert words in out, out + err
    assert code == 130, out + err
    assert driver.summary["steps"] >= 20
    assert driver.summary["checkpoint"] == f"step-{driver.summary['steps']:08d}"
    assert_checkpoint_is_whole(driver)


@pytest.mark.soak
def test_ports_that_are_all_taken(driver: Driver) -> None:
    host = driver.lab.hosts[1]
    driver.lab.write_cluster(
        driver.folder / "conf", "lab", host_keys={"lab2": {"ports": "47100-47101"}}
    )

    def listen() -> list[socket.socket]:
        return [socket.create_server((host.address, port)) for port in (47100, 47101)]

    taken = host.call(listen)
    code, _, err = driver.run(*SMALL)
    for one in taken:
        one.close()
    assert code == 3, err
    assert "every port of 47100-47101 is in use on" in err
    assert "rank 1 on lab2" in err and driver.summary["failed_host"] == "lab2"
    assert_clean(driver.lab.hosts)


@pytest.mark.soak
def test_a_python_without_torch(driver: Driver) -> None:
    host = driver.lab.hosts[2]
    hides = "import sys\nsys.modules['torch'] = None\n"
    before, host.python = host.python, host.make_python(hides)
    try:
        driver.lab.write_cluster(driver.folder / "conf", "lab")
    finally:
        host.python = before
    code, out, err = driver.run(*SMALL)
    assert code == 3, out + err
    assert "lab3" in err and "torch" in err
    assert driver.summary["failed_host"] == "lab3"
    assert_clean(driver.lab.hosts)


@pytest.mark.soak
def test_two_runs_on_the_same_hosts(driver: Driver, tmp_path: Path) -> None:
    """One is told to stop, which is nothing to the other."""
    other = Driver(driver.lab, tmp_path / "other")
    try:
        long = driver.start(*LONG, "checkpoint=none")
        short = other.start(*SMALL)
        driver.wait_for_step(3)
        other.wait_for_step(3)
        long.send_signal(2)
        assert finish(long)[0] == 130
        code, out, err = finish(short)
        assert code == 0, out + err
        assert other.summary["steps"] == 20
        assert_checkpoint_is_whole(other)
        assert_clean(driver.lab.hosts)
    finally:
        other.end()


@pytest.mark.soak
def test_a_stream_is_read_for_hosts_that_cannot_see_it(driver: Driver) -> None:
    pytest.importorskip("datasets")
    write_documents(driver.folder / "docs", 80)
    code, out, err = driver.run(*STREAM, f"data.path={driver.folder / 'docs'}")
    assert code == 0, out + err
    there = [row["loss"] for row in driver.rows("step")]
    assert len(set(there)) == 24
    assert_clean(driver.lab.hosts)

    single = ["algorithm=single", "data.prefetch_steps=0"]
    docs = f"data.path={driver.folder / 'docs'}"
    code, out, err = driver.run(*STREAM, docs, *single, cluster="local")
    assert code == 0, out + err
    assert [row["loss"] for row in driver.rows("step")] == pytest.approx(there, abs=1e-12)
