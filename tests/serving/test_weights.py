"""Products of a stage's weights: every number of rows gives the same, by whatever routine."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from smolrun.errors import ConfigError
from smolrun.serving import weight_quantization
from smolrun.serving.weight_quantization import (
    Int4Weight,
    Int8Weight,
    dequantize,
    quantize_int4,
    quantize_int8,
)
from smolrun.serving.weights import Linear, QuantizedLinear

NUM_ROWS = (1, 2, 6, 7, 8, 31, 32, 33, 50)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("is_invariant", [False, True])
def test_products_equal_those_of_torch(
    dtype: torch.dtype, has_bias: bool, is_invariant: bool
) -> None:
    torch.manual_seed(0)
    weight = torch.randn(48, 40).to(dtype)
    bias = torch.randn(48).to(dtype) if has_bias else None
    linear = Linear(weight, bias, is_invariant=is_invariant)
    tolerance = 1e-5 if dtype == torch.float32 else 0.15
    for num_rows in NUM_ROWS:
        inputs = torch.randn(num_rows, 40).to(dtype)
        outputs = linear(inputs)
        exact = F.linear(inputs.double(), weight.double(), None if bias is None else bias.double())
        assert (outputs.dtype, outputs.shape) == (dtype, (num_rows, 48))
        assert outputs.is_contiguous()
        assert (outputs - exact).abs().max() < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_invariant_product_does_not_depend_on_other_rows(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    linear = Linear(torch.randn(480, 576).to(dtype), is_invariant=True)
    row = torch.randn(1, 576).to(dtype)
    expected = linear(row)
    for num_rows in NUM_ROWS:
        inputs = torch.randn(num_rows, 576).to(dtype)
        for place in {0, num_rows // 2, num_rows - 1}:
            inputs[place] = row[0]
            assert torch.equal(linear(inputs)[place], expected[0])


def test_memory_and_rows() -> None:
    weight = torch.arange(12.0).view(4, 3)
    assert Linear(weight).nbytes == 48
    assert Linear(weight, torch.zeros(4)).nbytes == 64
    assert Linear(weight).rows(torch.tensor([2, 0])).tolist() == [[6, 7, 8], [0, 1, 2]]


def of_four_bits(codes: torch.Tensor) -> Int4Weight:
    return Int4Weight(*quantize_int4(codes, 32))


@pytest.mark.parametrize("has_kernel", [True, False])
@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_products_are_those_of_their_values(
    bits: int, has_kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """[100, 96]: a number of rows that no block of a kernel divides."""
    if not has_kernel:  # as on a device where torch has none
        monkeypatch.setattr(weight_quantization, "_int8_kernel_works", lambda device: False)
        monkeypatch.setattr(weight_quantization, "_int4_kernel", lambda device: None)
    torch.manual_seed(0)
    weight = torch.randn(100, 96) + 0.5
    stored = quantize_int8(weight) if bits == 8 else quantize_int4(weight, 32)
    values = dequantize(*stored)
    assert (values - weight).norm() < (0.01 if bits == 8 else 0.1) * weight.norm()
    matrix = Int8Weight(*stored) if bits == 8 else Int4Weight(*stored)  # type: ignore[call-arg]
    bias = torch.randn(100).bfloat16()
    for num_rows in (1, 2, 7, 19, 20, 33, 79, 80, 200):
        inputs = torch.randn(num_rows, 96).bfloat16()
        outputs = QuantizedLinear(matrix, bias)(inputs)
        exact = F.linear(inputs.float(), values, bias.float())
        assert (outputs.dtype, outputs.shape) == (torch.bfloat16, (num_rows, 100))
        assert (outputs.float() - exact).norm() < 0.006 * exact.norm()


@pytest.mark.parametrize("has_kernel", [True, False])
@pytest.mark.parametrize("bits", [8, 4])
def test_an_invariant_quantized_product_does_not_depend_on_other_rows(
    bits: int, has_kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_kernel:
        monkeypatch.setattr(weight_quantization, "_int8_kernel_works", lambda device: False)
        monkeypatch.setattr(weight_quantization, "_int4_kernel", lambda device: None)
    torch.manual_seed(0)
    weight = torch.randn(480, 576)
    matrix = Int8Weight(*quantize_int8(weight)) if bits == 8 else of_four_bits(weight)
    linear = QuantizedLinear(matrix, is_invariant=True)
    row = torch.randn(1, 576).bfloat16()
    expected = linear(row)
    for num_rows in (2, 17, 50):
        inputs = torch.randn(num_rows, 576).bfloat16()
        for place in (0, num_rows // 2, num_rows - 1):
            inputs[place] = row[0]
            assert torch.equal(linear(inputs)[place], expected[0])


def test_zeros_and_equal_weights_stay_what_they_are() -> None:
    weight = torch.zeros(3, 64)
    weight[1] = 0.5
    weight[2, ::2], weight[2, 1::2] = -1.0, 1.0
    for stored in (quantize_int8(weight), quantize_int4(weight, 32)):
        torch.testing.assert_close(dequantize(*stored), weight, rtol=0.01, atol=0)


def test_memory_and_rows_of_quantized_weights() -> None:
    weight = torch.randn(128, 64)
    eight, four = Int8Weight(*quantize_int8(weight)), of_four_bits(weight)
    assert (eight.nbytes, four.nbytes) == (128 * 64 + 2 * 128, 128 * 64 // 2 + 2 * 2 * 128 * 2)
    ids = torch.tensor([5, 0, 5])
    torch.testing.assert_close(eight.rows(ids).float(), weight[ids], rtol=0.02, atol=0.02)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value: float) -> None:
    weight = torch.ones(4, 64)
    weight[2, 5] = value
    for quantize in (quantize_int8, lambda one: quantize_int4(one, 64)):
        with pytest.raises(ConfigError, match="not finite"):
            quantize(weight)
