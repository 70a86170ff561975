"""Weights in 8 or 4 bits: how they are stored, made from others, and multiplied.

    int8   weight int8 [O, I], scales bf16 [O]                      w = code * scale
    int4   weight uint8 [O, I / 2], scales and zeros bf16 [O, G]    w = (code - 8) * scale + zero

A row of O has one scale in int8; in int4 each of its G groups of columns has a scale and a zero,
and a byte has two codes, the even column in its low half (as in MLX's files). Only weights are
quantized: inputs and outputs stay bf16. Knows nothing of models.
Source: arXiv:2208.07339 (rows), 2306.00978 (groups); MLX's affine quantization.
Shape suffixes: O outputs, I inputs, G groups of inputs, T rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from smolrun.errors import ConfigError

# Rows that are converted at once: temporaries stay small beside a matrix of a large model.
_BLOCK_ROWS = 1024
# Weights that are converted at once in a product, so that they stay in a processor's cache.
_BLOCK_WEIGHTS = 1 << 18
# From so many rows on it takes less time to convert the weights to bf16, once for all rows, than to
# use torch's kernels, whose time grows with the rows. On an x86 processor with AMX, [3072, 576]:
# 1 row 0.09 ms, 16 rows 0.8 (int8) and 0.7 (int4), 256 rows 12; converted about 1.0 and 3.5.
_MANY_ROWS_INT8, _MANY_ROWS_INT4 = 20, 80
_PACKED_ROWS = 64  # torch's packing of 4 bits is made of blocks of so many rows, or of fewer


def quantize_int8(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [O, I] and scales [O]. ConfigError where a weight is not finite."""
    codes, scales = [], []
    for block in weight_OI.split(_BLOCK_ROWS):
        values = block.float()
        scale = _nonzero(_finite(values.abs().amax(1)) / 127).bfloat16()
        # The codes are of the rounded scale; the largest may then be 127.4 of it.
        code = (values / scale.float()[:, None]).round_().clamp_(-127, 127)
        codes.append(code.to(torch.int8))
        scales.append(scale)
    return torch.cat(codes), torch.cat(scales)


