"""The idx format of MNIST and its relatives: a small header and bytes, plain or gzipped.

    00 00 08 nn | nn sizes, 4 bytes each, highest first | the bytes      08: unsigned bytes

Every number of a file is checked against the file before memory is taken for it.
Source: LeCun's description of the MNIST files.
"""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path
from typing import BinaryIO, cast

import numpy

from smolrun.errors import DataError

_BYTES = 0x08
_LARGEST = 1 << 31  # bytes: more is no picture set that fits this in-memory way


def read_idx(path: Path, dims: int) -> numpy.ndarray:
    """The uint8 array of `dims` dimensions in a file; raises DataError if it is anything else."""
    try:
        with open(path, "rb") as raw:
            is_packed = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            if not is_packed:
                return _read(raw, path, dims)
            with gzip.open(raw) as unpacked:
                return _read(cast(BinaryIO, unpacked), path, dims)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is damaged: {error}; get the file again") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from None


def _read(file: BinaryIO, path: Path, dims: int) -> numpy.ndarray:
    header = file.read(4 + 4 * dims)
    if header[:4] != bytes([0, 0, _BYTES, dims]):
        raise DataError(
            f"{path} is not an idx file of bytes in {dims} dimensions: it begins with "
            f"{header[:4].hex(' ') or 'nothing'}, expected 00 00 08 {dims:02x}"
        )
    shape = tuple(int.from_bytes(header[at : at + 4], "big") for at in range(4, len(header), 4))
    if len(header) < 4 + 4 * dims or not 0 < math.prod(shape) <= _LARGEST:
        raise DataError(f"{path} is damaged: it says it holds {' x '.join(map(str, shape))} bytes")
    data = file.read(math.prod(shape) + 1)
    if len(data) != math.prod(shape):
        held = f"{len(data):,}" if len(data) < math.prod(shape) else "more"
        raise DataError(
            f"{path} is damaged: it says {' x '.join(map(str, shape))} bytes but holds {held}; "
            "get the file again"
        )
    return numpy.frombuffer(data, numpy.uint8).reshape(shape)
