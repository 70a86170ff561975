from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from smolrun.cli.compose import compose
from smolrun.config.cluster import ClusterConfig, HostConfig
from smolrun.errors import ConfigError
from smolrun.launch.remote.machine import HostSpec
from smolrun.launch.ssh.connect import connect
from smolrun.launch.ssh.host_keys import KnownHosts
from smolrun.tasks import trust
from tests.launch.ssh.server import Server, make_key, ssh_server

COMMAND = [sys.executable, "-m", "smolrun.cli"]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with ssh_server(tmp_path_factory.mktemp("sshd")) as server:
        yield server


@pytest.fixture
def server(running: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    """The server, which nobody knows yet."""
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    monkeypatch.setattr("platformdirs.user_config_path", lambda name: Path("/nowhere") / name)
    running.known_hosts.unlink(missing_ok=True)
    running.configure()
    return running


class Terminal(io.StringIO):
    """Somebody who types; Ctrl-D at the end."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def answer(server: Server, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """The task with these answers; `hosts` are names to targets."""

    def run(*answers: str, hosts: dict[str, str] | None = None, write: bool = False) -> int:
        entries = [
            HostConfig(name=name, ssh=ssh) for name, ssh in (hosts or {"mini1": "box"}).items()
        ]
        cluster = ClusterConfig(
            name="home", hosts=entries, ssh_config=str(server.config), connect_timeout_s=3
        )
        monkeypatch.setattr("sys.stdin", Terminal("".join(f"{one}\n" for one in answers)))
        keys = SimpleNamespace(yes=write, forget=None)
        return trust.drive(SimpleNamespace(cluster=cluster, trust=keys))  # type: ignore[arg-type]

    return run


def fingerprint(key: Path) -> str:
    done = subprocess.run(["ssh-keygen", "-lf", key], capture_output=True, text=True, check=True)
    return done.stdout.split()[1]


def test_a_yes_is_kept(server: Server, answer, capsys: pytest.CaptureFixture[str]):
    assert answer("y") == 0
    out = capsys.readouterr().out
    assert fingerprint(server.host_key) in out
    assert "ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub" in out
    connect(HostSpec("mini1", "box", ssh_config=str(server.config))).close()
    assert answer() == 0
    assert [line.split()[-1] for line in capsys.readouterr().out.splitlines()] == ["state", "known"]


@pytest.mark.parametrize("word", ["n", "", "yep", "of course"])
def test_anything_else_is_a_no(server: Server, answer, word: str):
    assert answer(word) == 3
    assert not server.known_hosts.exists()


def test_no_answer_at_all(server: Server, answer):
    assert answer() == 130
    assert not server.known_hosts.exists()


def test_new_keys_unseen_by_write(server: Server, answer):
    assert answer(write=True) == 0
    assert len(server.known_hosts.read_text().splitlines()) == 1


def test_two_names_for_one_host_are_one_question(server: Server, answer):
    assert answer("y", hosts={"mini1": "box", "mini2": "box"}) == 0
    assert len(server.known_hosts.read_text().splitlines()) == 1


def test_a_host_that_is_away_stops_nothing(
    server: Server, answer, capsys: pytest.CaptureFixture[str]
):
    assert answer("y", hosts={"gone": "127.0.0.1:1", "bad": "-x", "mini1": "box"}) == 3
    out = capsys.readouterr().out
    assert "unreachable: 127.0.0.1 port 1 refuses the connection" in out
    assert "unreachable: '-x' is not an SSH address" in out
    assert KnownHosts([server.known_hosts]).keys(server.entry)


@pytest.fixture
def changed(server: Server, tmp_path: Path) -> Path:
    """known_hosts has another key for the server, between lines about others."""
    other = make_key(tmp_path / "other")
    server.know(Path(f"{other}.pub"))
    line = server.known_hosts.read_text()
    server.known_hosts.write_text(f"# mine\n{line}elsewhere {line.split(' ', 1)[1]}")
    return other


def test_a_changed_key_is_replaced_after_a_whole_yes(
    server: Server, answer, changed: Path, capsys: pytest.CaptureFixture[str]
):
    assert answer("yes") == 0
    out = capsys.readouterr().out
    assert "CHANGED" in out
    assert fingerprint(changed) in out
    assert fingerprint(server.host_key) in out
    assert "known_hosts line 2" in out
    lines = server.known_hosts.read_text().splitlines()
    assert [line.split()[0] for line in lines] == ["#", "elsewhere", server.entry]
    connect(HostSpec("mini1", "box", ssh_config=str(server.config))).close()


@pytest.mark.parametrize(("word", "write"), [("y", False), ("", False), ("n", True)])
def test_a_changed_key_is_never_replaced_otherwise(
    server: Server, answer, changed: Path, word: str, write: bool
):
    before = server.known_hosts.read_text()
    assert answer(word, write=write) == 3
    assert server.known_hosts.read_text() == before


def test_behind_a_jump_host_there_is_more_to_see(server: Server, answer):
    server.configure("ProxyJump gate", "HostKeyAlias behind")
    text = server.config.read_text()
    server.config.write_text(f"Host gate\n  HostName 127.0.0.1\n  Port {server.port}\n{text}")
    assert answer("y", "y") == 0
    names = [line.split()[0] for line in server.known_hosts.read_text().splitlines()]
    assert names == [server.entry, "behind"]


def test_nowhere_to_keep_a_key(server: Server, answer, capsys: pytest.CaptureFixture[str]):
    text = server.config.read_text()
    server.config.write_text(text.replace(str(server.known_hosts), "/dev/null"))
    assert answer("y") == 3
    assert "UserKnownHostsFile none" in capsys.readouterr().out


def test_a_file_that_cannot_be_written(server: Server, answer, capsys):
    server.known_hosts.mkdir()
    try:
        assert answer("y") == 3
    finally:
        server.known_hosts.rmdir()
    assert "cannot write" in capsys.readouterr().out


def test_a_cluster_of_this_machine_alone(answer):
    with pytest.raises(ConfigError, match="no host of cluster=local has an `ssh:`"):
        trust.drive(compose(["task=trust"]))


def command(server: Server, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    conf = folder / "conf" / "cluster"
    conf.mkdir(parents=True, exist_ok=True)
    (conf / "home.yaml").write_text(
        "# One host\nname: home\nhosts:\n  - {name: mini1, ssh: box}\n"
        f"ssh_config: {server.config}\n"
    )
    argv = [*COMMAND, "task=trust", "cluster=home", *words]
    return subprocess.run(
        argv, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60
    )


def test_without_a_terminal_nothing_is_trusted(server: Server, tmp_path: Path):
    done = command(server, tmp_path)
    assert done.returncode == 3, done.stderr
    assert "not a terminal, cannot prompt, so nothing was trusted" in done.stdout
    assert "task=trust cluster=home trust.yes=true" in done.stdout
    assert not server.known_hosts.exists()
    done = command(server, tmp_path, "trust.yes=true")
    assert done.returncode == 0, done.stderr
    assert KnownHosts([server.known_hosts]).keys(server.entry)
    assert done.stderr == ""
