"""The folders of checkpoints: a save's unfinished folder becomes a checkpoint by one rename.

    step-00001200.part-<token>   being written; of a dead save: a leftover
    step-00001200                a checkpoint, whole
    step-00001200.old            one that is being replaced; counts until the new one is in place

Knows no torch, so that the driver can commit without loading it.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
from collections.abc import Collection
from pathlib import Path

from smolrun.checkpoints.find import OLD, STEP_FOLDER, checkpoints_in, is_whole
from smolrun.checkpoints.manifest import MANIFEST_FILE, MAX_MANIFEST_BYTES, Manifest
from smolrun.errors import CheckpointError

_TOKEN = re.compile(r"[A-Za-z0-9_-]{1,64}", re.ASCII)
_PART = re.compile(r"step-\d{8,}\.part-[A-Za-z0-9_-]{1,64}", re.ASCII)


def is_link(path: Path) -> bool:
    """Whether it is a symbolic link or a Windows junction: what is below it lies elsewhere."""
    try:
        found = os.lstat(path)
    except OSError:
        return False
    # Path.is_junction came with Python 3.12. Other reparse points, as of OneDrive, are plain files.
    junction = getattr(stat, "IO_REPARSE_TAG_MOUNT_POINT", -1)
    return stat.S_ISLNK(found.st_mode) or getattr(found, "st_reparse_tag", 0) == junction


def refuse_link(checkpoints: Path) -> None:
    """CheckpointError with the real path where deletion would leave the run's folder."""
    if is_link(checkpoints):
        raise CheckpointError(
            f"{checkpoints} is a link to {os.path.realpath(checkpoints)}, and nothing is deleted "
            "through a link"
        )


def step_folder(checkpoints: Path, step: int) -> Path:
    """Where the checkpoint of a step lies once it is whole."""
    return checkpoints / f"step-{step:08d}"


def part_folder(checkpoints: Path, step: int, token: str) -> Path:
    """Where all ranks write the checkpoint of a step; `token` is new for each attempt."""
    if not _TOKEN.fullmatch(token):
        raise CheckpointError(f"{token[:80]!r} cannot be the token of a checkpoint's folder")
    return checkpoints / f"step-{step:08d}.part-{token}"


def commit(part: Path, manifest: Manifest) -> Path:
    """Makes the unfinished folder a checkpoint, and returns its folder. Durable when it returns.

    A checkpoint of that step that is there already counts until the new one is in its place. Files
    that are missing or have another size raise CheckpointError; OSError passes.
    """
    for name, entry in manifest.files.items():
        size = (part / name).stat().st_size if (part / name).is_file() else None
        if size != entry.bytes:
            raise CheckpointError(
                f"{part / name} has {size} bytes, not {entry.bytes}: not committed"
            )
    content = manifest.to_bytes()
    if len(content) > MAX_MANIFEST_BYTES:
        raise CheckpointError(
            f"{len(content):,} bytes are more than a manifest may have: not committed"
        )
    with open(part / MANIFEST_FILE, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    _sync_folder(part)
    final = step_folder(part.parent, manifest.step)
    old = final.with_name(final.name + OLD)
    if final.exists():
        _remove(old)
        os.rename(final, old)
    os.rename(part, final)
    _sync_folder(final.parent)
    _sync_folder(final.parent.parent)  # knows of final.parent, if that is new
    if old.exists():
        _remove(old)
    return final


def abandon(part: Path) -> None:
    """Removes an unfinished folder, as far as the disk lets us."""
    shutil.rmtree(part, ignore_errors=True)


def prune(
    checkpoints: Path, *, keep: int, protect: Collection[int] = (), good: Path | None = None
) -> list[Path]:
    """Removes all but the newest `keep` whole checkpoints and those of the steps in `protect`.

    Damaged ones do not count as kept; they go when they are older than what is kept. The newest
    one that is kept has its hashes checked first, which reads it, so this may take seconds: the
    newest valid checkpoint is never removed. `good`, just written, is not checked. Returns the
    folders that are gone. CheckpointError if `checkpoints` is a link.
    """
    refuse_link(checkpoints)
    if keep < 1:
        raise CheckpointError(f"keep={keep}: at least one checkpoint has to be kept")
    found = checkpoints_in(checkpoints)
    if len(found) <= keep:
        return []
    kept = 0
    removed = []
    for step, folder in found:
        if kept < keep:
            # The first is the one a resume would take: it must be good, hashes and all.
            kept += is_whole(folder, hashes=kept == 0 and folder != good)
        elif step not in protect and not folder.is_symlink():
            _remove(folder)
            removed.append(folder)
    return removed


def leftovers(checkpoints: Path) -> list[Path]:
    """Folders of interrupted saves, which can be deleted while no save runs. CheckpointError if
    `checkpoints` is a link."""
    refuse_link(checkpoints)
    found = []
    for path in sorted(checkpoints.iterdir()) if checkpoints.is_dir() else []:
        is_replaced = STEP_FOLDER.fullmatch(path.name) and path.name.endswith(OLD)
        if is_replaced and not _replacing(path).exists():
            continue  # the new one never came
        if (is_replaced or _PART.fullmatch(path.name)) and not path.is_symlink():
            found.append(path)
    return found


def remove_leftovers(checkpoints: Path) -> list[Path]:
    """Remove the folders of interrupted saves, while no save runs. Returns them.

    A checkpoint that was being replaced goes back to its place if the new one never came.
    CheckpointError if `checkpoints` is a link.
    """
    refuse_link(checkpoints)
    for _, path in checkpoints_in(checkpoints):
        if path.name.endswith(OLD) and not _replacing(path).exists():
            os.rename(path, _replacing(path))
    found = leftovers(checkpoints)
    for path in found:
        if _PART.fullmatch(path.name):
            abandon(path)
        else:
            _remove(path)
    return found


def _replacing(old: Path) -> Path:
    return old.with_name(old.name.removesuffix(OLD))


def _remove(folder: Path) -> None:
    """Remove a checkpoint: renamed first, so that a partial folder never counts as one."""
    if not folder.exists():
        return
    doomed = folder.with_name(f"{folder.name.removesuffix(OLD)}.part-removed-{os.getpid()}")
    abandon(doomed)
    os.rename(folder, doomed)
    abandon(doomed)


def _sync_folder(folder: Path) -> None:
    """A rename is on the disk once its folder is."""
    if os.name == "nt":
        return  # Windows cannot open a folder; NTFS keeps its own journal of renames
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
