from __future__ import annotations

import contextlib
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from smolrun.errors import HostError
from smolrun.launch.remote.machine import HostSpec
from smolrun.launch.ssh.connect import connect, open_machine
from smolrun.launch.ssh.connection import SshConnection
from tests import waiting
from tests.launch.ssh.server import Server, ssh_server

MIB = 1 << 20


def test_input_and_both_outputs_at_once(box: SshConnection):
    """More than the buffers on the way hold: who waits for one pipe alone waits forever."""
    data = b"x" * (8 * MIB)
    done = box.run("tee /dev/stderr; exit 3", data=data)
    assert done.code == 3
    assert done.out == data
    assert done.err == data


def test_a_command_that_reads_nothing(box: SshConnection):
    assert box.run("exit 0", data=b"x" * (8 * MIB)).code == 0


def test_a_command_that_is_ended_by_a_signal(box: SshConnection):
    assert box.run("kill -9 $$").code == -9


def test_a_command_that_does_not_end(box: SshConnection):
    began = time.monotonic()
    with pytest.raises(HostError, match=r"box: `sleep 30` did not end within 0\.5 s"):
        box.run("sleep 30", timeout_s=0.5)
    assert time.monotonic() - began < waiting.SOON_S
    assert box.run("echo well").out == b"well\n"


def test_a_command_that_writes_without_end(box: SshConnection):
    with pytest.raises(HostError, match="wrote more than 64 MiB"):
        box.run("yes")
    assert box.run("echo well").out == b"well\n"


def test_many_commands_at_once(box: SshConnection):
    answers: dict[int, bytes] = {}

    def run(number: int) -> None:
        answers[number] = box.run(f"cat; echo {number}", data=b"x" * 100_000).out

    threads = [threading.Thread(target=run, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert answers == {n: b"x" * 100_000 + f"{n}\n".encode() for n in range(8)}


def test_no_thread_stays_behind(server: Server):
    before = set(threading.enumerate())
    connection = connect(HostSpec("box", "box", ssh_config=str(server.config)))
    connection.run("cat", data=b"x")
    connection.close()
    waiting.until(lambda: set(threading.enumerate()) <= before)


def test_what_runs_hears_of_the_end(box: SshConnection, tmp_path: Path):
    file = tmp_path / "ended"
    process = box.start(f"cat >/dev/null; touch {file}")
    box.close()
    assert process.wait() is None
    assert process.read_out() == b""
    waiting.until(file.exists)


def test_no_more_sessions_than_the_server_allows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    with ssh_server(tmp_path, "MaxSessions 2") as server:
        connection = connect(HostSpec("box", "box", ssh_config=str(server.config)))
        running = [connection.start("cat") for _ in range(2)]
        with pytest.raises(HostError, match=r"allows no further session.*raise MaxSessions"):
            connection.start("cat")
        for process in running:
            process.close_input()
            assert process.wait() == 0
        waiting.until(lambda: _starts(connection))
        connection.close()


def _starts(connection: SshConnection) -> bool:
    with contextlib.suppress(HostError):
        return connection.run("true").code == 0
    return False


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server of the test's own, to be harmed."""
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    with ssh_server(tmp_path) as server:
        yield server


def _session(server: Server) -> list[psutil.Process]:
    """The processes of sshd that look after our connection."""
    return [
        one
        for one in psutil.Process(server.process.pid).children(recursive=True)
        if one.name() == "sshd" or "sshd" in one.name()
    ]


def test_the_other_side_ends_it(mine: Server):
    connection = connect(HostSpec("box", "box", ssh_config=str(mine.config)))
    process = connection.start("cat")
    for one in _session(mine):
        one.kill()
    assert process.read_out() == b""
    assert process.wait() is None
    assert connection.lost == "the SSH connection was lost (the other side ended it)"
    with pytest.raises(HostError, match="box: the SSH connection was lost"):
        connection.run("true")
    with pytest.raises(HostError, match="box: the SSH connection was lost"):
        connection.put(b"x", "never")
    with pytest.raises(OSError):  # noqa: PT011  # closed, or a broken pipe: by the moment
        process.write(b"x")
    connection.close()


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="needs SIGSTOP")
def test_silence_is_noticed(mine: Server, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("smolrun.launch.ssh.connection.SILENCE_LIMIT_S", 1.5)
    monkeypatch.setattr("smolrun.launch.ssh.connection._ASK_AFTER_S", 0.5)
    monkeypatch.setattr("smolrun.launch.ssh.connection._UNANSWERED_S", 1.0)
    connection = connect(HostSpec("box", "box", ssh_config=str(mine.config)))
    process = connection.start("cat")
    frozen = _session(mine)
    for one in frozen:
        one.suspend()
    began = time.monotonic()
    assert process.wait() is None
    assert 1.0 < time.monotonic() - began < waiting.SOON_S
    assert connection.is_silent
    assert re.fullmatch(r"the SSH connection was lost \(no answer for \d+ s\)", connection.lost)
    for one in frozen:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.resume()
    connection.close()


def test_quiet_is_no_silence(mine: Server, monkeypatch: pytest.MonkeyPatch):
    """A command that says nothing for long is fine, as long as its machine answers."""
    monkeypatch.setattr("smolrun.launch.ssh.connection.SILENCE_LIMIT_S", 1.5)
    monkeypatch.setattr("smolrun.launch.ssh.connection._ASK_AFTER_S", 0.5)
    connection = connect(HostSpec("box", "box", ssh_config=str(mine.config)))
    assert connection.run("sleep 3; echo well").out == b"well\n"
    assert not connection.is_silent
    connection.close()


def spec(server: Server, folder: Path) -> HostSpec:
    config, workdir = str(server.config), str(folder / "w")
    return HostSpec("box", "box", python=sys.executable, workdir=workdir, ssh_config=config)


@pytest.mark.parametrize("end", ["kill", "close"])
def test_a_worker_over_ssh(server: Server, tmp_path: Path, end: str):
    machine = open_machine(spec(server, tmp_path))
    file = tmp_path / "pid"
    code = (
        f"import os; open({str(file)!r}, 'w').write(str(os.getpid())); os.write(1, b'up\\n'); "
        + ("os.kill(os.getpid(), 19)" if end == "kill" else "import sys; sys.stdin.read()")
    )
    worker = machine.start_worker([machine.python, "-u", "-c", code], {}, str(tmp_path))
    assert worker.read_control() == b"up\n"
    pid = int(file.read_text())
    if end == "kill":
        waiting.until(lambda: psutil.Process(pid).status() == psutil.STATUS_STOPPED)
        worker.kill()
        assert worker.wait() == -9
        assert worker.lost() is None
    else:
        machine.close()
        worker.wait()
    waiting.until(lambda: not psutil.pid_exists(pid))
    machine.close()


def test_nothing_given_to_a_worker_is_seen_in_its_environment_or_arguments(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("CANARY_TOKEN", "canary")
    machine = open_machine(spec(server, tmp_path))
    code = "import os, sys; sys.stdin.readline(); print(dict(os.environ), sys.argv)"
    worker = machine.start_worker([machine.python, "-c", code], {})
    worker.write(b"canary\n")
    heard = b""
    while data := worker.read_control():
        heard += data
    assert b"canary" not in heard
    assert b"PATH" in heard
    machine.close()
