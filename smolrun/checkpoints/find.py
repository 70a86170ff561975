"""The checkpoints of a run, and verifying them before anything is loaded.

Knows no torch. A checkpoint exists only if its manifest verifies.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path

import msgspec

from smolrun.checkpoints.manifest import ITEM_BYTES, MANIFEST_FILE, MAX_MANIFEST_BYTES, Manifest
from smolrun.errors import CheckpointError

CHECKPOINTS = "checkpoints"
OLD = ".old"
STEP_FOLDER = re.compile(r"step-(\d{8,})(?:\.old)?", re.ASCII)


class _HeaderLine(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One tensor in the header of a safetensors file."""

    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


def checkpoints_in(checkpoints: Path) -> list[tuple[int, Path]]:
    """(step, folder) of all checkpoint folders, newest step first."""
    found = []
    for path in checkpoints.iterdir() if checkpoints.is_dir() else ():
        match = STEP_FOLDER.fullmatch(path.name)
        if match and path.is_dir():
            found.append((int(match[1]), path))
    # One that is being replaced comes after the one that replaces it.
    return sorted(found, key=lambda item: (-item[0], item[1].name))


def newest_valid(checkpoints: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest checkpoint whose manifest, sizes and hashes are right, or None.

    Damaged ones are skipped, each reported by `warn` with the reason.
    """
    for _, folder in checkpoints_in(checkpoints):
        try:
            verify(folder)
        except CheckpointError as error:
            warn(f"{error}; this checkpoint is skipped")
        else:
            return folder
    return None


def is_whole(folder: Path, *, hashes: bool) -> bool:
    """Whether a checkpoint verifies; without `hashes` by manifest and sizes alone."""
    try:
        check_files(folder, read_manifest(folder), hashes=hashes)
    except CheckpointError:
        return False
    return True


def verify(folder: Path) -> Manifest:
    """The manifest of a checkpoint whose every byte was compared with it; reads all files.

    Raises CheckpointError naming the file and what is wrong.
    """
    manifest = read_manifest(folder)
    check_files(folder, manifest, hashes=True)
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """The checked manifest of a folder; its files are not read."""
    path = folder / MANIFEST_FILE
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder")
    size = _size(path)
    if size > MAX_MANIFEST_BYTES:
        raise CheckpointError(f"{path}: {size:,} bytes are more than a manifest may have")
    try:
        return Manifest.from_bytes(path.read_bytes(), str(path))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None


def check_files(folder: Path, manifest: Manifest, *, hashes: bool) -> None:
    """Compare the files with the manifest: sizes, headers, and with `hashes` every byte."""
    contents: dict[str, dict[str, tuple[str, int]]] = {name: {} for name in manifest.files}
    for tensor in manifest.tensors.values():
        for piece in tensor.pieces:
            contents[piece.file][piece.name] = (tensor.dtype, piece.stop - piece.start)
    for name, entry in manifest.files.items():
        path = folder / name
        size = _size(path)
        if size != entry.bytes:
            raise CheckpointError(f"{path} has {size:,} bytes, {entry.bytes:,} were written")
        try:
            with open(path, "rb") as file:
                if hashes and hashlib.file_digest(file, "sha256").hexdigest() != entry.sha256:
                    raise CheckpointError(f"{path} is damaged: its bytes are not what was written")
                file.seek(0)
                _check_header(file.read, path, size, contents[name])
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None


def _size(path: Path) -> int:
    """The size of a regular file; links, folders and devices are refused."""
    try:
        found = os.lstat(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError(f"{path} is not a regular file, so it is not followed")
    return found.st_size


def _check_header(
    read: Callable[[int], bytes], path: Path, size: int, wanted: dict[str, tuple[str, int]]
) -> None:
    """A file's own header must match the manifest and fill the file exactly."""
    length = int.from_bytes(read(8), "little")
    # Our writer needs at most 12 characters for one of a name (JSON's escapes), and less than 256
    # for the rest of a line. The limit bounds the memory for a damaged header.
    most = 4096 + sum(12 * len(name) + 256 for name in wanted)
    if length > min(most, size - 8):
        raise CheckpointError(f"{path}: its header of {length:,} bytes is too long for its tensors")
    try:
        header = msgspec.convert(json.loads(read(length)), dict[str, _HeaderLine])
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path}: its header cannot be read") from None
    if header.keys() != wanted.keys():
        raise CheckpointError(f"{path}: it holds other tensors than the manifest lists")
    offset = 0
    for name, line in sorted(header.items(), key=lambda item: item[1].data_offsets):
        dtype, count = wanted[name]
        stop = offset + count * ITEM_BYTES[dtype]
        if line != _HeaderLine(dtype, [count], (offset, stop)):
            raise CheckpointError(f"{path}: {name[:100]!r} is not as the manifest says")
        offset = stop
    if 8 + length + offset != size:
        raise CheckpointError(f"{path}: it is longer than its tensors")
