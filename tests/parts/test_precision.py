"""The loss scale moves in powers of two, the same way on every rank."""

from __future__ import annotations

import math

import torch

from smolrun.parts.precision import PRECISIONS, LossScale


def test_only_float16_scales_its_loss() -> None:
    for name, precision in PRECISIONS.items():
        scale = precision.loss_scale(4096)
        scale.update(was_finite=False)
        assert scale.value == (8.0 if name == "fp16" else 1.0)


def test_the_scale_halves_at_once_and_doubles_slowly() -> None:
    scale = LossScale(8.0, is_dynamic=True)
    for _ in range(LossScale.growth_interval - 1):
        scale.update(was_finite=True)
    assert scale.value == 8.0
    scale.update(was_finite=True)
    assert scale.value == 16.0
    for _ in range(10):
        scale.update(was_finite=False)
    assert math.log2(scale.value).is_integer()


def test_autocast_runs_products_in_half_precision() -> None:
    for name, dtype in (
        ("bf16", torch.bfloat16),
        ("fp16", torch.float16),
        ("float32", torch.float32),
    ):
        with PRECISIONS[name].context(torch.device("cpu")):
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


def test_an_overflow_never_raises_the_scale() -> None:
    scale = PRECISIONS["fp16"].loss_scale(2**20)  # so many targets that it starts below 1
    before = scale.value
    for _ in range(40):
        scale.update(was_finite=False)
        assert scale.value <= before
        before = scale.value
    assert before > 0
