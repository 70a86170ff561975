"""Lion: only the sign of a running mean moves the weights, so one number is remembered per weight
instead of Adam's two. Its steps are larger than Adam's: give it a third to a tenth of the lr, and
as many times the weight decay.

Source: Chen et al., "Symbolic Discovery of Optimization Algorithms", 2023 (arXiv:2302.06675).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

# The direction is a temporary as large as the weights it is for: it is made for so many at a time.
_AT_ONCE = 4 * 1024 * 1024


class Lion(torch.optim.Optimizer):
    """weight -= lr * (sign(beta1 * mean + (1 - beta1) * gradient) + weight_decay * weight)."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: Sequence[float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            trained = [weight for weight in group["params"] if weight.grad is not None]
            for weights in _batches(trained):
                self._update(weights, group)

    def _update(self, weights: list[Tensor], group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        for weight in weights:
            if not self.state[weight]:
                self.state[weight]["exp_avg"] = torch.zeros_like(weight)
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        means = [self.state[weight]["exp_avg"] for weight in weights]
        directions = torch._foreach_lerp(means, gradients, 1 - beta1)
        torch._foreach_sign_(directions)
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(weights, directions, alpha=-group["lr"])
        torch._foreach_lerp_(means, gradients, 1 - beta2)


def _batches(weights: list[Tensor]) -> Iterator[list[Tensor]]:
    """The weights in order, in lists of about _AT_ONCE numbers."""
    batch: list[Tensor] = []
    for weight in weights:
        if batch and sum(other.numel() for other in batch) + weight.numel() > _AT_ONCE:
            yield batch
            batch = []
        batch.append(weight)
    if batch:
        yield batch
