from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from smolrun.checkpoints.find import checkpoints_in, locate, newest_valid, verify
from smolrun.errors import CheckpointError
from tests.checkpoints.saves import save, tag_of
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


@pytest.fixture
def outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three runs: one with two checkpoints, one with one, one with none."""
    monkeypatch.chdir(tmp_path)
    outputs = tmp_path / "outputs"
    save(outputs / "run-a" / "checkpoints", 1)
    save(outputs / "run-a" / "checkpoints", 2)
    save(outputs / "run-b" / "checkpoints", 3)
    (outputs / "run-c").mkdir()
    (outputs / "latest").symlink_to("run-a")
    return outputs


@pytest.mark.parametrize("text", ["latest", "run-a", "outputs/run-a", "{outputs}/run-a"])
def test_a_run_means_its_newest_checkpoint(outputs: Path, text: str):
    run, checkpoint = locate(text.format(outputs=outputs), outputs, no_warnings)
    assert run == outputs / "run-a"
    assert tag_of(checkpoint) == 2


@pytest.mark.parametrize("text", ["run-b/checkpoints/step-00000003", "{outputs}/run-b/checkpoints"])
def test_a_checkpoint_can_be_named(outputs: Path, text: str, monkeypatch: pytest.MonkeyPatch):
    if text.endswith("checkpoints"):
        monkeypatch.chdir(outputs / "run-b" / "checkpoints")
        text = "step-00000003"
    run, checkpoint = locate(text, outputs, no_warnings)
    assert (run, tag_of(checkpoint)) == (outputs / "run-b", 3)


def test_latest_as_a_text_file(outputs: Path):
    (outputs / "latest").unlink()
    (outputs / "latest").write_text("run-b\n")
    assert locate("latest", outputs, no_warnings)[0] == outputs / "run-b"


def test_a_checkpoint_outside_a_run(outputs: Path, tmp_path: Path):
    alone = tmp_path / "kept" / "best"
    shutil.copytree(outputs / "run-b" / "checkpoints" / "step-00000003", alone)
    assert locate(str(alone), outputs, no_warnings) == (tmp_path / "kept", alone)


def test_the_newest_of_a_run_may_be_damaged(outputs: Path):
    flip(outputs / "run-a" / "checkpoints" / "step-00000002")
    told: list[str] = []
    assert tag_of(locate("latest", outputs, told.append)[1]) == 1
    assert "step-00000002" in told[0]


def test_a_damaged_one_that_was_named_is_an_error(outputs: Path):
    bad = outputs / "run-a" / "checkpoints" / "step-00000002"
    flip(bad)
    with pytest.raises(CheckpointError, match="is damaged"):
        locate(str(bad), outputs, no_warnings)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("run-x", "no run and no checkpoint 'run-x'; runs with checkpoints in .*: run-b, run-a"),
        ("run-c", "the run run-c has no checkpoint that can be used; runs with.*: run-b, run-a"),
        ("run-a/config.yaml", "no run and no checkpoint"),
        ("~nobody-here/x", "no run and no checkpoint"),
        ("a\0b", "no run and no checkpoint"),
    ],
)
def test_what_is_not_there_is_told_with_what_is(outputs: Path, text: str, problem: str):
    (outputs / "run-a" / "config.yaml").touch()
    with pytest.raises(CheckpointError, match=problem):
        locate(text, outputs, no_warnings)


def test_without_any_run(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"'latest'; there is no folder .*outputs: are you"):
        locate("latest", tmp_path / "outputs", no_warnings)
    (tmp_path / "outputs").mkdir()
    with pytest.raises(CheckpointError, match=r"'latest'; no run in .* has checkpoints"):
        locate("latest", tmp_path / "outputs", no_warnings)
