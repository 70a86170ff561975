"""Atomic replacement of files. The bounded reads: tests/attacks/test_untrusted_files.py."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from smolrun import files
from smolrun.files import atomic_write, atomic_writer


def test_replaces_the_content_and_leaves_no_temporary_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for content in (b"one", b"two"):
        atomic_write(path, content)
        assert path.read_bytes() == content
    assert os.listdir(tmp_path) == ["a.json"]


def test_an_exception_leaves_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    atomic_write(path, b"old")
    with pytest.raises(KeyboardInterrupt), atomic_writer(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    target = tmp_path / "precious"
    target.write_bytes(b"precious")
    (tmp_path / "a.json").symlink_to(target)
    atomic_write(tmp_path / "a.json", b"new")
    assert target.read_bytes() == b"precious"
    assert not (tmp_path / "a.json").is_symlink()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no permission bits")
def test_the_mode_is_set_or_left_to_the_umask(tmp_path: Path) -> None:
    atomic_write(tmp_path / "given", b"", mode=0o640)
    atomic_write(tmp_path / "usual", b"")
    (tmp_path / "plain").touch()
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes["given"] == 0o640
    assert modes["usual"] == modes["plain"]


def test_a_file_that_another_program_has_open_on_windows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusals = [PermissionError("open in another program")] * 3
    replace = os.replace

    def refusing(source: Path, target: Path) -> None:
        if refusals:
            raise refusals.pop()
        replace(source, target)

    monkeypatch.setattr(files, "_REPLACE_PAUSE_S", 0.001)
    monkeypatch.setattr(files.os, "replace", refusing)
    part = tmp_path / "part"
    part.write_bytes(b"new")
    with pytest.raises(PermissionError):
        files._replace(part, tmp_path / "a")
    monkeypatch.setattr(files, "_ATTEMPTS", 3)
    files._replace(part, tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == b"new"
