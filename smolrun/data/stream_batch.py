"""A rank's batches out of the rows of a stream, as they came over the wire.

Shape suffixes: B batch, T tokens.
"""

from __future__ import annotations

import numpy
import torch

from smolrun.data.base import Batch
from smolrun.errors import DataError


def token_batch(rows: bytes, sequence_length: int) -> Batch:
    """Rows of T + 1 little-endian int32, one after the other, as inputs and targets [B, T]."""
    width = sequence_length + 1
    if len(rows) % (4 * width):
        raise DataError(f"{len(rows)} bytes of the stream are no rows of {width} tokens")
    window = numpy.frombuffer(rows, "<i4").reshape(-1, width).astype(numpy.int64)
    window_BT = torch.from_numpy(window)
    return Batch(window_BT[:, :-1].contiguous(), window_BT[:, 1:].contiguous())
