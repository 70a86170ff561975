"""Quantizers: close, deterministic, and honest about what is not finite; feedback loses nothing."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from smolrun.parts.quantization import ErrorFeedback, Int8, Quantization, Quantizer

KINDS = ["none", "int8", "fp16", "bf16"]
SIZES = [0, 1, 7, 255, 256, 257, 1000, 32 * 1024, 33_003]
# The largest error, of the largest number in the block (int8) or of each number (the others).
ERRORS = {"none": 0.0, "int8": 0.5001 / 127, "fp16": 2.0**-11, "bf16": 2.0**-8}


def make(kind: str, block: int = 256) -> Quantizer:
    return Quantization(kind, block).quantizer()


def numbers(size: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Of very different sizes from place to place."""
    generator = torch.Generator().manual_seed(seed)
    flat = torch.randn(size, generator=generator, dtype=dtype)
    return flat * torch.exp(3 * torch.randn(-(-size // 64), generator=generator, dtype=dtype)
                            ).repeat_interleave(64)[:size]  # fmt: skip


def there_and_back(quantizer: Quantizer, flat: Tensor) -> Tensor:
    into = torch.full_like(flat, math.nan)
    quantizer.decode(quantizer.encode(flat), into)
    return into


def plain_int8(flat: Tensor, block: int) -> Tensor:
    """The formula, number by number."""
    found = []
    for start in range(0, len(flat), block):
        part = flat[start : start + block].tolist()
        scale = torch.tensor(max(map(abs, part)), dtype=flat.dtype).div(127).float().to(flat.dtype)
        inverse = 1 / scale if scale else scale
        for number in part:
            step = torch.tensor(number, dtype=flat.dtype).mul(inverse).round()
            found.append((step * scale).item())
    return torch.tensor(found, dtype=flat.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_comes_back_close_and_as_long_as_promised(kind: str, size: int, dtype: torch.dtype) -> None:
    quantizer, flat = make(kind), numbers(size, dtype)
    wire = quantizer.encode(flat)
    assert wire.dtype == torch.uint8 and wire.ndim == 1
    assert len(wire) == quantizer.wire_bytes(size, dtype) and len(wire) % 8 == 0
    back = there_and_back(quantizer, flat)
    if size:
        yardstick = flat.abs()
        if kind == "int8":
            blocks = range(0, size, 256)
            largest = [flat[start : start + 256].abs().max().item() for start in blocks]
            yardstick = torch.tensor(largest, dtype=dtype).repeat_interleave(256)[:size]
        smallest = 2.0**-38 * flat.abs().max() if kind == "fp16" else 1e-30
        assert ((back - flat).abs() <= ERRORS[kind] * yardstick + smallest).all()


def test_int8_is_its_formula_to_the_byte() -> None:
    for size, block in ((1000, 256), (77, 10), (5, 256), (513, 1)):
        flat = numbers(size)
        assert torch.equal(there_and_back(Int8(block), flat), plain_int8(flat, block))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_int8_refuses_numbers_whose_largest_could_change_its_sign(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match="not of torch"):
        make("int8").encode(numbers(256).to(dtype))
    assert Quantization("int8").working_dtype(dtype) == torch.float32
    assert Quantization("int8").working_dtype(torch.float64) == torch.float64
    assert Quantization("none").working_dtype(dtype) == dtype, "as they are"


def test_bytes_per_number() -> None:
    million = 1_000_000
    assert make("int8").wire_bytes(million) / million == pytest.approx(1.015625, abs=1e-4)
    assert make("fp16").wire_bytes(million) / million == pytest.approx(2, abs=1e-4)
    assert make("bf16").wire_bytes(million) == 2 * million
    assert make("none").wire_bytes(million) == 4 * million
    assert [make(kind).wire_bytes(0) for kind in KINDS] == [0, 0, 0, 0]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 299, 511, 514])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_finite_stays_so(kind: str, place: int, value: float) -> None:
    flat = numbers(515)
    flat[place] = value
    back = there_and_back(make(kind), flat)
    assert not math.isfinite(back[place].item())
    others = torch.arange(515) // 256 != place // 256
    assert torch.isfinite(back[others]).all(), "other blocks are not touched"


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_tiny_and_huge_numbers(kind: str) -> None:
    for size in (1e-42, 1e-30, 0.0, 1e20, 3e38):
        back = there_and_back(make(kind), torch.tensor([size, -size / 2, 0.0]))
        assert torch.isfinite(back).all()
        if size >= 1e-30:
            assert back[0].item() == pytest.approx(size, rel=0.01)
        assert back.abs().max() <= 1.01 * size


@pytest.mark.parametrize("kind", KINDS)
def test_wires_lie_in_a_row_and_add_up(kind: str) -> None:
    quantizer = make(kind)
    parts = [numbers(size, seed=size) for size in (1000, 3, 257)]
    row = torch.cat([quantizer.encode(part) for part in parts])
    first = 0
    for part in parts:
        wire = row[first : first + quantizer.wire_bytes(len(part))]
        first += len(wire)
        total = torch.ones_like(part)
        quantizer.decode(wire, total, adds=True)
        assert torch.equal(total, 1 + there_and_back(quantizer, part))


@pytest.mark.parametrize("kind", KINDS)
def test_lost_is_what_is_missing_also_in_place(kind: str) -> None:
    quantizer, flat = make(kind), numbers(33_003)
    lost = torch.empty_like(flat)
    wire = quantizer.encode(flat, lost=lost)
    assert torch.equal(lost, flat - there_and_back(quantizer, flat))
    used = flat.clone()
    again = quantizer.encode(used, torch.full_like(wire, 255), lost=used)
    assert torch.equal(again, wire), "every byte of a wire is written"
    assert torch.equal(used, lost)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 600), st.integers(1, 300), st.integers(0, 1000))
