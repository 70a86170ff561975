from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from smolrun.errors import HostError
from smolrun.launch.control import EXIT_ABANDONED
from smolrun.launch.remote import worker
from smolrun.launch.remote.shell import Shell
from smolrun.launch.remote.worker import RemoteWorker, start_worker
from tests import waiting
from tests.launch.connection_here import ConnectionHere

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX sh")


@pytest.fixture
def connect() -> Iterator[Callable[..., ConnectionHere]]:
    """Connections to this machine; what was started through them is ended after the test."""
    made: list[ConnectionHere] = []

    def make(profile: str = "") -> ConnectionHere:
        made.append(ConnectionHere(profile=profile))
        return made[-1]

    yield make
    for connection in made:
        connection.end_all()


def start(connection: ConnectionHere, code: str, timeout_s: float = 20.0, **more) -> RemoteWorker:
    argv = [sys.executable, "-u", "-c", code]
    return start_worker(
        connection, Shell.POSIX, argv, env=more.pop("env", {}), timeout_s=timeout_s, **more
    )


def all_of(read) -> bytes:
    heard = b""
    while data := read():
        heard += data
    return heard


def test_its_pipes_folder_and_variables(connect, tmp_path: Path):
    code = (
        "import os, sys\nprint(os.getcwd(), os.environ['A'])\nprint('log', file=sys.stderr)\n"
        "print(sys.stdin.read())"
    )
    connection = connect()
    worker = start(connection, code, env={"A": "x y"}, cwd=str(tmp_path))
    assert not any("x y" in line for line in connection.commands)
    worker.write(b"a line\n")
    worker.close_input()
    assert all_of(worker.read_control) == f"{tmp_path} x y\na line\n\n".encode()
    assert all_of(worker.read_log) == b"log\n"
    assert worker.wait() == 0
    assert worker.lost() is None


@pytest.mark.parametrize("profile", ["echo hello", "printf 'no end'", "echo out; echo err >&2"])
def test_noise_of_a_profile_goes_to_the_log(connect, profile: str):
    worker = start(connect(profile=profile), "print('first')")
    assert all_of(worker.read_control) == b"first\n"
    assert (
        all_of(worker.read_log).split()
        == profile.replace("printf ", "")
        .replace("echo ", "")
        .replace("'", "")
        .replace(";", "")
        .replace(">&2", "")
        .encode()
        .split()
    )
    assert worker.wait() == 0


def test_noise_without_an_end_ends_the_wait(connect):
    with pytest.raises(HostError, match=r"within 1 s; .*start-up files"):
        start(connect(profile="while :; do echo noise; done"), "1", timeout_s=1)


def test_a_mark_without_a_number_fills_no_memory():
    class Endless:
        chunks = iter([b"mark ", *[b"x" * 65536] * 4, b"\nfirst", b""])

        def read_out(self) -> bytes:
            return next(self.chunks)

    assert worker._until_mark(Endless(), b"mark") is None, "no more than 64 KiB were kept"


def test_a_profile_that_hangs_ends_the_wait(connect):
    with pytest.raises(HostError, match=r"did not come to our command within 0\.5 s"):
        start(connect(profile="sleep 60"), "1", timeout_s=0.5)


def test_a_profile_that_leaves(connect):
    with pytest.raises(HostError, match=r"ended \(exit code 7\) before our command: go away"):
        start(connect(profile="echo go away >&2; exit 7"), "1")


@pytest.mark.parametrize(
    ("code", "exit_code"),
    [
        ("import os; os._exit(0)", 0),
        ("import os; os._exit(3)", 3),
        ("import os; os._exit(75)", 75),
        ("import os; os._exit(131)", 131),
        ("import os; os.kill(os.getpid(), 9)", -9),
        ("import os; os.kill(os.getpid(), 11)", -11),
        ("import os; os.kill(os.getpid(), 15)", -15),
    ],
)
def test_how_it_ended(connect, code: str, exit_code: int):
    assert start(connect(), code).wait() == exit_code


def test_no_such_python(connect):
    worker = start_worker(connect(), Shell.POSIX, ["/no/python"], env={})
    assert worker.wait() == 127
    assert b"not found" in all_of(worker.read_log)


def test_a_frozen_worker_and_its_children_are_killed(connect, tmp_path: Path):
    files = [tmp_path / "pid", tmp_path / "child"]
    code = (
        "import os, signal, subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"open({str(files[1])!r}, 'w').write(str(child.pid))\n"
        f"open({str(files[0])!r}, 'w').write(str(os.getpid()))\n"
        "os.kill(os.getpid(), signal.SIGSTOP)\n"
    )
    worker = start(connect(), code)
    waiting.until(lambda: all(file.exists() and file.read_text() for file in files))
    pids = [int(file.read_text()) for file in files]
    waiting.until(lambda: psutil.Process(pids[0]).status() == psutil.STATUS_STOPPED)
    worker.kill()
    worker.kill()
    assert worker.wait() < 0
    waiting.until(lambda: not any(_runs(pid) for pid in pids))


def test_killing_one_that_ended_harms_nobody(connect):
    worker = start(connect(), "1")
    assert worker.wait() == 0
    worker.kill()
    waiting.until(
        lambda: not [t for t in threading.enumerate() if t.name == "smolrun-ssh-box-kill"]
    )


def test_a_lost_connection_is_told(connect):
    connection = connect()
    worker = start(connection, "import sys; sys.stdin.read()")
    connection.lose("the SSH connection was lost (no answer for 15 s)")
    assert worker.wait() == EXIT_ABANDONED
    assert worker.lost() == "the SSH connection was lost (no answer for 15 s)"
    assert worker.read_control() == b""
    with pytest.raises(OSError):  # noqa: PT011  # its kind depends on how it was lost
        worker.write(b"x")
    worker.kill()


def test_each_start_has_a_mark_of_its_own(connect):
    connection = connect()
    for _ in range(2):
        assert start(connection, "1").wait() == 0
    assert len(set(connection.commands)) == 2


def test_on_windows_nobody_has_a_group(connect):
    class Started(Exception):
        pass

    class Strange(ConnectionHere):
        def start(self, command: str):
            self.commands.append(command)
            raise Started

    connection = Strange()
    for shell in (Shell.CMD, Shell.POWERSHELL):
        with pytest.raises(Started):
            start_worker(connection, shell, ["C:/py.exe", "-m", "x"], env={"A": "1"}, cwd="C:/w")
    cmd, powershell = connection.commands
    assert cmd.startswith("echo smolrun-")
    assert " 0&set A=1&& cd /d" in cmd
    assert powershell.startswith("Write-Output 'smolrun-")


def thread_names() -> set[str]:
    return {thread.name for thread in threading.enumerate()}


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except (ProcessLookupError, psutil.NoSuchProcess):
        return False


def test_a_kill_does_not_wait_for_a_host_that_answers_nothing(connect):
    connection = connect()
    worker = start(connection, "import os, time; os.write(1, b'up'); time.sleep(60)")
    assert worker.read_control() == b"up"
    assert not worker.is_silent()
    connection.is_silent = True
    worker.kill()
    assert worker.wait() == EXIT_ABANDONED
    assert worker.lost() == "no answer"
