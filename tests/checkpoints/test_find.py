from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from smolrun.checkpoints.find import checkpoints_in, newest_valid, verify
from smolrun.errors import CheckpointError
from tests.checkpoints.saves import save
from tests.checkpoints.test_folder import flip, no_warnings

FILE = "rank0-0.safetensors"


def foreign(folder: Path) -> None:
    other = save(folder.parent.parent / "other", 9)
    shutil.copy(other / FILE, folder / FILE)


def linked(folder: Path) -> None:
    (folder / FILE).rename(folder.parent / "moved")
    (folder / FILE).symlink_to(folder.parent / "moved")


def piped(folder: Path) -> None:
    (folder / FILE).unlink()
    os.mkfifo(folder / FILE)


def linked_manifest(folder: Path) -> None:
    (folder / "manifest.json").rename(folder.parent / "moved")
    (folder / "manifest.json").symlink_to(folder.parent / "moved")


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda folder: os.truncate(folder / FILE, 60), "has 60 bytes"),
    "emptied": (lambda folder: os.truncate(folder / FILE, 0), "has 0 bytes"),
    "longer": (lambda folder: os.truncate(folder / FILE, 999), "has 999 bytes"),
    "missing": (lambda folder: (folder / FILE).unlink(), "No such file"),
    "flipped": (flip, "rank1-0.* is damaged"),
    "of another run": (foreign, "is damaged"),
    "a link": (linked, "is not a regular file"),
    "a pipe": (piped, "is not a regular file"),
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), "manifest.json cannot"),
    "half a manifest": (lambda folder: os.truncate(folder / "manifest.json", 99), "no JSON"),
    "a linked manifest": (linked_manifest, "manifest.json is not a regular file"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_passed_over(tmp_path: Path, damage: str):
    checkpoints = tmp_path / "checkpoints"
    good, bad = save(checkpoints, 5), save(checkpoints, 6)
    assert newest_valid(checkpoints, no_warnings) == bad
    harm, problem = DAMAGE[damage]
    harm(bad)
    with pytest.raises(CheckpointError, match=problem) as caught:
        verify(bad)
    told: list[str] = []
    assert newest_valid(checkpoints, told.append) == good
    assert len(told) == 1
    assert told[0].startswith(f"{caught.value}") and str(bad) in told[0]


def test_newest_is_by_step_not_by_time(tmp_path: Path):
    for step in (300_000_000, 7, 12):
        save(tmp_path, step)
    assert [step for step, _ in checkpoints_in(tmp_path)] == [300_000_000, 12, 7]


def test_other_things_in_the_folder_do_not_matter(tmp_path: Path):
    folder = save(tmp_path, 1)
    (folder / ".DS_Store").write_text("x")
    (tmp_path / "step-00000009").write_text("a file")
    (tmp_path / "step-9").mkdir()
    (tmp_path / "step-00000009.part-a").mkdir()
    assert newest_valid(tmp_path, no_warnings) == folder


def test_no_folder_no_checkpoint(tmp_path: Path):
    assert newest_valid(tmp_path / "checkpoints", no_warnings) is None
