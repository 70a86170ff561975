"""SSH to hosts that are apart: every way in which one can fail, its sentence and its seconds."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from smolrun.errors import HostError, HostErrors
from smolrun.launch.remote.machine import HostSpec
from smolrun.launch.ssh.connect import connect, open_machines
from tests import waiting
from tests.hosts.conftest import Maker
from tests.hosts.host import Host, make_key
from tests.hosts.lab import Lab
from tests.hosts.machines import TIMEOUT_S, opened, refused, spec


@pytest.fixture
def lab1(lab3: Lab, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lab]:
    """The lab, whole again after each test."""
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    yield lab3
    for host in lab3.hosts:
        host.heal()
    lab3.write_user_files()


def test_a_host_that_is_well(lab1: Lab):
    host = lab1.hosts[0]
    machine = opened(lab1, host)
    assert (machine.os, machine.address) == ("linux", host.address)
    assert machine.workdir == str(host.workdir)
    machine.put(b"x" * 1_000_000, f"{machine.workdir}/file")
    assert machine.run(["wc", "-c", f"{machine.workdir}/file"]).out.split()[0] == b"1000000"
    machine.close()


def test_a_host_that_is_cut_off(lab1: Lab):
    lab1.hosts[0].cut()
    sentence, seconds = refused(lab1, lab1.hosts[0])
    assert f"{lab1.hosts[0].address} port 22 does not answer" in sentence
    assert TIMEOUT_S - 0.5 < seconds < waiting.SOON_S


@pytest.mark.soak
def test_an_address_where_nobody_is(lab1: Lab):
    nobody = lab1.hosts[0].address.rsplit(".", 1)[0] + ".77"
    sentence, seconds = refused(lab1, lab1.hosts[0], ssh=f"root@{nobody}")
    assert f"{nobody} port 22" in sentence
    assert seconds < waiting.SOON_S


def test_a_wrong_port(lab1: Lab):
    host = lab1.hosts[0]
    sentence, seconds = refused(lab1, host, ssh=f"{host.ssh}:2222")
    assert f"{host.address} port 2222 refuses" in sentence
    assert seconds < waiting.SOON_S


@pytest.mark.soak
def test_an_address_of_ipv6(lab1: Lab):
    host = lab1.hosts[0]
    text = lab1.ssh_config.read_text().replace(f"HostName {host.address}\n",
                                               f"HostName {host.address6}\n")  # fmt: skip
    lab1.ssh_config.write_text(text)
    machine = opened(lab1, host)
    assert machine.address == host.address6
    machine.close()


def test_keys_known_and_not(make_lab: Maker):
    the_lab = make_lab(hosts=1)
    host = the_lab.hosts[0]
    the_lab.forget(host)
    sentence, seconds = refused(the_lab, host)
    assert host.fingerprint() in sentence
    assert seconds < waiting.SOON_S
    the_lab.write_user_files()
    before = host.fingerprint()
    host.new_host_key()
    sentence, seconds = refused(the_lab, host)
    assert before in sentence
    assert host.fingerprint() in sentence
    assert seconds < waiting.SOON_S


def test_a_refused_key(lab1: Lab, tmp_path: Path):
    host = lab1.hosts[0]
    make_key(tmp_path / "other")
    lab1.authorize(host, tmp_path / "other")
    try:
        sentence, seconds = refused(lab1, host)
    finally:
        lab1.authorize(host, lab1.key)
    assert str(lab1.key) in sentence and "task=setup" in sentence
    assert seconds < waiting.SOON_S


@pytest.mark.soak
def test_a_banner_that_never_comes(make_lab: Maker):
    the_lab = make_lab(hosts=1)
    host = the_lab.hosts[0]
    host.stop_sshd()
    host.start_sshd(silent=True)
    sentence, seconds = refused(the_lab, host)
    assert "sends no SSH version" in sentence
    assert seconds < waiting.SOON_S


def test_a_host_only_reached_through_another(lab1: Lab):
    gate, behind = lab1.hosts[:2]
    lab1.only_through(behind, gate)
    try:
        machine = opened(lab1, behind)
        assert machine.address is None
        assert machine.run(["hostname"]).out.strip() == behind.name.encode()
        machine.close()
        gate.cut()
        sentence, seconds = refused(lab1, behind)
        assert f"{gate.address} port 22 does not answer" in sentence
        assert seconds < waiting.SOON_S
    finally:
        behind.through = None


@pytest.mark.soak
def test_a_folder_that_cannot_be_written(lab1: Lab):
    host = lab1.hosts[0]
    host.read_only_disk()
    try:
        sentence, seconds = refused(lab1, host)
    finally:
        host.first_disk()
    assert str(host.workdir) in sentence and "Read-only file system" in sentence
    assert seconds < waiting.SOON_S


@pytest.mark.soak
def test_a_disk_that_is_full(lab1: Lab):
    host = lab1.hosts[0]
    host.small_disk(1)
    try:
        machine = opened(lab1, host)
        with pytest.raises(HostError, match=r"could not write .*/file: .*often is a full disk"):
            machine.put(b"x" * 2_000_000, f"{machine.workdir}/file")
        assert machine.run(["ls", machine.workdir]).out == b""
        machine.close()
    finally:
        host.first_disk()


@pytest.mark.soak
def test_a_login_that_hangs(make_lab: Maker):
    the_lab = make_lab(hosts=1)
    host = the_lab.hosts[0]
    host.stop_sshd()
    host.start_sshd(AuthorizedKeysCommand="/bin/sleep 60", AuthorizedKeysCommandUser="root",
                    AuthorizedKeysFile="none")  # fmt: skip
    sentence, seconds = refused(the_lab, host)
    assert "the login of root" in sentence
    assert seconds < waiting.SOON_S


@pytest.mark.soak
def test_a_shell_that_hangs(lab1: Lab):
    host = lab1.hosts[0]
    (host.home / ".bashrc").write_text("sleep 60\n")
    try:
        sentence, seconds = refused(lab1, host)
    finally:
        (host.home / ".bashrc").unlink()
    assert "login shell" in sentence
    assert seconds < waiting.SOON_S


def test_a_host_without_python(lab1: Lab):
    sentence, _ = refused(lab1, lab1.hosts[0], python="/no/python")
    assert "there is no Python at /no/python" in sentence


@pytest.mark.soak
@pytest.mark.parametrize(
    ("profile", "sentence"),
    [
        ("exit 1", "its login shell runs no commands"),
        ("echo welcome; echo oops >&2; printf 'no end'", None),
    ],
)
def test_what_the_shell_says_when_it_starts(lab1: Lab, profile: str, sentence: str | None):
    host = lab1.hosts[0]
    bashrc = host.home / ".bashrc"
    bashrc.write_text(f"{profile}\n")
    try:
        if sentence is not None:
            assert sentence in refused(lab1, host)[0]
        else:
            machine = opened(lab1, host)
            worker = machine.start_worker([machine.python, "-c", "print('up')"], {})
            assert worker.read_control() == b"up\n"
            assert b"welcome" in worker.read_log()
            machine.close()
    finally:
        bashrc.unlink()


def test_a_dead_host_keeps_nobody_waiting(make_lab: Maker):
    """Four hosts: one is cut off, one refuses us, one is unknown, one is well."""
    the_lab = make_lab(hosts=4)
    dead, closed, unknown, well = the_lab.hosts
    dead.cut()
    the_lab.authorize(closed)
    the_lab.forget(unknown)
    told: dict[str, float] = {}
    began = time.monotonic()

    def look(host: Host) -> None:
        refused(the_lab, host)
        told[host.name] = time.monotonic() - began

    threads = [threading.Thread(target=look, args=(one,)) for one in (dead, closed, unknown)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert max(told["lab2"], told["lab3"]) < told["lab1"]
    with pytest.raises(HostErrors) as caught:
        open_machines([spec(the_lab, host) for host in the_lab.hosts])
    lines = str(caught.value).splitlines()
    assert [line.split(":")[0] for line in lines] == ["lab1", "lab2", "lab3"]
    waiting.until(lambda: not [one for one in well.processes() if not one.is_sshd])


@pytest.mark.soak
def test_the_fastest_way_in(lab1: Lab):
    """A connection and its first command; the figure is for people."""
    began = time.monotonic()
    connection = connect(HostSpec("lab1", "lab1", ssh_config=str(lab1.ssh_config)))
    connected = time.monotonic() - began
    connection.run("true")
    print(f"connected in {connected:.2f} s, first command after {time.monotonic() - began:.2f} s")
    assert time.monotonic() - began < 3
    connection.close()
