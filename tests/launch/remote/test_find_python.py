from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from smolrun.launch.remote.find_python import Answer, understood, unix_question, windows_question

needs_sh = pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX sh")


def ask(home: Path, workdir: str, path: str = "/bin:/usr/bin") -> Answer:
    done = subprocess.run(
        ["sh", "-s"],
        input=unix_question(workdir),
        env={"HOME": str(home), "PATH": path},
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert done.stderr == ""
    answer = understood(done.stdout)
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
    answer = understood(
        "Welcome!\r\nsmolrun-found os Windows\r\nsmolrun-found home C:\\Users\\me\r\n"
        "smolrun-found workdir C:\\Users\\me\\w\r\nsmolrun-found python C:\\Py 3\\python.exe\r\n"
        "smolrun-found python C:\\Py 3\\python.exe\r\nsmolrun-found python\r\n"
    )
    assert answer == Answer("windows", "C:/Users/me", "C:/Users/me/w", ["C:/Py 3/python.exe"])


@pytest.mark.parametrize("output", ["", "no such command\n", "smolrun-found os Linux\n"])
def test_no_answer(output: str):
    assert understood(output) is None


def test_windows_is_asked_without_double_quotes():
    argv = windows_question("it's/w")
    assert '"' not in "".join(argv)
    assert "'it''s\\w'" in argv[-1]
