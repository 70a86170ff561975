from __future__ import annotations

from pathlib import Path

import pytest
from fabric import Connection

from smolrun.errors import HostError
from smolrun.launch.ssh.settings import SshSettings, SshTarget, load, parse_target, settings_of


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("mini1", SshTarget("mini1")),
        ("anna@mini1.local", SshTarget("mini1.local", "anna")),
        ("anna@mini1:2222", SshTarget("mini1", "anna", 2222)),
        ("192.168.1.7", SshTarget("192.168.1.7")),
        ("fd00::2:22", SshTarget("fd00::2:22")),
        ("fe80::1%eth0", SshTarget("fe80::1%eth0")),
        ("anna@fd00::2", SshTarget("fd00::2", "anna")),
        ("anna@[fd00::2]:2222", SshTarget("fd00::2", "anna", 2222)),
        ("[fd00::2]", SshTarget("fd00::2")),
    ],
)
def test_targets(text: str, target: SshTarget):
    assert parse_target("box", text) == target


@pytest.mark.parametrize(
    "text",
    ["", "-oProxyCommand=x", "a@-x", "-a@x", "a b", "a@", "@a", "x:0", "x:99999", "x:abc", "[x",
     "a\nb", "a@b c:22", "fd00::2 x"],
)  # fmt: skip
def test_what_is_no_target(text: str):
    with pytest.raises(HostError, match="is not an SSH address"):
        parse_target("box", text)


@pytest.fixture
def says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What a client file of these lines says of a host."""
    monkeypatch.setenv("HOME", str(tmp_path))

    def settings(*lines: str, host: str = "box") -> SshSettings:
        file = tmp_path / "ssh config"
        file.write_text("\n".join(lines))
        return settings_of(Connection(host, config=load("box", str(file))))

    return settings


def test_what_counts_without_a_word_in_the_file(says, tmp_path: Path):
    found = says("Host other", "  Port 99")
    assert (found.host, found.port, found.entry) == ("box", 22, "box")
    assert found.user_files == (tmp_path / ".ssh/known_hosts", tmp_path / ".ssh/known_hosts2")
    assert found.global_files[0] == Path("/etc/ssh/ssh_known_hosts")
    assert [path.name for path in found.identities] == ["id_ed25519", "id_ecdsa", "id_rsa"]
    assert not found.identities_only
    assert found.has_agent


def test_what_the_file_says(says, tmp_path: Path):
    found = says(
        "host box",
        "  HostName = Box.Local",
        "\tport 2222",
        "  User anna",
        '  UserKnownHostsFile ~/mine "%d/other one"',
        "  GlobalKnownHostsFile none",
        "  IdentitiesOnly YES",
        "  IdentityFile ~/.ssh/a",
        '  IdentityFile "~/.ssh/b c"',
        "  IdentityAgent ~/agent.sock",
    )
    assert (found.host, found.port, found.user) == ("Box.Local", 2222, "anna")
    assert found.entry == "[box.local]:2222"
    assert found.user_files == (tmp_path / "mine", tmp_path / "other one")
    assert found.global_files == ()
    assert found.identities == (tmp_path / ".ssh/a", tmp_path / ".ssh/b c")
    assert found.identities_only
    assert found.has_own_agent


def test_a_host_key_alias_is_its_name(says):
    assert says("Host box", "HostKeyAlias The-Box", "Port 2222").entry == "the-box"


@pytest.mark.parametrize("word", ["none", "/dev/null"])
def test_no_known_hosts_at_all(says, word: str):
    assert says("Host box", f"UserKnownHostsFile {word}").user_files == ()


def test_no_agent(says):
    assert not says("Host box", "IdentityAgent none").has_agent


def test_included_files(says, tmp_path: Path):
    folder = tmp_path / ".ssh" / "conf.d"
    folder.mkdir(parents=True)
    (folder / "a").write_text("Host box\n  Port 2222\nHost *\n  User anna\n")
    (folder / "b").write_text("Include conf.d/c\n")
    (folder / "c").write_text("Host box\n  HostName c.local\n")
    found = says(
        "Include conf.d/[ab] nowhere/*",
        "IdentitiesOnly yes",
        "Host box",
        "  Port 1",
        f"Include {folder}/nothing",
        "  HostKeyAlias alias",
    )
    assert (found.host, found.port, found.user) == ("c.local", 2222, "anna")
    assert found.identities_only  # before any Host: for all of them
    assert found.entry == "alias"  # after an Include: still about this host


def test_a_file_that_includes_itself_ends(says, tmp_path: Path):
    assert says(f'Include "{tmp_path}/ssh config"', "Host box", "Port 7").port == 7


def test_the_users_files_are_read_where_none_is_named(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ssh").mkdir()
    (tmp_path / ".ssh" / "config").write_text("Host box\n  Port 2222\n")
    assert settings_of(Connection("box", config=load("box", None))).port == 2222


def test_nothing_of_fabrics_own_files_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("FABRIC_PORT", "7")
    (tmp_path / ".fabric.py").write_text("raise SystemExit('read')")
    assert settings_of(Connection("box", config=load("box", None))).port == 22


def test_a_file_that_is_not_there():
    with pytest.raises(HostError, match=r"/no/file: No such file .*cluster\.ssh_config"):
        load("box", "/no/file")


def test_a_file_that_makes_no_sense(tmp_path: Path):
    file = tmp_path / "config"
    file.write_text("Host box\nPort\n")
    with pytest.raises(HostError, match="ssh_config is not valid"):
        load("box", str(file))
