"""Norms layer by layer: of gradients, and if asked of parameters and of what an update changed.

A layer is what stands before a number in a parameter's name, number included (`blocks.3`), or the
module that owns it (`token_embedding`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch

Kind = Literal["none", "gradients", "all"]

_PIECE = 1 << 20  # numbers that are in double precision at one time


def squared_norm(tensors: Iterable[torch.Tensor]) -> float:
    """The sum of the squares of all numbers in all `tensors`."""
    total = 0.0
    for tensor in tensors:
        kind = tensor.device.type
        # Apple's devices have no float64.
        dtype = torch.float32 if kind == "mps" else torch.float64
        # On a CPU the norm makes a copy in `dtype` first. One piece after the other, that stays
        # small; left to itself it grew to several copies of the gradient.
        for part in tensor.flatten().split(_PIECE) if kind == "cpu" else (tensor,):
            total += float(torch.linalg.vector_norm(part, dtype=dtype)) ** 2
    return total


@dataclass(frozen=True)
class LayerNorms:
    """Which norms to take, on every `every`-th update."""

    kind: Kind
    every: int

    def begin(
        self, update: int, named: Iterable[tuple[str, torch.Tensor]], clip_coef: float = 1.0
    ) -> Measurement | None:
        """Takes the gradients' norms just before an update; None where this one is not measured.

        Clipping has made the gradients `clip_coef` times as long as they were: that is undone.
        Frozen parameters have none. With kind "all" it keeps a copy of the parameters until the
        update is done.
        """
        if self.kind == "none" or update % self.every:
            return None
        trained = [(name, tensor) for name, tensor in named if tensor.requires_grad]
        return Measurement(trained, clip_coef, also_parameters=self.kind == "all")


NO_NORMS = LayerNorms("none", 1)


class Measurement:
    """The norms of one update, begun before it and finished after it."""

    def __init__(
        self, named: list[tuple[str, torch.Tensor]], clip_coef: float, *, also_parameters: bool
    ) -> None:
        self._named = named
        clipped = by_layer((name, p.grad) for name, p in named if p.grad is not None)
        self._norms = {"gradients": {layer: norm / clip_coef for layer, norm in clipped.items()}}
        self._before = [p.detach().clone() for _, p in named] if also_parameters else None

    def finish(self) -> dict[str, dict[str, float]]:
        """What -> layer -> norm: "gradients", and if asked "parameters" and "updates"."""
        if self._before is not None:
            changes = [
                (name, p.detach() - old)
                for (name, p), old in zip(self._named, self._before, strict=True)
            ]
            self._norms["parameters"] = by_layer((name, p.detach()) for name, p in self._named)
            self._norms["updates"] = by_layer(changes)
        return self._norms


def by_layer(named: Iterable[tuple[str, torch.Tensor]]) -> dict[str, float]:
    """The euclidean norm over all tensors of each layer, in order of appearance."""
    squares: dict[str, float] = {}
    for name, tensor in named:
        dtype = torch.float64 if tensor.dtype == torch.float64 else torch.float32
        norm = torch.linalg.vector_norm(tensor, dtype=dtype).item()
        layer = layer_of(name)
        squares[layer] = squares.get(layer, 0.0) + norm * norm
    return {layer: square**0.5 for layer, square in squares.items()}


def combine_norms(
    norms: dict[str, dict[str, float]],
    names: Iterable[str],
    sum_over_ranks: Callable[[torch.Tensor], torch.Tensor],
) -> dict[str, dict[str, float]]:
    """Norms of whole layers from those of the parts that ranks hold; `names` are of all parameters
    of the model."""
    layers = list(dict.fromkeys(map(layer_of, names)))
    parts = [[kind.get(layer, 0.0) for layer in layers] for kind in norms.values()]
    rows = sum_over_ranks(torch.tensor(parts, dtype=torch.float64).square()).sqrt().tolist()
    return {
        what: dict(zip(layers, row, strict=True)) for what, row in zip(norms, rows, strict=True)
    }


def layer_of(name: str) -> str:
    """`blocks.3.attention.query.weight` belongs to `blocks.3`."""
    words = name.split(".")
    for position, word in enumerate(words):
        if word.isdecimal():
            return ".".join(words[: position + 1])
    return ".".join(words[:-1]) or name
