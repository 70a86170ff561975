"""The manifest of a checkpoint: lists every file, tensor and range, and is written last.

Everything that comes from a disk or a worker is checked here before it is used: plain file names,
known dtypes, ranges that tile each tensor exactly and fit into their files.
Knows no torch, so that the driver can commit and verify checkpoints without loading it.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec

from smolrun.errors import CheckpointError

MANIFEST_FILE = "manifest.json"
FORMAT = "smolrun-checkpoint"
VERSION = 1
# A thousand times what a model of 100 tensors on 2 ranks needs.
MAX_MANIFEST_BYTES = 64 << 20
# Bytes of one element, by safetensors' names.
ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "C64": 8,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
MAX_KEY_LENGTH = 1000
MAX_DIMS = 8

# The only names a checkpoint's files can have: no folder, no "..", no drive letter fits in here.
_FILE_NAME = re.compile(r"rank(\d{1,6})-\d{1,6}\.safetensors", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)


class FileEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One file: its size and the sha256 of its bytes, in hex."""

    bytes: int
    sha256: str


class SliceEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Elements [start, stop) of a flattened tensor: in which file, under which name there."""

    file: str
    name: str
    start: int
    stop: int


class TensorEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One tensor: its dtype as safetensors names it, its global shape, its slices by start."""

    dtype: str
    shape: list[int]
    pieces: list[SliceEntry]

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)


