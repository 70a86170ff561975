"""Products of a stage's weights: every number of rows gives the same, by whatever routine."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from smolrun.serving.weights import Linear

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
