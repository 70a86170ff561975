from __future__ import annotations

import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from smolrun.cli.compose import compose
from smolrun.config import ranks
from smolrun.errors import ConfigError
from smolrun.tasks import init
from tests.cli.command import WATCHED
from tests.project import rules

FILE = Path("conf") / "cluster" / "home.yaml"


def run(folder: Path, *answers: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", WATCHED, "task=init"],
        cwd=folder,
        input="".join(f"{answer}\n" for answer in answers),
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


@pytest.fixture
def answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The task with these answers, in this process; then Ctrl-D."""
    monkeypatch.chdir(tmp_path)

    def drive(*answers: str) -> int:
        rest = list(answers)

        def ask(question: str) -> str:
            if not rest:
                raise EOFError
            return rest.pop(0)

        monkeypatch.setattr("builtins.input", ask)
        monkeypatch.setattr(init, "_try", lambda hosts: [])
        return init.drive(None)  # type: ignore[arg-type]

    return drive


def test_three_machines_over_ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    mini = ["mini1", "mini1.invalid", "10.10.0.1", "", "16"]
    done = run(tmp_path, *mini, "pi5", "pi@127.0.0.1:9", "", "2", "7.5", "here", "", "", "", "",
               "192.168.1.2", "y")  # fmt: skip
    assert done.returncode == 0, done
    assert done.stderr == "SEEN ['import hydra']\n"
    assert "mini1: no address is found for mini1.invalid" in done.stdout
    assert "pi5: " in done.stdout
    assert "mini1, pi5 did not answer; write the file all the same?" in done.stdout
    assert "smolrun task=trust cluster=home" in done.stdout
    home = yaml.safe_load((tmp_path / FILE).read_text())
    assert home == {
        "name": "home",
        "hosts": [
            {"name": "mini1", "ssh": "mini1.invalid", "address": "10.10.0.1", "memory_gb": 16},
            {"name": "pi5", "ssh": "pi@127.0.0.1:9", "ranks": 2, "memory_gb": 7.5},
            {"name": "here", "address": "192.168.1.2"},
        ],
    }
    assert rules.undescribed([tmp_path / FILE]) == []
    assert "# memory_gb: what a run may use" in (tmp_path / FILE).read_text()
    monkeypatch.chdir(tmp_path)
    assert len(ranks(compose(["cluster=home"]))) == 4


@pytest.mark.parametrize(("typed", "count"), [("", 2), ("3", 3)])
def test_this_machine_alone(tmp_path: Path, answer, typed: str, count: int, capsys):
    assert answer("", typed) == 0
    config = compose(["cluster=home"])
    assert config.cluster.name == "home"
    assert len(ranks(config)) == count
    assert capsys.readouterr().out.endswith("next: smolrun cluster=home\n")
    assert rules.undescribed([tmp_path / FILE]) == []


def test_this_machine_by_name(answer):
    assert answer("desk", "", "2", "", "") == 0
    assert [(rank.host, rank.addresses[0]) for rank in ranks(compose(["cluster=home"]))] == [
        ("desk", "127.0.0.1")
    ] * 2


@pytest.mark.parametrize(
    "wrong",
    ["-oProxyCommand=x", "a b", "ä", "x" * 64, "../x", "${seed}", "a:b", "a\tb", "'x'", "{a: b}"],
)
def test_no_name_is_asked_again(tmp_path: Path, answer, wrong: str, capsys):
    assert answer(wrong, "right", "", "", "", "") == 0
    assert "does not do: allowed: letters, digits" in capsys.readouterr().out
    assert [rank.host for rank in ranks(compose(["cluster=home"]))] == ["right"]


def test_a_name_given_twice_is_asked_again(answer, capsys):
    assert answer("a", "", "", "", "a", "b", "", "", "", "") == 0
    assert "there is a machine called a already" in capsys.readouterr().out
    assert [rank.host for rank in ranks(compose(["cluster=home"]))] == ["a", "b"]


@pytest.mark.parametrize(
    ("number", "wrong"),
    [
        (1, "-oProxyCommand=x"),
        (1, "me@-x"),
        (1, "a@b@c"),
        (1, "mini local"),
        (2, "http://mini"),
        (3, "0"),
        (3, "two"),
        (3, "²"),
        (3, "1" * 40),
        (4, "0"),
        (4, "nan"),
        (4, "-16"),
        (4, "16GB"),
    ],
)
def test_other_wrong_answers_are_asked_again(answer, number: int, wrong: str, capsys):
    answers = ["mini", "mini.local", "10.0.0.1", "1", "16", ""]
    assert answer(*answers[:number], wrong, *answers[number:]) == 0
    assert capsys.readouterr().out.count("does not do: allowed: ") == 1


@pytest.mark.parametrize("name", ["no", "ON", "null", "123", "1e3", "0x1f", "y", "12.5", "true"])
def test_names_that_yaml_would_take_for_something_else(answer, name: str):
    assert answer(name, "", "", "", "") == 0
    assert [rank.host for rank in ranks(compose(["cluster=home"]))] == [name]


def test_an_existing_file_is_kept_unless_told(tmp_path: Path, answer, capsys):
    (tmp_path / FILE).parent.mkdir(parents=True)
    for text in ("", "n", "nonsense"):
        (tmp_path / FILE).write_text("# Mine\n")
        assert answer(text) == 0
        assert capsys.readouterr().out == "nothing was changed\n"
        assert (tmp_path / FILE).read_text() == "# Mine\n"
    assert answer("y", "", "") == 0
    assert "# This machine at home" in (tmp_path / FILE).read_text()


def test_answers_that_end_early_write_nothing(tmp_path: Path):
    done = run(tmp_path, "mini1", "mini1.local")
    assert done.returncode == 130
    assert done.stdout.endswith("stopped; nothing was written\n")
    assert done.stderr == "SEEN ['import hydra']\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="Windows sends no SIGINT to one process")
def test_ctrl_c_writes_nothing(tmp_path: Path):
    child = subprocess.Popen(
        [sys.executable, "-m", "smolrun.cli", "task=init"],
        cwd=tmp_path,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**__import__("os").environ, "PYTHONUNBUFFERED": "1"},
    )
    assert child.stdout is not None
    while not child.stdout.readline().startswith("is to help"):
        pass
    assert child.stdout.read(4) == "name"
    child.send_signal(signal.SIGINT)
    out, error = child.communicate(timeout=50)
    assert child.returncode == 130
    assert out.endswith("stopped; nothing was written\n")
    assert error == ""
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_refuses(tmp_path: Path, answer):
    (tmp_path / "conf").write_text("a file, no folder")
    with pytest.raises(ConfigError, match="cannot write"):
        answer("", "")


@pytest.mark.parametrize(("last", "code"), [("n", 130), ("y", 0)])
def test_hosts_are_looked_for_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: str, code: int
):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, and is no SSH server
        port = silent.getsockname()[1]
        monkeypatch.setattr(init, "_TRY_S", 0.5)
        rest = ["mini", f"127.0.0.1:{port}", "10.0.0.1", "", "", "", last]
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("builtins.input", lambda question: rest.pop(0))
        assert init.drive(None) == code  # type: ignore[arg-type]
    assert rest == []
    assert (tmp_path / FILE).exists() == (code == 0)


def test_hosts_that_answer_are_not_asked_about(capsys, monkeypatch: pytest.MonkeyPatch):
    found = [SimpleNamespace(state="new", why="")]
    monkeypatch.setattr("smolrun.launch.ssh.connect.scan", lambda spec: found)
    assert init._try([{"name": "mini", "ssh": "mini.local"}]) == []
    assert capsys.readouterr().out == "mini: its SSH server answers\n"
