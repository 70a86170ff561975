from __future__ import annotations

import os
from pathlib import Path

import pytest

from smolrun.checkpoints import folder as folders
from smolrun.checkpoints.find import newest_valid
from smolrun.checkpoints.folder import (
    commit,
    leftovers,
    part_folder,
    prune,
    remove_leftovers,
    step_folder,
)
from smolrun.errors import CheckpointError
from tests.checkpoints.saves import manifest_of, save, tag_of


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def flip(folder: Path) -> None:
    """One bit of one file, as a bad disk does."""
    file = folder / "rank1-0.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def no_warnings(text: str) -> None:
    raise AssertionError(text)


def test_names_of_folders(tmp_path: Path):
    assert step_folder(tmp_path, 1200) == tmp_path / "step-00001200"
    assert part_folder(tmp_path, 1200, "a-1") == tmp_path / "step-00001200.part-a-1"
    assert step_folder(tmp_path, 10**9).name == "step-1000000000"


@pytest.mark.parametrize("token", ["", "../x", "a/b", "a.b", "ä", "x" * 65, "a\n"])
def test_a_token_is_a_plain_word(tmp_path: Path, token: str):
    with pytest.raises(CheckpointError, match="cannot be the token"):
        part_folder(tmp_path, 1, token)


def test_nothing_is_a_checkpoint_before_it_is_committed(tmp_path: Path):
    part = part_folder(tmp_path, 5, "t")
    manifest = manifest_of(part, 5, 5)
    (part / "manifest.json").write_bytes(manifest.to_bytes())  # all there but the rename
    assert newest_valid(tmp_path, no_warnings) is None
    final = commit(part, manifest)
    assert names(tmp_path) == ["step-00000005"]
    assert newest_valid(tmp_path, no_warnings) == final
    assert tag_of(final) == 5


def test_a_file_that_is_missing_or_short_is_not_committed(tmp_path: Path):
    part = part_folder(tmp_path, 5, "t")
    manifest = manifest_of(part, 5, 5)
    os.truncate(part / "rank1-0.safetensors", 50)
    with pytest.raises(CheckpointError, match=r"rank1-0.* has 50 bytes, not \d+"):
        commit(part, manifest)
    (part / "rank1-0.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"rank1-0.* has None bytes"):
        commit(part, manifest)
    assert names(tmp_path) == [part.name]


def test_a_manifest_that_could_not_be_read_again_is_not_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("smolrun.checkpoints.folder.MAX_MANIFEST_BYTES", 100)
    with pytest.raises(CheckpointError, match="more than a manifest may have"):
        save(tmp_path, 7)
    assert not step_folder(tmp_path, 7).exists()


def test_the_same_step_is_replaced(tmp_path: Path):
    save(tmp_path, 5, tag=1)
    assert tag_of(save(tmp_path, 5, tag=2)) == 2
    assert names(tmp_path) == ["step-00000005"]


def test_between_the_two_renames_the_old_one_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    save(tmp_path, 5, tag=1)
    rename = os.rename

    def cut_off(source: Path, target: Path) -> None:
        if ".part-t" in str(source):
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(folders.os, "rename", cut_off)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 5, tag=2)
    monkeypatch.undo()
    found = newest_valid(tmp_path, no_warnings)
    assert found is not None
    assert found.name == "step-00000005.old"
    assert tag_of(found) == 1
    assert [path.name for path in leftovers(tmp_path)] == ["step-00000005.part-t2"]
    remove_leftovers(tmp_path)
    assert names(tmp_path) == ["step-00000005"]
    assert tag_of(tmp_path / "step-00000005") == 1


def test_leftovers_go_and_nothing_else(tmp_path: Path):
    save(tmp_path, 1)
    save(tmp_path, 2)
    (tmp_path / "step-00000002").rename(tmp_path / "step-00000002.old")
    save(tmp_path, 2, tag=3)
    manifest_of(part_folder(tmp_path, 4, "dead"), 4, 4)
    (tmp_path / "my-notes.part-1").mkdir()
    (tmp_path / "step-00000009.part-link").symlink_to(tmp_path / "step-00000001")
    (tmp_path / "step-00000002.old").mkdir(exist_ok=True)
    found = leftovers(tmp_path)
    removed = remove_leftovers(tmp_path)
    assert removed == found
    assert [path.name for path in removed] == ["step-00000002.old", "step-00000004.part-dead"]
    assert names(tmp_path) == [
        "my-notes.part-1",
        "step-00000001",
        "step-00000002",
        "step-00000009.part-link",
    ]
    assert remove_leftovers(tmp_path / "not there") == []


def test_the_newest_are_kept_and_the_protected(tmp_path: Path):
    for step in (1, 2, 30, 4, 5):
        save(tmp_path, step)
    removed = prune(tmp_path, keep=2, protect=[2])
    assert [path.name for path in removed] == ["step-00000004", "step-00000001"]
    assert names(tmp_path) == ["step-00000002", "step-00000005", "step-00000030"]
    assert prune(tmp_path, keep=3) == []


@pytest.mark.parametrize("keep", [1, 2])
def test_the_newest_valid_one_is_never_removed(tmp_path: Path, keep: int):
    for step in (1, 2, 3, 4, 5):
        save(tmp_path, step)
    flip(tmp_path / "step-00000005")
    flip(tmp_path / "step-00000004")
    (tmp_path / "step-00000003" / "manifest.json").unlink()
    prune(tmp_path, keep=keep)
    kept = ["step-00000001", "step-00000002"][-keep:]
    assert names(tmp_path) == [*kept, "step-00000003", "step-00000004", "step-00000005"]
    assert newest_valid(tmp_path, lambda text: None) == tmp_path / "step-00000002"


def test_if_all_are_damaged_none_is_removed(tmp_path: Path):
    for step in (1, 2, 3):
        flip(save(tmp_path, step))
    assert prune(tmp_path, keep=1) == []


def test_damaged_ones_go_when_they_are_old(tmp_path: Path):
    flip(save(tmp_path, 1))
    save(tmp_path, 2)
    assert [path.name for path in prune(tmp_path, keep=1)] == ["step-00000001"]


def test_to_keep_none_is_refused(tmp_path: Path):
    save(tmp_path, 1)
    with pytest.raises(CheckpointError, match="at least one"):
        prune(tmp_path, keep=0)


def test_a_link_is_not_pruned(tmp_path: Path):
    elsewhere = save(tmp_path / "elsewhere", 1)
    checkpoints = tmp_path / "checkpoints"
    save(checkpoints, 2)
    (checkpoints / "step-00000001").symlink_to(elsewhere)
    assert prune(checkpoints, keep=1) == []
    assert tag_of(elsewhere) == 1


def test_nothing_is_deleted_through_a_link(tmp_path: Path):
    """An archive can bring a run whose `checkpoints` is a link to another run's."""
    real = tmp_path / "real"
    for step in (1, 2, 3):
        save(real, step, step)
    part_folder(real, 4, "dead").mkdir()
    before = names(real)
    link = tmp_path / "run" / "checkpoints"
    link.parent.mkdir()
    link.symlink_to(real, target_is_directory=True)
    for delete in (lambda: prune(link, keep=1), lambda: remove_leftovers(link)):
        with pytest.raises(CheckpointError) as raised:
            delete()
        assert str(real) in str(raised.value)
    assert names(real) == before
    assert newest_valid(link, no_warnings) == link / "step-00000003"  # reading is harmless
