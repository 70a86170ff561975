"""Gradients in fewer bits: a flat tensor is encoded as one flat uint8 tensor, and decoded.

    int8    [ a scale per block, float32 | one byte per number ]      1 + 4/block bytes per number
    fp16    [ one scale                  | float16             ]      2
    bf16    [ bfloat16 ]                                              2
    none    [ the tensor's own bytes ]                                4 for float32

A block of int8 is cut into 127 equal steps each way of its largest number, so no number is off by
more than half a step. fp16 brings the largest to 2^15 by a power of two first, so that a sum over
many samples cannot overflow. What is not finite stays so (in int8: its whole block), so the
rank that decodes decides as the one that encoded. The bytes depend on nothing but the numbers.

`ErrorFeedback` adds what rounding took away to the next tensor: nothing is lost, only late.
Knows nothing of ranks.

Source: Dettmers, "8-Bit Approximations for Parallelism in Deep Learning", 2016 (blockwise scales in
Dettmers et al., "8-bit Optimizers via Block-wise Quantization", 2022); Seide et al., "1-Bit
Stochastic Gradient Descent", 2014 (error feedback)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# Numbers that go through all steps at one time: small enough for a core's own cache, and below what
# torch would share among threads.
_PIECE = 32 * 1024
_ALIGNED = 8  # a wire's size is a multiple of it, so that any number of wires may lie in a row


class Quantizer(ABC):
    """Both ways of one format. Tensors are flat, contiguous and on the CPU; numbers are float32 or
    float64."""

    @abstractmethod
    def wire_bytes(self, numel: int, dtype: torch.dtype = torch.float32) -> int:
        """Bytes of so many numbers when encoded; 0 for none."""

    def encode(
        self, flat: Tensor, wire: Tensor | None = None, lost: Tensor | None = None
    ) -> Tensor:
        """The encoded uint8 tensor, in `wire` if given; what rounding took away goes into
        `lost`, which may be `flat` itself."""
        if wire is None:
            wire = torch.empty(self.wire_bytes(flat.numel(), flat.dtype), dtype=torch.uint8)
        self.write(flat, wire, lost)
        return wire

    @abstractmethod
    def write(self, flat: Tensor, wire: Tensor, lost: Tensor | None) -> None:
        """Encodes into `wire`."""

    @abstractmethod
    def decode(self, wire: Tensor, into: Tensor, *, adds: bool = False) -> None:
        """Puts the numbers into a tensor of as many, or adds them to what is there."""


@dataclass(frozen=True)
class Quantization:
    """What group `quantization` says."""

    kind: str = "none"
    block: int = 256  # numbers that share a scale, for int8
    error_feedback: bool = True

    @property
    def is_none(self) -> bool:
        """Whether numbers are sent as they are."""
        return self.kind == "none"

    def working_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """What numbers of this type must become before they are encoded: formats need the digits of
        float32 at least, but as they are all can travel."""
        return torch.float32 if dtype.itemsize < 4 and not self.is_none else dtype

    def quantizer(self) -> Quantizer:
        """The format of that kind."""
        if self.kind == "int8":
            return Int8(self.block)
        if self.is_none:
            return AsIs()
        return Half({"fp16": torch.float16, "bf16": torch.bfloat16}[self.kind])


NO_QUANTIZATION = Quantization()


class AsIs(Quantizer):
    """No quantization: the tensor's own bytes."""

    def wire_bytes(self, numel: int, dtype: torch.dtype = torch.float32) -> int:
        return _aligned(numel * dtype.itemsize)

    def write(self, flat: Tensor, wire: Tensor, lost: Tensor | None) -> None:
        wire[: flat.nbytes].view(flat.dtype).copy_(flat)
        wire[flat.nbytes :].zero_()
        if lost is not None:
            lost.zero_()

    def decode(self, wire: Tensor, into: Tensor, *, adds: bool = False) -> None:
        _put(wire[: into.nbytes].view(into.dtype), into, adds)


