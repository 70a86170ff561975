"""Optimizers by name. Matrices decay, vectors (norms, biases) do not.

    adamw      float32: 8 bytes of state per parameter; bf16: 4
    lion       float32: 4;  bf16: 2
    sgd        float32: 4;  bf16: 2 (0 without momentum)
    adafactor  next to nothing: one number per row and per column of a matrix

Parameters in bfloat16 are updated in float32, piece by piece, and rounded by chance; see
rounding.py.

Source: Kingma & Ba 2015, Loshchilov & Hutter 2019 (AdamW); Shazeer & Stern 2018 (Adafactor, as
torch.optim builds it: lr is the largest step relative to the size of the weights).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from smolrun.parts.optimizer_state import load_optimizer_state, optimizer_state, state_shapes
from smolrun.training.lion import Lion
from smolrun.training.rounding import StochasticRounding

__all__ = [
    "ELEMENTWISE",
    "NAMES",
    "load_optimizer_state",
    "make_optimizer",
    "optimizer_state",
    "state_shapes",
]

NAMES = ("adamw", "adafactor", "lion", "sgd")
# Adafactor looks at whole matrices; the others treat every number by itself.
ELEMENTWISE = frozenset({"adamw", "lion", "sgd"})


def make_optimizer(
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
    name: str,
    *,
    seed: int = 0,
    **keys: Any,
) -> torch.optim.Optimizer:
    """The optimizer `name` with the keys of its yaml; `weight_decay` applies to tensors of 2 and
    more dimensions, `seed` to the rounding of bfloat16 parameters."""
    names = {parameter: key for key, parameter in named_parameters if parameter.requires_grad}
    decay = keys.pop("weight_decay", 0.0)
    groups: list[dict[str, Any]] = [
        {"params": [p for p in names if p.ndim >= 2], "weight_decay": decay},
        {"params": [p for p in names if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    first = next(iter(names))
    make = _maker(name, first.device.type, keys)
    if first.dtype != torch.bfloat16:
        return make(groups)
    return StochasticRounding(
        groups, make, names=names, seed=seed, is_elementwise=name in ELEMENTWISE
    )


def _maker(
    name: str, device: str, keys: dict[str, Any]
) -> Callable[[list[dict[str, Any]]], torch.optim.Optimizer]:
    if name == "adamw":
        # The fused kernel goes over memory once where the plain one goes over it a dozen times.
        fused = device in ("cpu", "cuda")
        return lambda groups: torch.optim.AdamW(groups, fused=fused, **keys)
    if name == "sgd":
        return lambda groups: torch.optim.SGD(groups, **keys)
    if name == "lion":
        return lambda groups: Lion(groups, **keys)
    if name == "adafactor":
        # One matrix after the other: `foreach` would need a second copy of the whole model.
        return lambda groups: torch.optim.Adafactor(groups, foreach=False, **keys)
    raise ValueError(f"unknown optimizer {name!r}; there are {', '.join(NAMES)}")
