"""One real SSH server for the tests of this folder, as its client files describe it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from smolrun.launch.remote.machine import HostSpec
from smolrun.launch.ssh.connect import connect
from smolrun.launch.ssh.connection import SshConnection
from tests.launch.ssh.server import Server, ssh_server


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with ssh_server(tmp_path_factory.mktemp("sshd")) as server:
        yield server


@pytest.fixture
def server(running: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """The server with fresh client files, and no agent of whoever runs the tests."""
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    running.know()
    running.configure()
    running.authorize(running.user_key)
    yield running
    assert running.process.poll() is None


@pytest.fixture
def box(server: Server) -> Iterator[SshConnection]:
    """A connection to it."""
    connection = connect(HostSpec("box", "box", ssh_config=str(server.config)))
    yield connection
    connection.close()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's home is a folder of the test, so their own keys and files play no part."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ssh").mkdir()
    return tmp_path
