"""Checkpoints made by somebody who wants our memory, our files, or to be believed: every hash is
right, the content lies."""

from __future__ import annotations

import hashlib
import json
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from smolrun.checkpoints.find import newest_valid, verify
from smolrun.checkpoints.reader import CheckpointReader
from smolrun.errors import CheckpointError
from tests.checkpoints.saves import save, sealed

FILE = "rank0-0.safetensors"
MOST_MEMORY = 64 << 20


def read_file(path: Path) -> tuple[Any, bytes]:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write_file(path: Path, header: bytes, data: bytes) -> None:
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)


def seal(folder: Path) -> None:
    """Makes sizes and hashes true again, so that only what is inside can give it away."""
    manifest = json.loads((folder / "manifest.json").read_bytes())
    for name, entry in manifest["files"].items():
        with open(folder / name, "rb") as file:
            entry["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
        entry["bytes"] = (folder / name).stat().st_size
    (folder / "manifest.json").write_bytes(sealed(manifest))


def change(**line: Any) -> Callable[[Path], None]:
    def lie(path: Path) -> None:
        header, data = read_file(path)
        for content in header.values():
            content.update(line)
        write_file(path, json.dumps(header).encode(), data)

    return lie


def overlapping(path: Path) -> None:
    header, data = read_file(path)
    header["twin"] = next(iter(header.values()))
    write_file(path, json.dumps(header).encode(), data)


def hidden_bytes(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"x" * 100)


def huge_header(path: Path) -> None:
    """100 MB that claim to be a table of contents; a hole, so that the disk does not mind."""
    header, data = read_file(path)
    write_file(path, json.dumps(header).encode(), data)
    with open(path, "r+b") as file:
        file.write((100 << 20).to_bytes(8, "little"))
    os.truncate(path, (100 << 20) + 500)


def raw(header: bytes) -> Callable[[Path], None]:
    return lambda path: write_file(path, header, b"\0" * 28)


ATTACKS: dict[str, Callable[[Path], None]] = {
    "another dtype": change(dtype="I32"),
    "another shape": change(shape=[1, 7]),
    "10^12 elements": change(shape=[10**6, 10**6]),
    "a shape that overflows": change(shape=[2**62, 4]),
    "ranges past the end": change(data_offsets=[0, 2**40]),
    "ranges before the start": change(data_offsets=[-8, 20]),
    "ranges as text": change(data_offsets=["0", "28"]),
    "unknown words": change(code="import os"),
    "two tensors in one place": overlapping,
    "hidden bytes": hidden_bytes,
    "a header of 100 MB": huge_header,
    "a header longer than the file": lambda path: path.write_bytes(b"\xff" * 100),
    "a header that is no JSON": raw(b"\x80\x04\x95."),
    "a header of brackets": raw(b"[" * 4000),
    "a header that is a list": raw(b"[]"),
    "an empty header": raw(b"{}"),
    "a zip": lambda path: path.write_bytes(b"PK\x03\x04" + b"\0" * 200),
    "seven bytes": lambda path: path.write_bytes(b"\0" * 7),
    "nothing": lambda path: path.write_bytes(b""),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_lying_file_is_refused_in_little_memory(tmp_path: Path, attack: str):
    good = save(tmp_path, 1)
    bad = save(tmp_path, 2)
    ATTACKS[attack](bad / FILE)
    seal(bad)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=FILE):
            CheckpointReader(bad)  # which reads no hashes
        with pytest.raises(CheckpointError, match=FILE):
            verify(bad)
        assert newest_valid(tmp_path, lambda text: None) == good
        assert tracemalloc.get_traced_memory()[1] < MOST_MEMORY
    finally:
        tracemalloc.stop()


def test_sealing_alone_changes_nothing(tmp_path: Path):
    bad = save(tmp_path, 2)
    header, data = read_file(bad / FILE)
    write_file(bad / FILE, json.dumps(header).encode(), data)
    seal(bad)
    verify(bad)


def test_an_endless_manifest_is_not_read(tmp_path: Path):
    folder = save(tmp_path, 1)
    os.truncate(folder / "manifest.json", 1 << 40)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match="more than a manifest may have"):
            verify(folder)
        assert tracemalloc.get_traced_memory()[1] < MOST_MEMORY
    finally:
        tracemalloc.stop()


def test_a_name_that_leads_out_is_never_opened(tmp_path: Path):
    folder = save(tmp_path / "checkpoints", 1)
    manifest = (folder / "manifest.json").read_text()
    for name in ("../../secret", "/etc/shadow", "rank0-0.safetensors/../../secret"):
        changed = json.loads(manifest.replace(FILE, name))
        (folder / "manifest.json").write_bytes(sealed(changed))
        with pytest.raises(CheckpointError, match="is not the name of a checkpoint file"):
            verify(folder)
