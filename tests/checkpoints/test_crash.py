"""A save that dies, at any moment, leaves the old checkpoint or the new one, never a mix."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from smolrun.checkpoints.find import newest_valid
from smolrun.checkpoints.folder import commit, part_folder
from tests.checkpoints.saves import manifest_of, save, tag_of

ROOT = Path(__file__).resolve().parents[2]


def kill_everywhere(folder: Path, mode: str, every: int) -> Any:
    if not hasattr(os, "fork"):
        pytest.skip("kills.py forks, which this system cannot")
    done = subprocess.run(
        [sys.executable, "-m", "tests.checkpoints.kills", folder, mode, str(every)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def is_old_then_new(found: list[int]) -> bool:
    """First the old checkpoint is found, from some moment on the new one, and never back."""
    return found == sorted(found) and set(found) == {1, 2}


@pytest.mark.parametrize("mode", ["new", "same"])
def test_killed_at_many_lines(tmp_path: Path, mode: str):
    result = kill_everywhere(tmp_path, mode, 37)
    assert result["kills"] >= 12
    assert is_old_then_new(result["found"])


@pytest.mark.soak
@pytest.mark.timeout(500)
@pytest.mark.parametrize("mode", ["new", "same"])
def test_killed_at_every_line(tmp_path: Path, mode: str):
    result = kill_everywhere(tmp_path, mode, 1)
    assert result["kills"] >= 400
    assert is_old_then_new(result["found"])


class Disk:
    """Keeps what is durable of a folder: all that was synced, and of the rest any subset."""

    def __init__(self, folder: Path, copies: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.states: list[Path] = []
        self._folder, self._copies = folder, copies
        self._synced: set[int] = set()
        rename = os.rename

        def seen_fsync(handle: int) -> None:
            self.crash()
            self._synced.add(os.fstat(handle).st_ino)

        def seen_rename(source: Path, target: Path) -> None:
            self.crash()
            rename(source, target)
            if "removed" not in target.name:  # what is being removed may come back
                self._synced.discard(target.parent.stat().st_ino)

        monkeypatch.setattr(os, "fsync", seen_fsync)
        monkeypatch.setattr(os, "rename", seen_rename)

    def has(self, path: Path) -> bool:
        """Whether what a file or folder holds is on the disk for good."""
        return path.stat().st_ino in self._synced

    def crash(self) -> None:
        """Adds every state a power cut could leave now: a file not synced may be cut anywhere."""
        files = [path for path in sorted(self._folder.rglob("*")) if path.is_file()]
        unsafe = [path for path in files if path.stat().st_ino not in self._synced]
        fates = ("whole", "half", "empty", "gone")
        for fate in itertools.product(fates, repeat=len(unsafe)):
            state = self._copies / str(len(self.states))
            shutil.copytree(self._folder, state)
            for path, what in zip(unsafe, fate, strict=True):
                copy = state / path.relative_to(self._folder)
                size = copy.stat().st_size
                os.truncate(copy, {"whole": size, "half": size // 2}.get(what, 0))
                if what == "gone":
                    copy.unlink()
            self.states.append(state)


@pytest.mark.parametrize("step", [1, 2])
def test_power_cut_at_any_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int):
    checkpoints = tmp_path / "disk" / "checkpoints"
    with monkeypatch.context() as patch:
        disk = Disk(tmp_path / "disk", tmp_path / "states", patch)
        save(checkpoints, 1, tag=1)
        begin = len(disk.states)
        part = part_folder(checkpoints, step, "t")
        manifest = manifest_of(part, step, 2)
        before_commit = len(disk.states)
        final = commit(part, manifest)
        during = len(disk.states)
        disk.crash()
    assert all(disk.has(path) for path in (final, checkpoints, checkpoints.parent))
    found = []
    for state in disk.states:
        folder = newest_valid(state / "checkpoints", lambda text: None)
        found.append(folder and tag_of(folder))
    assert before_commit - begin >= 8
    assert set(found[begin:before_commit]) == {1}
    assert set(found[before_commit:during]) == {1, 2}
    assert found[during:] == [2]  # commit came back: nothing is left to chance