def test_any_size_and_block(size: int, block: int, seed: int) -> None:
    flat = numbers(size, seed=seed)
    back = there_and_back(Int8(block), flat)
    for start in range(0, size, block):
        part = slice(start, start + block)
        assert (back[part] - flat[part]).abs().max() <= ERRORS["int8"] * flat[part].abs().max()


@pytest.mark.parametrize("kind", ["int8", "bf16"])
def test_feedback_loses_nothing(kind: str) -> None:
    quantizer, feedback = make(kind), ErrorFeedback(300, torch.float64)
    sent, given_up, true = (torch.zeros(300, dtype=torch.float64) for _ in range(3))
    for step in range(50):
        flat = numbers(300, torch.float64, seed=step % 3)
        true += flat
        given_up += there_and_back(quantizer, flat)
        into = torch.empty_like(flat)
        quantizer.decode(feedback.encode(flat, quantizer), into)
        feedback.settle(is_kept=True)
        sent += into
    assert torch.allclose(sent + feedback.residual, true, rtol=0, atol=1e-9)
    assert (sent - true).norm() < 0.2 * (given_up - true).norm(), "without it errors add up"


def test_a_step_that_does_not_count_leaves_the_residual_as_it_was() -> None:
    quantizer, feedback = make("int8"), ErrorFeedback(300)
    feedback.encode(numbers(300), quantizer)
    feedback.settle(is_kept=True)
    before = feedback.residual.clone()
    assert before.any()
    for _ in range(2):
        feedback.encode(numbers(300, seed=1), quantizer)
        feedback.encode(torch.full((300,), math.nan), quantizer)
        assert not torch.equal(
            feedback.after(is_kept=True),
            before,
        )
        feedback.settle(is_kept=False)
        assert torch.equal(feedback.residual, before)
    feedback.settle(is_kept=True)
    assert torch.equal(feedback.residual, before), "nothing was sent since"


def test_a_step_may_send_several_times() -> None:
    """Micro-batch after micro-batch: what the first lost is in the second."""
    quantizer, feedback = make("int8"), ErrorFeedback(300, torch.float64)
    total = torch.zeros(300, dtype=torch.float64)
    parts = [numbers(300, torch.float64, seed=seed) for seed in range(4)]
    for part in parts:
        quantizer.decode(feedback.encode(part, quantizer), total, adds=True)
    feedback.settle(is_kept=True)
    assert torch.allclose(total + feedback.residual, sum(parts, torch.zeros(300)), atol=1e-12)
