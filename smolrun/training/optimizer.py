"""Optimizers by name, and the learning-rate schedule. Matrices decay, vectors (norms, biases) do
not.

    adamw      float32: 8 bytes of state per parameter; bf16: 4
    lion       float32: 4;  bf16: 2
    sgd        float32: 4;  bf16: 2 (0 without momentum)
    adafactor  one number per row and per column of a matrix

Parameters in bfloat16 are updated in float32, piece by piece, and rounded
stochastically: stochastic_rounding.py.

Source: Kingma & Ba 2015, Loshchilov & Hutter 2019 (AdamW); Shazeer & Stern 2018 (Adafactor, as
torch.optim builds it: lr is the largest step relative to the size of the weights); Chen et al.,
"Symbolic Discovery of Optimization Algorithms", 2023 (Lion, arXiv:2302.06675).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from smolrun.training.stochastic_rounding import StochasticRounding

# Adafactor needs whole matrices; the others update every number by itself.
ELEMENTWISE = frozenset({"adamw", "lion", "sgd"})
# Lion's direction is a temporary as large as its weights: it is made for so many numbers at a time.
_LION_BATCH = 4 * 1024 * 1024


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
    if name not in _CLASSES:
        raise ValueError(f"unknown optimizer {name!r}; there are {', '.join(_CLASSES)}")
    make = partial(_CLASSES[name], **keys)
    if name == "adamw":
        # The fused kernel reads and writes memory once, the plain one a dozen times.
        make = partial(make, fused=first.device.type in ("cpu", "cuda"))
    elif name == "adafactor":
        make = partial(make, foreach=False)  # would need a second copy of the whole model
    if first.dtype != torch.bfloat16:
        return make(groups)
    return _eager(StochasticRounding)(
        groups, make, names=names, seed=seed, is_elementwise=name in ELEMENTWISE
    )


class Lion(torch.optim.Optimizer):
    """weight -= lr * (sign(beta1 * mean + (1 - beta1) * gradient) + weight_decay * weight).

    Keeps one number per weight where Adam keeps two. Its steps are larger than Adam's: use a third
    to a tenth of the lr, and as many times the weight decay.
    """

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


def _eager(kind: type[torch.optim.Optimizer]) -> Callable[..., torch.optim.Optimizer]:
    """`kind` without the wrappers that only torch.compile needs.

    They import torch._dynamo at their first call: 1.5 s and 70 MB a process.
    """
    names = ("add_param_group", "zero_grad", "state_dict", "load_state_dict")
    bare = {name: inspect.unwrap(getattr(kind, name)) for name in names}
    bare["step"] = torch.no_grad()(inspect.unwrap(kind.step))
    return type(kind.__name__, (kind,), bare)


_CLASSES = {
    "adamw": _eager(torch.optim.AdamW),
    "adafactor": _eager(torch.optim.Adafactor),
    "lion": _eager(Lion),
    "sgd": _eager(torch.optim.SGD),
}
NAMES = tuple(_CLASSES)


def _batches(weights: list[Tensor]) -> Iterator[list[Tensor]]:
    """The weights in order, in lists of about _LION_BATCH numbers."""
    batch: list[Tensor] = []
    for weight in weights:
        if batch and sum(other.numel() for other in batch) + weight.numel() > _LION_BATCH:
            yield batch
            batch = []
        batch.append(weight)
    if batch:
        yield batch


def lr_schedule(
    kind: str, *, peak: float, steps: int, warmup_steps: int, min_ratio: float
) -> Callable[[int], float]:
    """The learning rate of update 0, 1, ...: a warm-up to `peak`, then `kind` (cosine, linear or
    constant) down to `min_ratio * peak` at the last update."""
    falls: dict[str, Callable[[float], float]] = {
        "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
        "linear": lambda done: 1 - done,
        "constant": lambda done: 1.0,
    }
    fall = falls[kind]

    def learning_rate(update: int) -> float:
        if update < warmup_steps:
            return peak * (update + 1) / warmup_steps
        done = (update - warmup_steps) / max(1, steps - 1 - warmup_steps)
        return peak * (min_ratio + (1 - min_ratio) * fall(min(1.0, done)))

    return learning_rate
