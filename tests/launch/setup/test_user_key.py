"""The user's public key: which one, and its line in authorized_keys."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from smolrun.errors import HostError
from smolrun.launch.remote.connection import Completed
from smolrun.launch.remote.shell import Shell
from smolrun.launch.setup.user_key import install, make_key, public_key, read_key

pytestmark = pytest.mark.skipif(os.name != "posix", reason="the host of these tests is a Unix one")

LINE = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGb anna@laptop"
KEPT = " ".join(LINE.split()[:2])


def host(home: Path) -> Any:
    """A machine whose home is that folder."""

    def run(argv: list[str], env: Any = None, data: bytes = b"", timeout_s: float = 60.0) -> Any:
        environment = {"HOME": str(home), "PATH": os.environ["PATH"]}
        done = subprocess.run(argv, input=data, capture_output=True, env=environment)
        return Completed(done.returncode, done.stdout, done.stderr)

    return SimpleNamespace(name="mini1", shell=Shell.POSIX, run=run)


def test_the_key_is_added_once_with_the_rights_that_sshd_wants(tmp_path: Path):
    assert install(host(tmp_path), LINE) is True
    assert install(host(tmp_path), LINE) is False
    file = tmp_path / ".ssh" / "authorized_keys"
    assert file.read_text() == f"{KEPT}\n"
    assert (file.stat().st_mode & 0o777, file.parent.stat().st_mode & 0o777) == (0o600, 0o700)


def test_keys_that_are_there_stay_also_without_a_last_newline(tmp_path: Path):
    file = tmp_path / ".ssh" / "authorized_keys"
    file.parent.mkdir()
    file.write_text("ssh-rsa AAAA other")
    assert install(host(tmp_path), LINE)
    assert file.read_text() == f"ssh-rsa AAAA other\n{KEPT}\n"


def test_a_home_that_cannot_be_written_and_windows_are_told(tmp_path: Path):
    (tmp_path / ".ssh").write_text("a file")
    with pytest.raises(HostError, match="mini1: the key could not be installed"):
        install(host(tmp_path), LINE)
    windows = SimpleNamespace(name="pc", shell=Shell.CMD)
    with pytest.raises(HostError, match="administrators_authorized_keys"):
        install(windows, LINE)  # type: ignore[arg-type]


def test_the_key_that_ssh_would_use_comes_first(tmp_path: Path):
    assert public_key([], tmp_path) is None
    folder = tmp_path / ".ssh"
    folder.mkdir()
    (folder / "id_rsa.pub").write_text(LINE)
    assert public_key([], tmp_path) == folder / "id_rsa.pub"
    (folder / "id_ed25519.pub").write_text(LINE)
    assert public_key([], tmp_path) == folder / "id_ed25519.pub"
    mine = tmp_path / "work_key"
    mine.with_name("work_key.pub").write_text(LINE)
    assert public_key([mine], tmp_path) == mine.with_name("work_key.pub")


def test_only_a_public_key_is_ever_read(tmp_path: Path):
    file = tmp_path / "x.pub"
    file.write_text(f"{LINE}\n")
    assert read_key(file) == LINE
    for text in ("-----BEGIN OPENSSH PRIVATE KEY-----\nx\n", "", f"{LINE}\n{LINE}\n"):
        file.write_text(text)
        with pytest.raises(OSError, match="not a public key"):
            read_key(file)


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="needs ssh-keygen")
def test_a_new_key_is_made_and_can_be_read(tmp_path: Path):
    file = make_key(tmp_path)
    assert file == tmp_path / ".ssh" / "id_ed25519.pub"
    assert read_key(file).startswith("ssh-ed25519 ")
    assert file.with_suffix("").stat().st_mode & 0o777 == 0o600
    with pytest.raises(OSError):  # noqa: PT011  # whatever ssh-keygen says; the key stays as it is
        make_key(tmp_path)
