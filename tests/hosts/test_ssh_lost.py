"""SSH connections that are lost while workers run, and workers that have to be ended from afar."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest

from smolrun.errors import HostError
from smolrun.launch.ssh.connect import open_again, open_machine
from tests import waiting
from tests.hosts.conftest import Maker
from tests.hosts.host import Host
from tests.hosts.lab import Lab
from tests.hosts.machines import opened, spec


@pytest.fixture
def lab1(lab3: Lab, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lab]:
    """The lab, whole again after each test."""
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    yield lab3
    for host in lab3.hosts:
        host.heal()
    lab3.write_user_files()


def lost(the_lab: Lab, host: Host, harm: Callable[[], object]) -> tuple[bool, float]:
    """Whether a harmed connection is lost by its silence, and after how many seconds."""
    machine = opened(the_lab, host)
    code = "print('up', flush=True); import sys; sys.stdin.read()"
    worker = machine.start_worker([machine.python, "-c", code], {})
    assert worker.read_control() == b"up\n"
    harm()
    began = time.monotonic()
    assert worker.read_control() == b""
    worker.wait()
    seconds = time.monotonic() - began
    assert worker.lost() is not None
    is_silent = machine.connection.is_silent
    began = time.monotonic()
    worker.kill()
    machine.close()
    assert time.monotonic() - began < waiting.SOON_S
    return is_silent, seconds


def test_the_other_side_ends_the_connection(lab1: Lab):
    host = lab1.hosts[0]
    is_silent, _ = lost(lab1, host, host.end_sessions)
    assert not is_silent


@pytest.mark.soak
@pytest.mark.parametrize("way", ["cut", "cut_in", "cut_out", "freeze"])
def test_a_connection_that_dies_without_a_word(lab1: Lab, way: str):
    host = lab1.hosts[0]
    harm = {"freeze": lambda: host.freeze(sshd=True)}.get(way) or getattr(host, way)
    try:
        is_silent, seconds = lost(lab1, host, harm)
    finally:
        host.thaw()
    assert is_silent
    assert 13 < seconds < 13 + waiting.SOON_S


@pytest.mark.soak
def test_a_slow_link_is_not_taken_for_a_dead_one(make_lab: Maker):
    """At 1 Mbit/s the buffers hold more than 15 s of bytes."""
    the_lab = make_lab(hosts=1, rate="1mbit")
    host = the_lab.hosts[0]
    machine = open_machine(spec(the_lab, host, timeout_s=15))
    machine.put(b"x" * 2_500_000, f"{machine.workdir}/file")
    assert machine.connection.lost is None
    machine.close()


def test_a_frozen_worker_is_killed_with_all_it_started(lab1: Lab):
    host = lab1.hosts[0]
    machine = opened(lab1, host)
    code = (
        "import os, subprocess, sys\n"
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(99)'])\n"
        "os.write(1, b'up\\n')\nos.kill(os.getpid(), 19)\n"
    )
    worker = machine.start_worker([machine.python, "-c", code], {})
    assert worker.read_control() == b"up\n"
    began = time.monotonic()
    worker.kill()
    assert worker.wait() == -9
    assert time.monotonic() - began < waiting.SOON_S
    # An earlier test's worker may still be on its way out; these two are known by their code.
    waiting.until(lambda: not [one for one in host.processes() if "time.sleep(99)" in str(one)])
    machine.close()


def test_several_ranks_share_one_connection(lab1: Lab):
    host = lab1.hosts[0]
    machine = opened(lab1, host)
    code = "import sys; print(sys.stdin.readline(), end='', flush=True); sys.stdin.read()"
    workers = [machine.start_worker([machine.python, "-c", code], {}) for _ in range(4)]
    for rank, worker in enumerate(workers):
        worker.write(f"rank {rank}\n".encode())
    assert [worker.read_control() for worker in workers] == [b"rank %d\n" % n for n in range(4)]
    for worker in workers:
        worker.close_input()
        assert worker.wait() == 0
    machine.close()


def test_a_host_that_fell_silent_is_reached_again_if_it_is_there(lab1: Lab):
    host = lab1.hosts[0]
    machine = opened(lab1, host)
    machine.connection.give_up()
    assert machine.connection.is_silent
    again = open_again(machine)
    assert again.run([again.python, "-c", "print(1)"]).out == b"1\n"
    again.close()
    host.cut()
    with pytest.raises(HostError, match="port 22 does not answer"):
        open_again(machine)
    machine.close()
