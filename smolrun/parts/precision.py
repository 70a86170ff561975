"""Which number formats a run computes in, and the loss scale that keeps float16 gradients from
vanishing.

    float32    everything in float32
    float64    everything in float64, for proofs
    bf16       float32 weights, matrix products in bfloat16
    fp16       float32 weights, matrix products in float16, loss scaled
    bf16_params  weights, gradients and the optimizer's memory in bfloat16 too: half the memory.
                 Updates are computed in float32 and rounded by chance (StochasticRounding); the
                 loss is float32

Source: Micikevicius et al., "Mixed precision training", 2018.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Precision:
    """The formats behind one value of the `precision` key."""

    parameters: torch.dtype
    autocast: torch.dtype | None = None

    @property
    def is_rounded(self) -> bool:
        """Whether anything is computed in fewer bits than float32."""
        return self.autocast is not None or self.parameters.itemsize < 4

    def context(self, device: torch.device) -> AbstractContextManager[object]:
        """What the forward pass runs under."""
        return (
            nullcontext()
            if self.autocast is None
            else torch.autocast(device.type, dtype=self.autocast)
        )

    def loss_scale(self, weight: int) -> LossScale:
        """The loss scale for micro-batches of about `weight` targets; constant 1 unless float16
        needs one."""
        if self.autocast is not torch.float16:
            return LossScale(1.0, is_dynamic=False)
        # The loss is a sum over targets, so its gradients are `weight` times those of a mean: start
        # that much lower.
        return LossScale(2.0 ** (16 - int(math.log2(max(1, weight)))), is_dynamic=True)


PRECISIONS = {
    "float32": Precision(torch.float32),
    "float64": Precision(torch.float64),
    "bf16": Precision(torch.float32, torch.bfloat16),
    "fp16": Precision(torch.float32, torch.float16),
    "bf16_params": Precision(torch.bfloat16),
}


class LossScale:
    """A power of two that all ranks change alike: halved when a step overflowed, doubled after many
    that did not."""

    growth_interval = 200

    def __init__(self, value: float, *, is_dynamic: bool) -> None:
        self.value = value
        self._least = value * 2.0**-16
        self.is_dynamic = is_dynamic
        self.good_steps = 0

    def update(self, was_finite: bool) -> None:
        """Takes note of one finished step."""
        if not self.is_dynamic:
            return
        if not was_finite:
            self.value, self.good_steps = max(self._least, self.value / 2), 0
            return
        self.good_steps += 1
        if self.good_steps == self.growth_interval:
            self.value, self.good_steps = self.value * 2, 0

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return {"value": self.value, "good_steps": self.good_steps}

    def restore(self, state: Mapping[str, float]) -> None:
        """As it was saved."""
        self.value, self.good_steps = state["value"], int(state["good_steps"])