class Report(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The report of one rank: what it wrote."""

    rank: int
    files: dict[str, FileEntry]
    tensors: dict[str, TensorEntry]


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A whole checkpoint. `state` is JSON that its writer understands; `created` is ISO time."""

    format: str = FORMAT
    version: int = VERSION
    step: int
    run_id: str
    config_hash: str
    world_size: int
    created: str
    files: dict[str, FileEntry]
    tensors: dict[str, TensorEntry]
    state: dict[str, Any]

    @property
    def num_bytes(self) -> int:
        """Of all files, the manifest not counted."""
        return sum(entry.bytes for entry in self.files.values())

    def to_bytes(self) -> bytes:
        """JSON, one key a line, so that people can read it."""
        plain = msgspec.to_builtins(self)
        return (json.dumps({**plain, "sha256": hash_of(plain)}, indent=1) + "\n").encode()

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> Manifest:
        """What `to_bytes` made, checked; CheckpointError names `where` and what is wrong."""
        if len(data) > MAX_MANIFEST_BYTES:
            raise CheckpointError(f"{where}: {len(data):,} bytes are more than a manifest may have")
        try:
            found = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{where}: no JSON: {error}") from None
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise CheckpointError(f"{where}: no manifest of a smolrun checkpoint")
        if found.get("version") != VERSION:
            raise CheckpointError(
                f"{where}: format version {found.get('version')!r}, this smolrun reads {VERSION}"
            )
        if found.pop("sha256", None) != hash_of(found):
            raise CheckpointError(f"{where}: it was changed after it was written")
        try:
            manifest = msgspec.convert(found, cls)
        except (msgspec.ValidationError, RecursionError) as error:
            raise CheckpointError(f"{where}: {error}") from None
        manifest.check(where)
        return manifest

    def check(self, where: str) -> None:
        """Raises CheckpointError if anything in it cannot be true."""
        if self.step < 0 or self.world_size < 1:
            raise CheckpointError(f"{where}: step {self.step} of {self.world_size} ranks cannot be")
        check_tensors(self.files, self.tensors, where)


def hash_of(plain: Mapping[str, Any]) -> str:
    """Of a manifest's content, however it is laid out."""
    try:
        text = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    except RecursionError:
        return ""
    return hashlib.sha256(text.encode()).hexdigest()


def merge(
    reports: Sequence[Mapping[str, Any]],
    *,
    step: int,
    run_id: str,
    config_hash: str,
    world_size: int,
    state: Mapping[str, Any],
) -> Manifest:
    """One manifest of what all ranks reported; CheckpointError where they do not fit together.

    Pieces of a key may come from several ranks; together they must tile the tensor exactly.
    """
    files: dict[str, FileEntry] = {}
    tensors: dict[str, TensorEntry] = {}
    ranks: set[int] = set()
    for given in reports:
        report = read_report(given)
        where = f"the report of rank {report.rank}"
        if report.rank in ranks or not 0 <= report.rank < world_size:
            raise CheckpointError(f"{where} came twice, or is of a rank that does not exist")
        ranks.add(report.rank)
        files.update(report.files)
        for key, tensor in report.tensors.items():
            tensors[key] = _joined(tensors.get(key), tensor, f"{where}: {key}")
    manifest = Manifest(
        step=step,
        run_id=run_id,
        config_hash=config_hash,
        world_size=world_size,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        files=files,
        tensors=tensors,
        state=dict(state),
    )
    manifest.check(f"the checkpoint of step {step}")
    return manifest


def read_report(given: Mapping[str, Any]) -> Report:
    """The decoded report of a rank; CheckpointError if it is damaged, or names a file of another
    rank."""
    try:
        report = msgspec.convert(dict(given), Report)
    except (msgspec.ValidationError, TypeError, ValueError) as error:
        raise CheckpointError(f"a report of a rank's saved files is damaged: {error}") from None
    check_files(report.files, f"the report of rank {report.rank}")
    for name in report.files:
        if not is_file_of(report.rank, name):
            raise CheckpointError(f"{name} is not a file of rank {report.rank}")
    return report


def _joined(known: TensorEntry | None, new: TensorEntry, where: str) -> TensorEntry:
    """Both entries' pieces in the order of their ranges."""
    pieces = new.pieces
    if known is not None:
        if (known.dtype, known.shape) != (new.dtype, new.shape):
            raise CheckpointError(
                f"{where} is {new.dtype} {new.shape}, another rank says {known.dtype} {known.shape}"
            )
        pieces = known.pieces + new.pieces
    return TensorEntry(new.dtype, new.shape, sorted(pieces, key=lambda piece: piece.start))


def is_file_of(rank: int, name: str) -> bool:
    """Whether this can be the name of a file that this rank wrote."""
    match = _FILE_NAME.fullmatch(name)
    return match is not None and match[1] == str(rank)


def check_files(files: Mapping[str, FileEntry], where: str) -> None:
    """Raises CheckpointError naming `where` and the first file that cannot be true."""
    for name, file in files.items():
        if not _FILE_NAME.fullmatch(name):
            raise CheckpointError(f"{where}: {name[:100]!r} is not the name of a checkpoint file")
        if file.bytes < 0 or not _SHA256.fullmatch(file.sha256):
            raise CheckpointError(f"{where}: {name} has an impossible size or hash")


def check_tensors(
    files: Mapping[str, FileEntry], tensors: Mapping[str, TensorEntry], where: str
) -> None:
    """Raises CheckpointError naming `where` and the first file or tensor that cannot be true."""
    check_files(files, where)
    used: set[tuple[str, str]] = set()
    bytes_in: dict[str, int] = dict.fromkeys(files, 0)
    for key, tensor in tensors.items():
        _check_tensor(key, tensor, f"{where}: {key[:100]!r}")
        for piece in tensor.pieces:
            if piece.file not in files:
                raise CheckpointError(f"{where}: {key!r} lies in {piece.file!r}, a file not listed")
            if (piece.file, piece.name) in used:
                raise CheckpointError(f"{where}: {piece.name!r} of {piece.file} is used twice")
            used.add((piece.file, piece.name))
            bytes_in[piece.file] += (piece.stop - piece.start) * ITEM_BYTES[tensor.dtype]
    for name, num_bytes in bytes_in.items():
        if num_bytes > files[name].bytes:
            raise CheckpointError(
                f"{where}: {name} has {files[name].bytes:,} bytes, its tensors need {num_bytes:,}"
            )


def _check_tensor(key: str, tensor: TensorEntry, where: str) -> None:
    if not 0 < len(key) <= MAX_KEY_LENGTH:
        raise CheckpointError(f"{where}: a key has 1 to {MAX_KEY_LENGTH} characters")
    if tensor.dtype not in ITEM_BYTES:
        raise CheckpointError(f"{where}: dtype {tensor.dtype[:40]!r} is not known")
    if len(tensor.shape) > MAX_DIMS or any(size < 0 for size in tensor.shape):
        raise CheckpointError(f"{where}: shape {list(tensor.shape)[:20]} is impossible")
    reached = 0
    for piece in tensor.pieces:
        if piece.start != reached or piece.stop <= piece.start:
            raise CheckpointError(
                f"{where}: its pieces do not fit together: after element {reached:,} comes the "
                f"range {piece.start:,} to {piece.stop:,}"
            )
        reached = piece.stop
    if reached != tensor.num_elements:
        raise CheckpointError(
            f"{where}: its pieces hold {reached:,} elements, its shape {list(tensor.shape)} has "
            f"{tensor.num_elements:,}"
        )