def quantize_int4(weight_OI: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [O, I / 2], scales and zeros [O, G]; `group_size` divides I. ConfigError where a weight
    is not finite."""
    found = [_int4_block(block, group_size) for block in weight_OI.split(_BLOCK_ROWS)]
    codes, scales, zeros = zip(*found, strict=True)
    return torch.cat(codes), torch.cat(scales), torch.cat(zeros)


def _int4_block(weight_OI: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    values = weight_OI.float().unflatten(1, (-1, group_size))
    lowest, highest = _finite(values.amin(-1)), _finite(values.amax(-1))
    scale = ((highest - lowest) / 15).bfloat16()
    zero = (lowest + 8 * scale.float()).bfloat16()
    code = (values - zero.float()[..., None]) / _nonzero(scale.float())[..., None]
    code = (code.round_() + 8).clamp_(0, 15).to(torch.uint8).flatten(1)
    return code[:, 0::2] | code[:, 1::2] << 4, scale, zero


def dequantize(codes: Tensor, scales: Tensor, zeros: Tensor | None = None) -> Tensor:
    """The weights [O, I] in float32."""
    if zeros is None:
        return codes.float() * scales.float()[:, None]
    halves = torch.stack((codes & 15, codes >> 4), -1).flatten(1).float() - 8
    groups: Tensor = halves.unflatten(1, (scales.shape[1], -1))
    return (groups * scales.float()[..., None] + zeros.float()[..., None]).flatten(1)


def from_mlx(weight: Tensor, scales: Tensor, biases: Tensor, bits: int) -> Tensor:
    """[O, I] in float32 of what mlx.core.quantize made: uint32 words, whose lowest bits are the
    first column; w = code * scale + bias."""
    if bits == 4:
        return dequantize(*int4_from_mlx(weight, scales, biases, torch.float32))
    codes = weight.contiguous().view(torch.uint8).float()
    groups: Tensor = codes.unflatten(1, (scales.shape[1], -1))
    return (groups * scales.float()[..., None] + biases.float()[..., None]).flatten(1)


def int4_from_mlx(
    weight: Tensor, scales: Tensor, biases: Tensor, dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and zeros of a matrix in MLX's 4 bits, with the same codes."""
    zeros = biases.float() + 8 * scales.float()
    return weight.contiguous().view(torch.uint8), scales.to(dtype), zeros.to(dtype)


def _finite(values: Tensor) -> Tensor:
    if not values.isfinite().all():
        raise ConfigError("has values that are not finite; serving.weights=float32 shows them")
    return values


def _nonzero(scales: Tensor) -> Tensor:
    return scales.masked_fill(scales == 0, 1.0)


class Int8Weight:
    """A matrix in int8; `product` of rows [T, I] in bf16 is x W^T, [T, O]."""

    def __init__(self, codes: Tensor, scales: Tensor) -> None:
        self._codes, self._scales = codes, scales
        self.has_kernel = _int8_kernel_works(codes.device.type)

    def product(self, inputs_TI: Tensor) -> Tensor:
        """By torch's kernel, or in blocks of rows of the matrix."""
        if self.has_kernel and len(inputs_TI) < _MANY_ROWS_INT8:
            return torch._weight_int8pack_mm(inputs_TI, self._codes, self._scales)
        blocks = self._codes.split(max(1, _BLOCK_WEIGHTS // inputs_TI.shape[1]))
        outputs = [F.linear(inputs_TI, block.to(inputs_TI.dtype)) for block in blocks]
        return torch.cat(outputs, 1) * self._scales

    def rows(self, ids_T: Tensor) -> Tensor:
        """Rows of the matrix in bf16."""
        return self._codes[ids_T].to(self._scales.dtype) * self._scales[ids_T, None]

    @property
    def nbytes(self) -> int:
        """Memory of the weights."""
        return self._codes.nbytes + self._scales.nbytes


class Int4Weight:
    """A matrix in int4; `product` of rows [T, I] in bf16 is x W^T, [T, O].

    Where torch has a kernel for the device the codes are kept in the order that the kernel wants.
    """

    def __init__(self, codes: Tensor, scales: Tensor, zeros: Tensor) -> None:
        self._num_outputs, self._group_size = len(codes), 2 * codes.shape[1] // scales.shape[1]
        self._kernel = _int4_kernel(codes.device.type)
        self.has_kernel = self._kernel is not None
        more = -len(codes) % _PACKED_ROWS if self._kernel is not None else 0
        scales_zeros = torch.stack((scales, zeros), -1)  # [O, G, 2]
        scales_zeros = F.pad(scales_zeros, (0, 0, 0, 0, 0, more)).transpose(0, 1).contiguous()
        self._scales_zeros = scales_zeros
        self._codes = codes
        if self._kernel is not None:
            self._codes = self._kernel.pack(F.pad(codes, (0, 0, 0, more)))

    def product(self, inputs_TI: Tensor) -> Tensor:
        """By torch's kernel, or in blocks of rows of the matrix."""
        kernel, num_rows = self._kernel, len(inputs_TI)
        if kernel is None:
            outputs_TO = self._plain_product(inputs_TI)
        elif kernel.row_order is not None and num_rows >= _MANY_ROWS_INT4:
            outputs_TO = self._unpacked_product(inputs_TI, kernel.row_order)
        else:
            outputs_TO = kernel.multiply(
                inputs_TI, self._codes, self._group_size, self._scales_zeros
            )
            return outputs_TO[:, : self._num_outputs]
        groups_TG: Tensor = inputs_TI.float().unflatten(1, (-1, self._group_size)).sum(-1)
        outputs_TO = outputs_TO + groups_TG @ self._scales_zeros[..., 1].float()
        return outputs_TO[:, : self._num_outputs].to(inputs_TI.dtype)

    def _plain_product(self, inputs_TI: Tensor) -> Tensor:
        """x W^T without the zeros: of the even columns, and of the odd ones."""
        dtype, halves = inputs_TI.dtype, (inputs_TI[:, 0::2], inputs_TI[:, 1::2])
        rows = max(1, 2 * _BLOCK_WEIGHTS // inputs_TI.shape[1])
        scales = self._scales_zeros[..., 0].T  # [O, G]
        outputs = []
        for block, scale in zip(self._codes.split(rows), scales.split(rows), strict=True):
            groups = block.unflatten(1, (scale.shape[1], -1))
            weights = [
                (_signed(half, dtype) * scale[..., None]).flatten(1)
                for half in (groups & 15, groups >> 4)
            ]
            products = map(F.linear, halves, weights)
            outputs.append(torch.stack(list(products)).sum(0, dtype=torch.float32))
        return torch.cat(outputs, 1)

    def _unpacked_product(self, inputs_TI: Tensor, order: Tensor) -> Tensor:
        """x W^T without the zeros, from codes in the kernel's order: blocks [I, B / 2] of B rows,
        two rows a byte."""
        num_inputs, size = inputs_TI.shape[1], len(order)
        codes = self._codes.view(-1, num_inputs, size // 2)
        scales = self._scales_zeros[..., 0].unflatten(1, (-1, size))[..., order]  # [G, blocks, B]
        scales = scales.transpose(0, 1).unsqueeze(2)
        outputs = []
        step = max(1, _BLOCK_WEIGHTS // (num_inputs * size))
        for block, scale in zip(codes.split(step), scales.split(step), strict=True):
            groups = block.unflatten(1, (scale.shape[1], -1))  # [blocks, G, I / G, B / 2]
            halves = zip((groups & 15, groups >> 4), scale.chunk(2, -1), strict=True)
            weights = [
                (_signed(half, inputs_TI.dtype) * part).flatten(1, 2) for half, part in halves
            ]
            outputs.append(torch.cat([inputs_TI @ weight for weight in weights], -1))
        found = torch.cat(outputs)[..., order.argsort()]  # [blocks, T, B]
        return found.transpose(0, 1).flatten(1).float()

    @property
    def nbytes(self) -> int:
        """Memory of the weights."""
        return self._codes.nbytes + self._scales_zeros.nbytes


def _signed(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """0 .. 15 as -8 .. 7; the detour by int8 is the fast one."""
    return (codes - 8).view(torch.int8).to(dtype)


@dataclass(frozen=True)
class _Int4Kernel:
    """How torch multiplies on a device. `row_order`: where the rows of a block are, of the low
    halves of its bytes and then of the high ones; None where that is not known."""

    pack: Callable[[Tensor], Tensor]  # of codes [O, I / 2], O a multiple of _PACKED_ROWS
    multiply: Callable[[Tensor, Tensor, int, Tensor], Tensor]
    row_order: Tensor | None = None


def _pack_on_cpu(codes: Tensor) -> Tensor:
    """In blocks of rows: torch wants 32 bits a code."""
    packed = []
    for block in codes.split(_BLOCK_ROWS):
        wide = torch.stack((block & 15, block >> 4), -1).flatten(1).int()
        packed.append(torch._convert_weight_to_int4pack_for_cpu(wide, 2))
    return torch.cat(packed)


def _pack_elsewhere(codes: Tensor) -> Tensor:
    """CUDA and MPS: the even column in the high half."""
    return torch._convert_weight_to_int4pack(codes << 4 | codes >> 4, 2)


@functools.cache
def _int8_kernel_works(device: str) -> bool:
    """Whether torch has a kernel for int8 there, and it is right."""
    codes, inputs = _probe(device)
    scales = torch.linspace(0.5, 1.0, len(codes), dtype=torch.bfloat16, device=device)
    expected = inputs.float() @ dequantize(codes.view(torch.int8), scales).T
    try:
        found = torch._weight_int8pack_mm(inputs, codes.view(torch.int8), scales)
    except (RuntimeError, AttributeError):
        return False
    return _is_close(found, expected)


@functools.cache
def _int4_kernel(device: str) -> _Int4Kernel | None:
    """torch's kernel for int4 there, if it has one, it is right, and made for this processor: what
    it does on others is several times slower than bf16."""
    kernel = _Int4Kernel(_pack_elsewhere, torch._weight_int4pack_mm)
    if device == "cpu":
        if not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
            return None
        kernel = _Int4Kernel(
            _pack_on_cpu, torch.ops.aten._weight_int4pack_mm_for_cpu, _row_order_on_cpu()
        )
    codes, inputs = _probe(device)
    scales = torch.linspace(0.5, 1.0, 8 * len(codes), dtype=torch.bfloat16, device=device)
    scales = scales.view(len(codes), -1)
    scales_zeros = torch.stack((scales, scales.flip(0)), -1).transpose(0, 1).contiguous()
    inputs = inputs.repeat(1, 2)
    expected = inputs.float() @ dequantize(codes, scales, scales.flip(0)).T
    try:
        found = kernel.multiply(inputs, kernel.pack(codes), 32, scales_zeros)
    except (RuntimeError, AttributeError):
        return None
    return kernel if _is_close(found, expected) else None


def _probe(device: str) -> tuple[Tensor, Tensor]:
    """Bytes [128, 128], and two rows for them."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (128, 128), generator=generator, dtype=torch.uint8)
    inputs = torch.randn((2, 128), generator=generator).bfloat16()
    return codes.to(device), inputs.to(device)


def _is_close(found: Tensor, expected: Tensor) -> bool:
    error = (found.float() - expected).norm() / expected.norm()
    return bool(error < 0.01)  # bf16 rounds to 0.002


def _row_order_on_cpu() -> Tensor | None:
    """What torch's packing does with the rows of a block, which depends on the processor: seen in
    how the numbers of the rows are packed. None if that is not as expected."""
    rows = torch.arange(_PACKED_ROWS)[:, None].expand(-1, 32)
    digits = [
        torch._convert_weight_to_int4pack_for_cpu(part.int().contiguous(), 2)
        for part in (rows % 16, rows // 16)
    ]
    for size in (16, 32, 64):
        low, high = (packed.view(-1, 32, size // 2) for packed in digits)
        found = torch.cat(((low & 15) + 16 * (high & 15), (low >> 4) + 16 * (high >> 4)), -1)
        order = found[0, 0].long()
        starts = torch.arange(0, _PACKED_ROWS, size)[:, None, None]
        is_permutation = torch.equal(order.sort()[0], torch.arange(size))
        if is_permutation and torch.equal(found.long(), (order + starts).expand_as(found)):
            return order
    return None
