"""Optimizers by name. Matrices decay, vectors (norms, biases) do not."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch


def make_optimizer(
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]], name: str, **keys: Any
) -> torch.optim.Optimizer:
    """The optimizer `name` (adamw, sgd) with the keys of its yaml; `weight_decay` applies to
    tensors of 2 and more dimensions."""
    trained = [parameter for _, parameter in named_parameters if parameter.requires_grad]
    decay = keys.pop("weight_decay", 0.0)
    groups = [
        {
            "params": [parameter for parameter in trained if parameter.ndim >= 2],
            "weight_decay": decay,
        },
        {"params": [parameter for parameter in trained if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if name == "adamw":
        # The fused kernel goes over memory once where the plain one goes over it a dozen times.
        fused = trained[0].device.type in ("cpu", "cuda")
        return torch.optim.AdamW(groups, fused=fused, **keys)
    if name == "sgd":
        return torch.optim.SGD(groups, **keys)
    raise ValueError(f"unknown optimizer {name!r}")
