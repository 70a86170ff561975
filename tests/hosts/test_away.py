"""driver=HOST: a host of the lab drives the run, and the box only looks at it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hosts.lab import Lab
from tests.hosts.runs import SMALL, Driver, finish, workers
from tests.waiting import until

pytestmark = [pytest.mark.hosts, pytest.mark.timeout(180)]


@pytest.fixture
def driver(lab3: Lab, tmp_path: Path) -> Iterator[Driver]:
    the_driver = Driver(lab3, tmp_path)
    yield the_driver
    first = lab3.hosts[0]
    first.kill(*[one.pid for one in first.processes() if "--driver" in one.command])
    the_driver.end()


def know_the_others(lab: Lab) -> None:
    """What the user of the first host has set up there: a key, and whom to trust."""
    folder = lab.hosts[0].home / ".ssh"
    folder.mkdir(exist_ok=True)
    shutil.copyfile(lab.key, folder / "id_ed25519")
    (folder / "id_ed25519").chmod(0o600)
    shutil.copyfile(lab.known_hosts, folder / "known_hosts")
    names = "".join(
        f"Host {host.ssh}\n    HostName {host.address}\n    User root\n" for host in lab.hosts
    )
    (folder / "config").write_text(names)


def test_it_drives_the_others_while_the_box_may_leave(driver: Driver) -> None:
    know_the_others(driver.lab)
    # Saved at the stop only, as steps take milliseconds here.
    endless = ["training.steps=100000", "checkpoint.every=100000"]
    code, out, err = driver.run(*SMALL, "driver=lab1", *endless)
    assert code == 0, out + err
    run_id = out.split(" runs in the background")[0]
    status = driver.run("task=status")[1]
    assert f"{run_id}  running" in status
    (metrics,) = driver.lab.hosts[0].workdir.glob(f"driver/*/outputs/{run_id}/metrics.jsonl")
    until(lambda: metrics.read_text().count('"event": "step"') > 3, 60)
    assert all(workers(host) for host in driver.lab.hosts)
    code, out, err = driver.run("task=stop")
    assert code == 0, out + err
    assert "stopped (stopped by the user)" in out
    told = json.loads((driver.folder / "outputs" / run_id / "summary.json").read_text())
    assert (told["status"], told["world_size"]) == ("stopped", 3)
    until(lambda: not any(workers(host) for host in driver.lab.hosts), 20)


def test_a_host_that_cannot_reach_the_others_says_so(driver: Driver) -> None:
    shutil.rmtree(driver.lab.hosts[0].home / ".ssh", ignore_errors=True)
    code, out, err = finish(driver.start(*SMALL, "driver=lab1"), 90)
    assert code == 3, out + err
    assert "has to reach the other hosts over SSH by itself" in err
    assert not (driver.folder / "outputs").exists()
