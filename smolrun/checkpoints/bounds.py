"""The checks of a manifest's files and tensors: nothing in them may point elsewhere or lie.

Knows no disk: what the files really hold is compared in find.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Protocol

from smolrun.errors import CheckpointError

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


class _File(Protocol):
    @property
    def bytes(self) -> int: ...
    @property
    def sha256(self) -> str: ...


class _Piece(Protocol):
    @property
    def file(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def start(self) -> int: ...
    @property
    def stop(self) -> int: ...


class _Tensor(Protocol):
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> Sequence[int]: ...
    @property
    def pieces(self) -> Sequence[_Piece]: ...
    @property
    def num_elements(self) -> int: ...


def is_file_of(rank: int, name: str) -> bool:
    """Whether this can be the name of a file that this rank wrote."""
    match = _FILE_NAME.fullmatch(name)
    return match is not None and match[1] == str(rank)


def check_files(files: Mapping[str, _File], where: str) -> None:
    """Raises CheckpointError naming `where` and the first file that cannot be true."""
    for name, file in files.items():
        if not _FILE_NAME.fullmatch(name):
            raise CheckpointError(f"{where}: {name[:100]!r} is no name of a checkpoint's file")
        if file.bytes < 0 or not _SHA256.fullmatch(file.sha256):
            raise CheckpointError(f"{where}: {name} has an impossible size or hash")


def check_tensors(files: Mapping[str, _File], tensors: Mapping[str, _Tensor], where: str) -> None:
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


def _check_tensor(key: str, tensor: _Tensor, where: str) -> None:
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
