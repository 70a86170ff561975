"""A worker of a run that lives dies, freezes or fails, or its SSH connection ends."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hosts.faults import (
    FAST,
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
from tests.hosts.runs import Driver, assert_clean, finish, workers
from tests.waiting import until

pytestmark = [pytest.mark.hosts, pytest.mark.timeout(180)]

# A model of the user's own that breaks on one host only.
OWN_MODEL = """
import socket
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(28 * 28, 10)
        self.calls = 0

    def forward(self, pictures):
        self.calls += 1
        if socket.gethostname() == "lab2" and self.calls > 60:
            {breaks}
        return self.layer(pictures.flatten(1))

def build(spec):
    return Net()
"""


@pytest.fixture
def driver(lab3: Lab, tmp_path: Path) -> Iterator[Driver]:
    the_driver = Driver(lab3, tmp_path)
    yield the_driver
    for host in lab3.hosts:
        host.thaw()
        host.heal()
    the_driver.end()


@pytest.mark.parametrize("seen_within_s", [None, pytest.param(1.0, marks=pytest.mark.soak)])
def test_a_worker_that_is_killed(driver: Driver, seen_within_s: float | None) -> None:
    host = driver.lab.hosts[1]
    end = end_after(driver, lambda: host.kill(*workers(host)))
    assert_blamed(driver, end, host)
    assert "signal 9" in end.sentence
    assert seen_within_s is None or end.seen_s < seen_within_s  # goal R1
    assert_clean(driver.lab.hosts, end.out + end.err)
    assert_checkpoint_is_whole(driver)


def test_an_ssh_connection_that_ends_while_the_mesh_lives(driver: Driver) -> None:
    host = driver.lab.hosts[2]
    end = end_after(driver, host.end_sessions)
    assert_blamed(driver, end, host)
    assert "SSH connection" in end.sentence
    assert_gone(driver.lab.hosts)
    assert folders(driver.lab.hosts) == []  # the host still lets us in
    assert_checkpoint_is_whole(driver)


@pytest.mark.soak
def test_an_ssh_server_that_is_gone_while_the_mesh_lives(driver: Driver) -> None:
    host = driver.lab.hosts[2]
    end = end_after(driver, lambda: host.stop_sshd(sessions=True))
    host.start_sshd()
    assert_blamed(driver, end, host)
    assert end.seconds < 1.0 + TIDY_S
    assert_gone(driver.lab.hosts)
    (left,) = folders(driver.lab.hosts)
    assert left == host.name
    assert "it can be deleted" in end.out
    assert_checkpoint_is_whole(driver)


@pytest.mark.soak
def test_a_worker_that_stands_still(driver: Driver) -> None:
    host = driver.lab.hosts[1]
    end = end_after(driver, host.freeze)
    assert_blamed(driver, end, host)
    assert "stopped answering at step" in end.sentence and "silent for 3." in end.sentence
    assert 2.5 < end.seen_s < FAST_S  # goal R2
    assert end.seconds < FAST_S + TIDY_S
    assert_clean(driver.lab.hosts)  # it was killed without being thawed
    assert_checkpoint_is_whole(driver)


@pytest.mark.soak
def test_a_worker_that_stands_still_with_the_defaults(driver: Driver) -> None:
    host = driver.lab.hosts[0]
    end = end_after(driver, host.freeze, LONG)
    assert_blamed(driver, end, host)
    assert end.seen_s < NORMAL_S  # goal R2
    assert end.seconds < NORMAL_S + TIDY_S
    assert_clean(driver.lab.hosts)


@pytest.mark.soak
@pytest.mark.parametrize(
    ("breaks", "words"),
    [
        ('raise RuntimeError("not on Sundays")', "failed at step {}: RuntimeError: not on Sundays"),
        ("torch.empty(10**15)", "ran out of memory at step {}"),
    ],
)
def test_a_worker_whose_code_breaks(driver: Driver, breaks: str, words: str) -> None:
    (driver.folder / "my_net.py").write_text(OWN_MODEL.format(breaks=breaks))
    own = ["model.target=my_net:build", "training.micro_batch_size=1"]
    keep = [override for override in FAST if override != "model=mlp"]
    code, out, err = driver.run(*keep, *own)
    assert code == 3, out + err
    reason = driver.summary["reason"]
    assert reason.startswith("rank 1 on lab2 " + words.split("{}")[0])
    assert words.split("{}")[1] in reason
    assert (driver.summary["failed_rank"], driver.summary["failed_host"]) == (1, "lab2")
    assert_clean(driver.lab.hosts)


def linking(driver: Driver) -> subprocess.Popen[str]:
    """A run of which two hosts cannot find each other, so that its mesh is never there."""
    first, second, _ = driver.lab.hosts
    first.cut_from(second)
    run = driver.start(*LONG)
    until(lambda: all(_has_linked_up(driver, name) for name in ("rank0-lab1", "rank2-lab3")), 60)
    return run


def _has_linked_up(driver: Driver, name: str) -> bool:
    """Whether that rank has got as far as the mesh."""
    try:
        text = (driver.latest / "logs" / f"{name}.log").read_text()
    except OSError:
        return False
    return "links up" in text


@pytest.mark.soak
def test_ctrl_c_while_ranks_link_up(driver: Driver) -> None:
    run = linking(driver)
    run.send_signal(2)
    code, out, err = finish(run, 30)
    assert code == 130, out + err
    assert "stopped by the user before training began" in out
    assert_clean(driver.lab.hosts)


@pytest.mark.soak
def test_a_rank_that_dies_while_others_link_up(driver: Driver) -> None:
    run = linking(driver)
    host = driver.lab.hosts[2]
    host.kill(*workers(host))
    code, out, err = finish(run, 30)
    assert code == 3, out + err
    assert (driver.summary["failed_rank"], driver.summary["failed_host"]) == (2, "lab3")
    assert_clean(driver.lab.hosts)
