"""Tensors as bytes and back, without copying and without pickle: a closed table of dtypes and views
of storage.

Knows nothing of frames or sockets.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from smolrun.errors import ProtocolError

# The code of a dtype is its place on the wire: append only.
_DTYPES: tuple[torch.dtype, ...] = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int8,
    torch.uint8,
    torch.bool,
)
_CODES = {dtype: code for code, dtype in enumerate(_DTYPES)}
ITEM_SIZES: tuple[int, ...] = tuple(dtype.itemsize for dtype in _DTYPES)


def dtype_code(dtype: torch.dtype) -> int:
    """The wire code of `dtype`; raises ProtocolError for a dtype that does not travel."""
    code = _CODES.get(dtype)
    if code is None:
        raise ProtocolError(
            f"{dtype} does not travel; convert to one of {', '.join(str(d) for d in _DTYPES)}"
        )
    return code


def dtype_of(code: int) -> torch.dtype:
    """The dtype behind a wire code that was checked before."""
    return _DTYPES[code]


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """A writable byte view of a contiguous CPU tensor; it shares storage, so the tensor must
    outlive its use."""
    if not tensor.is_contiguous() or tensor.device.type != "cpu":
        raise ProtocolError(
            f"only contiguous CPU tensors travel, this one is on {tensor.device} "
            f"with strides {tensor.stride()}"
        )
    if tensor.numel() == 0:
        return memoryview(b"")
    # uint8 views exist for every dtype, also for bfloat16, which numpy does not know.
    array: npt.NDArray[np.uint8] = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    return array.data


def as_array(tensor: torch.Tensor) -> npt.NDArray[np.generic] | None:
    """A flat numpy view for arithmetic, or None where numpy has no fast arithmetic for the dtype
    (float16, bfloat16)."""
    if tensor.dtype in (torch.float16, torch.bfloat16):
        return None
    array: npt.NDArray[np.generic] = tensor.detach().reshape(-1).numpy()
    return array


class Payload(NamedTuple):
    """Memory that travels: its bytes, and what they mean."""

    data: memoryview
    dtype: int
    shape: tuple[int, ...]


def payload_of(tensor: torch.Tensor) -> Payload:
    """A contiguous CPU tensor as a payload that shares its storage."""
    return Payload(as_bytes(tensor), dtype_code(tensor.dtype), tuple(tensor.shape))
