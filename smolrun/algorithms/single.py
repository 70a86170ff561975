"""One process, no network: the baseline that every other algorithm is compared with.

With staleness K it simulates the delay: the gradient of step t is kept and applied at step t + K.
So a delayed distributed run can be checked against a program that a reader can hold in mind.

Source: Robbins and Monro, "A stochastic approximation method", 1951.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from smolrun.algorithms.base import Algorithm, PendingUpdate
from smolrun.data.splits import Batch


class Single(Algorithm):
    """Plain training on one rank."""

    def place(self, model: torch.nn.Module) -> None:
        """Keeps everything."""
        super().place(model)
        self._gradients: dict[int, list[torch.Tensor]] = {}  # by step, until its update

    def forward_backward(self, micro_batches: Sequence[Batch]) -> dict[str, float]:
        """Starts from zero gradients."""
        self.optimizer.zero_grad(set_to_none=True)
        return super().forward_backward(micro_batches)

    def synchronize(self, stats: dict[str, float]) -> PendingUpdate:
        """Nothing to combine: keeps the gradients until their update."""
        gradients = self.keep_gradients()
        stats["is_finite"] = float(all(bool(torch.isfinite(own).all()) for own in gradients))
        return PendingUpdate(self.steps_begun, *self.share_stats(stats))

    def keep_gradients(self) -> list[torch.Tensor]:
        """Of the step that has been computed."""
        scale = self.loss_scale.value
        gradients = [unscaled_gradient(parameter, scale) for parameter in self.trained()]
        self._gradients[self.steps_begun] = gradients
        return gradients

    def bind_gradients(self, pending: PendingUpdate) -> list[torch.Tensor]:
        """Of that step."""
        pairs = zip(self.trained(), self._gradients.pop(pending.step), strict=True)
        gradients = []
        for parameter, gradient in pairs:
            parameter.grad = gradient.to(parameter.device)
            gradients.append(parameter.grad)
        return gradients

    def pending_gradients(self, pending: PendingUpdate) -> list[torch.Tensor]:
        """Of that step; where a run resumes, memory to load into."""
        if pending.step not in self._gradients:
            self._gradients[pending.step] = [torch.zeros_like(one) for one in self.trained()]
        return self._gradients[pending.step]

    def trained(self) -> list[torch.nn.Parameter]:
        """The parameters that an update changes."""
        return [parameter for _, parameter in self.optimized_params if parameter.requires_grad]


def unscaled_gradient(parameter: torch.nn.Parameter, loss_scale: float) -> torch.Tensor:
    """What backward has left, divided by the loss scale in place; zeros where it left nothing."""
    if parameter.grad is None:
        return torch.zeros_like(parameter)
    return parameter.grad if loss_scale == 1.0 else parameter.grad.div_(loss_scale)
