"""One process, no network: the baseline that every other algorithm is compared with.

With staleness K it simulates the delay: the gradient of step t is kept and applied at step t + K.
So a delayed distributed run can be checked against a program that a reader can hold in mind.

Source: Robbins and Monro, "A stochastic approximation method", 1951.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch

from smolrun.algorithms.base import Algorithm, PendingUpdate
from smolrun.data.splits import Batch


class Single(Algorithm):
    """Plain training on one rank."""

    def place(self, model: torch.nn.Module) -> None:
        """Keeps everything."""
        super().place(model)
        self._delayed: deque[list[torch.Tensor]] = deque()

    def forward_backward(self, micro_batches: Sequence[Batch]) -> dict[str, float]:
        """Starts from zero gradients."""
        self.optimizer.zero_grad(set_to_none=True)
        return super().forward_backward(micro_batches)

    def synchronize(self, stats: dict[str, float]) -> PendingUpdate:
        """Nothing to combine: keeps the gradients until their update."""
        gradients = []
        for parameter in self._trained():
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            gradients.append(gradient.div_(self.loss_scale.value))
        self._delayed.append(gradients)
        stats["is_finite"] = float(
            all(bool(torch.isfinite(gradient).all()) for gradient in gradients)
        )
        return PendingUpdate(self.steps_begun, *self.share_stats(stats))

    def bind_gradients(self, pending: PendingUpdate) -> list[torch.Tensor]:
        """The oldest gradients."""
        pairs = zip(self._trained(), self._delayed.popleft(), strict=True)
        gradients = []
        for parameter, gradient in pairs:
            parameter.grad = gradient.to(parameter.device)
            gradients.append(parameter.grad)
        return gradients

    def pending_gradients(self, pending: PendingUpdate) -> list[torch.Tensor]:
        """The oldest pending has the oldest gradients."""
        (position,) = (n for n, other in enumerate(self.pending_updates) if other is pending)
        while len(self._delayed) <= position:  # resuming: memory to load into
            self._delayed.append([torch.zeros_like(parameter) for parameter in self._trained()])
        return self._delayed[position]

    def _trained(self) -> list[torch.nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]
