from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from smolrun.errors import HostError
from smolrun.launch.remote.machine import HostSpec
from smolrun.launch.ssh.connect import connect
from tests.launch.ssh.server import Server, make_key


def config(server: Server, *lines: str) -> str:
    """A client file without the server's own key."""
    text = (
        f"Host box\n  HostName 127.0.0.1\n  Port {server.port}\n"
        + "".join(f"  {line}\n" for line in lines)
        + f"  UserKnownHostsFile {server.known_hosts}\n  GlobalKnownHostsFile none\n"
    )
    server.config.write_text(text)
    return str(server.config)


def log_in(server: Server, **options) -> None:
    spec = HostSpec("box", "box", ssh_config=str(server.config), cluster="home")
    connect(spec, **options).close()


def refused(server: Server, **options) -> str:
    with pytest.raises(HostError) as caught:
        log_in(server, **options)
    return str(caught.value)


@pytest.fixture
def agent(
    tmp_path_factory: pytest.TempPathFactory, server: Server, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[Path], None]]:
    """A real agent; adds keys to it."""
    if shutil.which("ssh-agent") is None:
        pytest.skip("no ssh-agent on this machine")
    sock = tmp_path_factory.mktemp("agent") / "sock"
    command = ["ssh-agent", "-D", "-a", str(sock)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    process.stdout.readline()  # it says where it is once it is there
    monkeypatch.setenv("SSH_AUTH_SOCK", str(sock))

    def add(key: Path) -> None:
        subprocess.run(["ssh-add", "-q", str(key)], check=True, stdin=subprocess.DEVNULL)

    yield add
    process.terminate()
    process.wait(20)


@pytest.mark.parametrize("kind", ["ed25519", "rsa", "ecdsa"])
def test_the_usual_keys_of_the_home(server: Server, home: Path, kind: str):
    server.authorize(make_key(home / ".ssh" / f"id_{kind}", kind))
    config(server)
    log_in(server)


def test_the_keys_of_the_client_file_and_no_others(server: Server, home: Path):
    server.authorize(make_key(home / ".ssh" / "id_ed25519"))
    make_key(home / ".ssh" / "mine")
    config(server, "IdentityFile ~/.ssh/mine")
    sentence = refused(server)
    assert "tried ~/.ssh/mine" in sentence
    assert "id_ed25519" not in sentence
    assert "task=setup cluster=home" in sentence


def test_keys_of_the_agent(server: Server, home: Path, agent):
    key = make_key(home / "in_agent")
    server.authorize(key)
    config(server)
    assert "there was no key to try" in refused(server)
    agent(key)
    log_in(server)
    config(server, "IdentityAgent none")
    assert "there was no key to try" in refused(server)


def test_many_keys_in_the_agent_do_not_shut_out_the_right_one(server: Server, home: Path, agent):
    """An OpenSSH server hangs up after six."""
    for number in range(8):
        agent(make_key(home / f"wrong{number}"))
    right = make_key(home / ".ssh" / "right")
    server.authorize(right)
    config(server, "IdentityFile ~/.ssh/right")
    log_in(server)
    config(server)
    assert "the key wrong0 of the agent" in refused(server)


def test_only_the_identities(server: Server, home: Path, agent):
    key = make_key(home / "in_agent")
    agent(key)
    server.authorize(key)
    config(server, "IdentitiesOnly yes")
    assert "there was no key to try" in refused(server)
    # A public key beside names the one of the agent that is meant.
    config(server, "IdentitiesOnly yes", f"IdentityFile {key}.pub")
    log_in(server)


def test_a_key_with_a_passphrase_is_never_asked_for(server: Server, home: Path, agent):
    key = make_key(home / ".ssh" / "id_ed25519", passphrase="secret")
    server.authorize(key)
    config(server)
    sentence = refused(server)
    assert "left out ~/.ssh/id_ed25519: it has a passphrase; `ssh-add" in sentence
    asks = home / "asks"
    asks.write_text("#!/bin/sh\necho secret\n")
    asks.chmod(0o700)
    environment = os.environ | {"SSH_ASKPASS": str(asks), "SSH_ASKPASS_REQUIRE": "force"}
    subprocess.run(["ssh-add", "-q", key], check=True, env=environment, capture_output=True)
    log_in(server)


@pytest.mark.parametrize("text", ["", "no key at all", "-----BEGIN OPENSSH PRIVATE KEY-----\nx\n"])
def test_files_that_are_no_keys(server: Server, home: Path, text: str):
    (home / ".ssh" / "id_rsa").write_text(text)
    config(server)
    assert "left out ~/.ssh/id_rsa: it cannot be read" in refused(server)


def test_a_certificate_beside_the_key(server: Server, home: Path):
    authority = make_key(home / "authority")
    key = make_key(home / ".ssh" / "id_ed25519")
    me = subprocess.run(["id", "-un"], capture_output=True, text=True).stdout.strip()
    subprocess.run(
        ["ssh-keygen", "-q", "-s", authority, "-I", "test", "-n", me, f"{key}.pub"], check=True
    )
    server.folder.joinpath("authorized_keys").write_text(
        f"cert-authority {Path(f'{authority}.pub').read_text()}"
    )
    config(server)
    log_in(server)


def test_a_password_only_where_somebody_can_be_asked(server: Server, home: Path):
    config(server)
    server.authorize()
    asked: list[str] = []

    def ask(who: str) -> str:
        asked.append(who)
        return "wrong"

    sentence = refused(server, ask_password=ask)
    assert len(asked) == 1
    assert asked[0].endswith("@127.0.0.1")
    assert "tried the password; it takes publickey" in sentence


def test_a_user_who_is_not_there(server: Server, home: Path):
    make_key(home / ".ssh" / "id_ed25519")
    config(server, "User nobody-here")
    assert "rejects the login of nobody-here" in refused(server)
