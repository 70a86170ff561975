from __future__ import annotations

import sys
from importlib import resources
from pathlib import Path

import pytest

from smolrun.errors import HostError
from smolrun.launch.remote.call import call
from tests.launch.connection_here import ConnectionHere

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX sh")


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Writes the source of a script of on_host/, named x."""

    def write(source: str) -> None:
        (tmp_path / "x.py").write_text(source, encoding="utf-8")

    (tmp_path / "prelude.py").write_text("")
    monkeypatch.setattr(resources, "files", lambda package: tmp_path)
    return write


def python(tmp_path: Path, body: str) -> str:
    path = tmp_path / "python"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    "profile",
    [
        "",
        "echo welcome; echo oops >&2",
        "printf 'no end of line'",
        "echo '{\"a\": 1}'; printf '\\377\\376\\n'",
    ],
)
def test_what_goes_there_comes_back(script, profile: str):
    script("def main(request):\n    print('chatty')\n    return {'got': request, 'é': '\"'}\n")
    request = {"text": 'it\'s "x" \\ $HOME \n ü \u2028 {} %s', "number": 1.5, "list": [None, True]}
    reply = call(ConnectionHere(profile=profile), sys.executable, "x", request)
    # What is said there cannot obey a terminal here, nor begin a line of ours.
    request["text"] = 'it\'s "x" \\ $HOME   ü   {} %s'
    assert reply == {"got": request, "é": '"'}


def test_nothing_of_the_request_is_in_the_list_of_processes(script):
    script("def main(request):\n    return {}\n")
    connection = ConnectionHere()
    call(connection, sys.executable, "x", {"password": "canary"})
    assert "canary" not in "".join(connection.commands)


def test_the_users_own_modules_and_variables_change_nothing(
    script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "json.py").write_text("raise SystemExit('caught')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    script("import json\ndef main(request):\n    return {'ok': True}\n")
    assert call(ConnectionHere(), sys.executable, "x", {}) == {"ok": True}


def test_an_old_python_says_so_itself(script, tmp_path: Path):
    script("def main(request):\n    return {}\n")
    # A Python that lies about its age: it runs the program after this line.
    old = python(
        tmp_path,
        f"(echo 'import sys; sys.version_info = (2, 7, 18); sys.version = \"2.7.18 (x)\"'; cat) "
        f"| {sys.executable} -I -",
    )
    with pytest.raises(HostError, match=r"box: its .*python is Python 2\.7\.18.* older than 3\.8"):
        call(ConnectionHere(), old, "x", {})


def test_a_python_that_knows_none_of_our_flags(script, tmp_path: Path):
    script("def main(request):\n    return {}\n")
    old = python(tmp_path, "echo 'Unknown option: -I' >&2; echo 'usage: python' >&2; exit 2")
    with pytest.raises(HostError, match=r"is Python 2, which is older than 3\.8; .*task=setup"):
        call(ConnectionHere(), old, "x", {})


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("def main(request):\n    raise OSError('disk on fire')\n", "disk on fire"),
        ("def main(request):\n    raise SystemExit(9)\n", "exit code 9: no output"),
        ("def main(request):\n    return [1]\n", "is not valid"),
        ("def main(request):\n    return {1, 2}\n", "not JSON serializable"),
    ],
)
def test_a_script_that_fails_is_told_by_its_last_word(script, source: str, sentence: str):
    script(source)
    with pytest.raises(HostError, match=sentence):
        call(ConnectionHere(), sys.executable, "x", {})


def test_no_python(script):
    script("def main(request):\n    return {}\n")
    with pytest.raises(HostError, match=r"no Python at /no/python .*; smolrun task=setup"):
        call(ConnectionHere(), "/no/python", "x", {})


def test_something_that_is_no_python(script):
    script("def main(request):\n    return {}\n")
    with pytest.raises(HostError, match="could not do 'x'"):
        call(ConnectionHere(), "/bin/true", "x", {})


def test_a_forged_reply_is_not_believed(script):
    script("def main(request):\n    return {'true': 1}\n")
    forged = "echo 'smolrun-0123456789abcdef {\"true\": 0}'"
    assert call(ConnectionHere(profile=forged), sys.executable, "x", {}) == {"true": 1}


@pytest.mark.parametrize("name", ["host_probe", "clock"])
def test_the_real_scripts(name: str, tmp_path: Path):
    assert call(ConnectionHere(), sys.executable, name, {"workdir": str(tmp_path / "w")})