class Half(Quantizer):
    """Half precision, `dtype` is float16 or bfloat16."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._start = _ALIGNED if dtype is torch.float16 else 0  # where the numbers begin

    def wire_bytes(self, numel: int, dtype: torch.dtype = torch.float32) -> int:
        return _aligned(self._start + 2 * numel) if numel else 0

    def write(self, flat: Tensor, wire: Tensor, lost: Tensor | None) -> None:
        numbers, scale = self._numbers(wire, flat.numel()), 1.0
        wire[self._start + 2 * flat.numel() :].zero_()
        if self._start and len(flat):
            scale = _power_of_two(flat)
            wire[: self._start].view(torch.float64).fill_(scale)
        for part in _pieces(flat.numel(), _PIECE):
            small = flat[part] / scale if scale != 1.0 else flat[part]
            numbers[part] = small
            if lost is not None:
                torch.sub(flat[part], numbers[part].to(flat.dtype) * scale, out=lost[part])

    def decode(self, wire: Tensor, into: Tensor, *, adds: bool = False) -> None:
        scale = wire[: self._start].view(torch.float64).item() if self._start and len(into) else 1.0
        numbers = self._numbers(wire, into.numel())
        for part in _pieces(into.numel(), _PIECE):
            whole = numbers[part].to(into.dtype)
            _put(whole * scale if scale != 1.0 else whole, into[part], adds)

    def _numbers(self, wire: Tensor, numel: int) -> Tensor:
        return wire[self._start : self._start + 2 * numel].view(self._dtype)


class Int8(Quantizer):
    """One byte per number, one float32 scale per `block` numbers; the last block may be shorter."""

    def __init__(self, block: int) -> None:
        self.block = block
        self._piece = max(1, _PIECE // block) * block

    def wire_bytes(self, numel: int, dtype: torch.dtype = torch.float32) -> int:
        return _aligned(4 * self._blocks(numel) + numel)

    def write(self, flat: Tensor, wire: Tensor, lost: Tensor | None) -> None:
        """ValueError for numbers with fewer bits: their largest could be rounded to
        128 steps, which an int8 takes for -128."""
        if flat.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"int8 is made of float32 or float64, not of {flat.dtype}")
        scales, steps = self._parts(wire, flat.numel())
        wire[4 * len(scales) + flat.numel() :].zero_()
        scratch = torch.empty(min(flat.numel(), self._piece), dtype=flat.dtype)
        for part, blocks, shape in self._rows(flat.numel()):
            row, rounded = flat[part].view(shape), scratch[: part.stop - part.start].view(shape)
            largest = torch.abs(row, out=rounded).amax(1, keepdim=True)
            scale = scales[blocks].view(-1, 1)
            scale.copy_(largest / 127)
            # So small that 1/scale would not be finite: the block is zeros.
            scale.masked_fill_(scale < torch.finfo(torch.float32).tiny, 0.0)
            whole = scale.to(flat.dtype)
            torch.mul(row, torch.where(whole == 0, whole, 1 / whole), out=rounded)
            steps[part].view(shape).copy_(rounded.round_())
            if lost is not None:
                torch.sub(row, rounded.mul_(whole), out=lost[part].view(shape))

    def decode(self, wire: Tensor, into: Tensor, *, adds: bool = False) -> None:
        scales, steps = self._parts(wire, into.numel())
        scratch = torch.empty(min(into.numel(), self._piece), dtype=into.dtype)
        for part, blocks, shape in self._rows(into.numel()):
            target = into[part].view(shape)
            whole = scratch[: part.stop - part.start].view(shape) if adds else target
            whole.copy_(steps[part].view(shape)).mul_(scales[blocks].view(-1, 1).to(into.dtype))
            if adds:
                target.add_(whole)

    def _blocks(self, numel: int) -> int:
        return -(-numel // self.block)

    def _parts(self, wire: Tensor, numel: int) -> tuple[Tensor, Tensor]:
        """The scales and the steps of a wire."""
        end = 4 * self._blocks(numel)
        return wire[:end].view(torch.float32), wire[end : end + numel].view(torch.int8)

    def _rows(self, numel: int) -> Iterator[tuple[slice, slice, tuple[int, int]]]:
        """Pieces of whole blocks, at last the block that is shorter: numbers, their blocks, and how
        they are seen as rows."""
        whole = numel - numel % self.block
        for part in _pieces(whole, self._piece):
            blocks = slice(part.start // self.block, part.stop // self.block)
            yield part, blocks, (-1, self.block)
        if whole < numel:
            yield slice(whole, numel), slice(whole // self.block, None), (1, numel - whole)


class ErrorFeedback:
    """What rounding has taken from one flat tensor, to be added to the next one.

    A step may send several times; `settle` says at its end whether the step counted. If not, the
    residual is what it was before the step.
    """

    def __init__(self, numel: int, dtype: torch.dtype = torch.float32) -> None:
        self.residual = torch.zeros(numel, dtype=dtype)
        self._pending = torch.zeros(numel, dtype=dtype)
        self._is_open = False  # the pending one is of a step that is not settled

    def take(self) -> tuple[Tensor, Tensor]:
        """What to add to the tensor that is sent next, and where to write all that its rounding
        takes away; these may be the same memory."""
        source = self._pending if self._is_open else self.residual
        self._is_open = True
        return source, self._pending

    def encode(self, flat: Tensor, quantizer: Quantizer) -> Tensor:
        """The wire of `flat` and the residual together."""
        source, lost = self.take()
        return quantizer.encode(flat + source, lost=lost)

    def settle(self, is_kept: bool) -> None:
        """Ends a step; whatever it sent has been sent."""
        if self._is_open and is_kept:
            self.residual, self._pending = self._pending, self.residual
        self._is_open = False

    def after(self, is_kept: bool) -> Tensor:
        """What the residual will be if the step under way is settled so."""
        return self._pending if self._is_open and is_kept else self.residual


def _aligned(size: int) -> int:
    return -(-size // _ALIGNED) * _ALIGNED


def _pieces(numel: int, size: int) -> Iterator[slice]:
    for start in range(0, numel, size):
        yield slice(start, min(start + size, numel))


def _put(numbers: Tensor, into: Tensor, adds: bool) -> None:
    if adds:
        into.add_(numbers)
    else:
        into.copy_(numbers)


def _power_of_two(flat: Tensor) -> float:
    """What to divide by so that the largest number is a little below 2^15; 1 where there is none
    or it is not finite."""
    largest = flat.abs().max()
    if not torch.isfinite(largest) or largest == 0:
        return 1.0
    exponent = int(torch.frexp(largest).exponent) - 15
    # Of float32 numbers; beyond it a power of two has no inverse that is finite.
    return 2.0 ** max(-126, min(126, exponent))
