"""The key that signs run folders: complete or absent, and never replaced."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

import platformdirs
import pytest

from smolrun.errors import SmolrunError
from smolrun.tracking.signature import is_signed, sign


@pytest.fixture
def key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the key will be; there is none yet."""
    monkeypatch.setattr(platformdirs, "user_config_path", lambda name: tmp_path / name)
    return tmp_path / "smolrun" / "run_folders.key"


def test_a_process_that_ends_while_it_writes_leaves_no_key(
    key: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random_bytes = secrets.token_bytes

    def end(size: int) -> bytes:
        if size == 32:
            raise KeyboardInterrupt
        return random_bytes(size)

    with monkeypatch.context() as patched:
        patched.setattr(secrets, "token_bytes", end)
        with pytest.raises(KeyboardInterrupt):
            sign(b"")
    assert not key.exists()
    assert is_signed(b"a", sign(b"a"))
    assert list(key.parent.iterdir()) == [key]


@pytest.mark.parametrize("content", [b"", b"x" * 31, b"x" * 33])
def test_a_key_of_another_length_is_an_error(key: Path, content: bytes) -> None:
    key.parent.mkdir()
    key.write_bytes(content)
    with pytest.raises(SmolrunError, match="does not have 32 bytes: delete it"):
        sign(b"")
    assert key.read_bytes() == content


def test_the_key_of_another_process_stays(key: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It creates one between our look and our link."""
    link = os.link

    def second(source: Path, target: Path) -> None:
        key.write_bytes(b"x" * 32)
        link(source, target)

    monkeypatch.setattr(os, "link", second)
    sign(b"")
    assert key.read_bytes() == b"x" * 32


def test_a_file_system_without_hard_links_has_a_key(
    key: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError("Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    assert is_signed(b"a", sign(b"a"))
    assert list(key.parent.iterdir()) == [key]
    if os.name == "posix":
        assert key.stat().st_mode & 0o777 == 0o600
