from __future__ import annotations

import sys
from pathlib import Path

import pytest

from smolrun.errors import HostError
from smolrun.launch.remote.machine import HostSpec, Machine
from smolrun.launch.remote.probe import probe_machine
from smolrun.launch.remote.shell import Shell
from tests.launch.connection_here import ConnectionHere

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX sh")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_commands_and_files(home: Path):
    box = probe_machine(HostSpec("box", "box", python=sys.executable), ConnectionHere())
    done = box.run(["cat"], data=b"x" * 300_000)
    assert (done.code, len(done.out)) == (0, 300_000)
    seen: list[int] = []
    box.put(b"abc", f"{box.workdir}/file", seen.append)
    box.get(f"{box.workdir}/file", home / "back", seen.append, most_bytes=3)
    assert (home / "back").read_bytes() == b"abc"
    assert seen == [3, 3]


def test_without_a_python_it_cannot_be_asked():
    box = Machine(HostSpec("box", "box"), ConnectionHere(), Shell.POSIX, "linux", "/h", "/w")
    assert (box.name, box.address) == ("box", "127.0.0.1")
    with pytest.raises(HostError, match="no Python"):
        box.call("host_probe", {})


def test_windows_paths_are_rooted_for_sftp(tmp_path: Path):
    asked: list[str] = []

    class Windows(ConnectionHere):
        def put(self, source, path, on_bytes=None):
            asked.append(path)

    box = Machine(HostSpec("w", "w"), Windows(), Shell.CMD, "windows", "C:/Users/me", "C:/w")
    box.put(b"", "C:/w/file")
    assert asked == ["/C:/w/file"]


@pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX sh")
def test_the_value_of_a_variable_is_not_in_the_command_line():
    connection = ConnectionHere()
    box = probe_machine(HostSpec("box", "me@box", python=sys.executable), connection)
    code = "import os, sys; print(os.environ['URL'], sys.stdin.read())"
    env = {"URL": "https://me:secret@index"}
    done = box.run([sys.executable, "-c", code], env, b"and its input")
    assert done.out == b"https://me:secret@index and its input\n"
    assert not any("secret" in line for line in connection.commands)
