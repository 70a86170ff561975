from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from smolrun.errors import HostError
from smolrun.launch.remote import probe
from smolrun.launch.remote.machine import HostSpec
from smolrun.launch.remote.probe import (
    ShellAnswer,
    parse_answer,
    probe_machine,
    unix_probe_script,
    windows_probe_command,
)
from smolrun.launch.remote.shell import Shell
from tests.launch.connection_here import ConnectionHere

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX sh")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_what_is_learnt_of_a_host(home: Path):
    spec = HostSpec("box", "box", python=sys.executable, workdir="a/b c")
    box = probe_machine(spec, ConnectionHere())
    assert (box.shell, box.os) == (Shell.POSIX, sys.platform)
    assert box.home == str(home)
    assert box.workdir == f"{home}/a/b c"
    assert Path(box.workdir).is_dir()
    assert box.python == sys.executable
    assert box.cores >= 1


def test_the_folder_is_below_the_cache_if_nothing_is_said(home: Path):
    assert (
        probe_machine(HostSpec("box", "box"), ConnectionHere()).workdir == f"{home}/.cache/smolrun"
    )


def test_a_noisy_profile_changes_nothing(home: Path):
    profile = "echo 'smolrun-found os Plan9'; echo welcome; echo oops >&2"
    box = probe_machine(
        HostSpec("box", "box", python=sys.executable), ConnectionHere(profile=profile)
    )
    assert box.os == sys.platform


def test_the_first_python_that_works(home: Path):
    broken = home / ".cache/smolrun/envs/old/bin/python"
    broken.parent.mkdir(parents=True)
    broken.write_text("#!/bin/sh\necho broken >&2\nexit 1\n")
    broken.chmod(0o755)
    good = home / ".local/bin/python3"
    good.parent.mkdir(parents=True)
    good.symlink_to(sys.executable)
    box = probe_machine(HostSpec("box", "box"), ConnectionHere())
    assert box.python == str(good)


def without_pythons(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_UNIX", ('"$HOME"/none',))
    (home / "bin").mkdir()
    for tool in ("sh", "uname"):
        (home / "bin" / tool).symlink_to(f"/bin/{tool}")
    monkeypatch.setenv("PATH", str(home / "bin"))


def test_no_python_at_all(home: Path, monkeypatch: pytest.MonkeyPatch):
    without_pythons(home, monkeypatch)
    with pytest.raises(HostError, match=r"no Python 3\.8 or newer .*task=setup cluster=home"):
        probe_machine(HostSpec("box", "box", cluster="home"), ConnectionHere())
    box = probe_machine(HostSpec("box", "box", workdir="w"), ConnectionHere(), needs_python=False)
    assert (box.python, box.workdir) == ("", f"{home}/w")


def test_a_given_python_that_is_not_there(home: Path):
    with pytest.raises(HostError, match="there is no Python at /no/python"):
        probe_machine(HostSpec("box", "box", python="/no/python"), ConnectionHere())


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written(home: Path):
    (home / "w").mkdir(mode=0o500)
    with pytest.raises(HostError, match=r"w cannot be used: Permission denied; .*workdir:"):
        probe_machine(HostSpec("box", "box", python=sys.executable, workdir="w"), ConnectionHere())


def test_a_folder_that_is_a_file(home: Path):
    (home / "w").write_text("")
    with pytest.raises(HostError, match=r"folder .*/w cannot be used: File exists"):
        probe_machine(HostSpec("box", "box", python=sys.executable, workdir="w"), ConnectionHere())


def test_an_account_without_a_shell(home: Path):
    connection = ConnectionHere(profile="echo This account is closed.; exit 1")
    with pytest.raises(HostError, match=r"runs no commands: This account is closed\."):
        probe_machine(HostSpec("box", "box"), connection)


def test_a_shell_that_hangs(home: Path):
    connection = ConnectionHere(profile="sleep 3")
    with pytest.raises(HostError, match=r"its login shell runs no command within 0\.3 s"):
        probe_machine(HostSpec("box", "box"), connection, shell_s=0.3)


def test_a_python_that_hangs_is_the_last_one_tried(home: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("smolrun.launch.remote.probe._ANSWER_S", 1.0)
    hangs = home / ".local/bin/python3"
    hangs.parent.mkdir(parents=True)
    hangs.write_text("#!/bin/sh\nexec sleep 3\n")
    hangs.chmod(0o755)
    with pytest.raises(HostError, match="did not end within 1 s"):
        probe_machine(HostSpec("box", "box"), ConnectionHere())


needs_sh = pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX sh")


def ask(home: Path, workdir: str, path: str = "/bin:/usr/bin") -> ShellAnswer:
    done = subprocess.run(
        ["sh", "-s"],
        input=unix_probe_script(workdir),
        env={"HOME": str(home), "PATH": path},
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert done.stderr == ""
    answer = parse_answer(done.stdout)
    assert answer is not None
    return answer


def program(path: Path) -> str:
    path.parent.mkdir(parents=True)
    path.write_text("")
    path.chmod(0o755)
    return str(path)


@needs_sh
def test_the_places_where_installers_put_it(tmp_path: Path):
    home = tmp_path / "a home"
    ours = program(home / "work dir/envs/py3.12/bin/python")
    uv = program(home / ".local/share/uv/python/cpython-3.12-linux/bin/python3")
    pyenv = program(home / ".pyenv/versions/3.11.4/bin/python3")
    on_path = program(tmp_path / "elsewhere/python3")
    (home / ".local/bin").mkdir()
    (home / ".local/bin/python3").write_text("cannot be run")
    answer = ask(home, "work dir", path=f"{tmp_path / 'elsewhere'}:/bin:/usr/bin")
    found = [python for python in answer.pythons if python.startswith(str(tmp_path))]
    assert found == [ours, uv, pyenv, on_path]
    assert answer.home == str(home)
    assert answer.os == sys.platform


@needs_sh
@pytest.mark.parametrize(
    ("workdir", "expected"),
    [("~/w", "{}/w"), ("w x", "{}/w x"), ("/srv/w", "/srv/w"), ("$(rm)/`x`", "{}/$(rm)/`x`")],
)
def test_the_folder_is_below_the_home(tmp_path: Path, workdir: str, expected: str):
    assert ask(tmp_path, workdir).workdir == expected.format(tmp_path)


def test_noise_and_windows_paths():
    answer = parse_answer(
        "Welcome!\r\nsmolrun-found os Windows\r\nsmolrun-found home C:\\Users\\me\r\n"
        "smolrun-found workdir C:\\Users\\me\\w\r\nsmolrun-found python C:\\Py 3\\python.exe\r\n"
        "smolrun-found python C:\\Py 3\\python.exe\r\nsmolrun-found python\r\n"
    )
    assert answer == ShellAnswer("windows", "C:/Users/me", "C:/Users/me/w", ["C:/Py 3/python.exe"])


@pytest.mark.parametrize("output", ["", "no such command\n", "smolrun-found os Linux\n"])
def test_no_answer(output: str):
    assert parse_answer(output) is None


def test_windows_is_asked_without_double_quotes():
    argv = windows_probe_command("it's/w")
    assert '"' not in "".join(argv)
    assert "'it''s\\w'" in argv[-1]
