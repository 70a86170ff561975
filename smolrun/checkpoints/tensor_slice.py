"""TensorSlice: what one rank holds of one tensor, as a range of the flattened tensor."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from smolrun.errors import CheckpointError

# safetensors' names of the types a checkpoint may hold.
NAME_OF_DTYPE = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPE_OF_NAME = {name: dtype for dtype, name in NAME_OF_DTYPE.items()}

# Who writes elements: this rank, another one, or any of the ranks, which all have them.
Writer = Literal["this", "other", "any"]


@dataclass(frozen=True)
class TensorSlice:
    """Elements [start, stop) of the tensor `key`, whose global shape is `shape`.

    `values` may be flat or shaped, on any device; nothing is copied here. A rank that holds no
    element of a tensor may give an empty slice, or none.
    """

    key: str
    shape: tuple[int, ...]
    start: int
    values: torch.Tensor
    writer: Writer = "this"

    @classmethod
    def whole(cls, key: str, values: torch.Tensor, writer: Writer = "any") -> TensorSlice:
        """All elements of a tensor."""
        return cls(key, tuple(values.shape), 0, values.detach(), writer)

    def __post_init__(self) -> None:
        if not self.key:
            raise CheckpointError("a slice of a checkpoint needs a key")
        if self.values.dtype not in NAME_OF_DTYPE:
            raise CheckpointError(f"{self.key}: {self.values.dtype} cannot be saved")
        whole = math.prod(self.shape)
        if not 0 <= self.start <= self.stop <= whole or min(self.shape, default=0) < 0:
            raise CheckpointError(
                f"{self.key}: elements {self.start} to {self.stop} do not lie in a tensor of "
                f"shape {list(self.shape)}"
            )

    @property
    def stop(self) -> int:
        """One past the last element of this slice."""
        return self.start + self.values.numel()

    @property
    def dtype_name(self) -> str:
        """As safetensors names it: F32, BF16, ..."""
        return NAME_OF_DTYPE[self.values.dtype]

    @property
    def num_bytes(self) -> int:
        return self.values.numel() * self.values.element_size()
