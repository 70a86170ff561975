"""What algorithms do for a model with experts (models/feed_forward.py), wherever these are: add the
losses of its routers to the gradient, and count the tokens of every expert.

Source: Shazeer et al., "Outrageously Large Neural Networks", 2017 (auxiliary losses of a router).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from smolrun.algorithms.contract import StepStats
from smolrun.data.splits import IGNORE_INDEX
from smolrun.models.shape import DecoderShape

TOKENS, DROPPED = "expert_tokens", "dropped"  # statistics of a step


def expert_columns(model: Any) -> tuple[str, ...]:
    """Names of the statistics of a model: `expert_tokens/<layer>/<expert>` and `dropped`, of all
    layers, also where a rank holds some; none without experts."""
    shape = getattr(model, "shape", None)
    if not isinstance(shape, DecoderShape) or shape.moe is None:
        return ()
    layers, experts = range(shape.layers), range(shape.moe.experts)
    return (*(f"{TOKENS}/{layer}/{one}" for layer in layers for one in experts), DROPPED)


def expert_tokens(stats: StepStats) -> tuple[list[list[int]], int] | None:
    """Of a step, all ranks together: the tokens of every expert, layer by layer, and how many
    assignments were dropped; None where the ranks do not report it."""
    if DROPPED not in stats.names:
        return None
    names = [name.split("/") for name in stats.names]
    totals = stats.table.sum(0).tolist()
    found: dict[int, list[int]] = {}
    for (what, *place), total in zip(names, totals, strict=True):
        if what == TOKENS:
            found.setdefault(int(place[0]), []).append(int(total))
    return list(found.values()), int(stats.total(DROPPED))


class ExpertLoad:
    """Tokens that the experts of every layer got from this rank since `take`."""

    def __init__(self) -> None:
        self._tokens: dict[str, Tensor] = {}
        self._dropped = 0

    def add(self, model: Any) -> None:
        """Of the model's last forward, where it was one of training."""
        if not torch.is_grad_enabled():
            return
        for layer, routing in getattr(model, "routing", {}).items():
            self._tokens[layer] = self._tokens.get(layer, 0) + routing.tokens_E
            self._dropped += routing.dropped

    def take(self, columns: Iterable[str]) -> dict[str, float]:
        """The statistics `columns`, zeros for layers that other ranks hold."""
        counts = {layer: tokens.tolist() for layer, tokens in self._tokens.items()}
        found = {
            f"{TOKENS}/{layer}/{expert}": float(count)
            for layer, tokens in counts.items()
            for expert, count in enumerate(tokens)
        }
        found[DROPPED] = float(self._dropped)
        self._tokens, self._dropped = {}, 0
        return {name: found.get(name, 0.0) for name in columns}


class _AddLoss(torch.autograd.Function):
    """The output as it is; backward also gives `loss` a gradient of 1."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, loss: Tensor) -> Tensor:
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        return gradients[0], gradients[0].new_ones(())


def with_auxiliary_loss(output: Any, model: Any, targets: Tensor, loss_scale: float) -> Any:
    """The output of a model, or of a stage of it, whose backward adds the gradient of
    `model.auxiliary_loss` [B] if there is one. A sequence counts as often as it has targets that
    carry a loss, so the sum over all ranks is divided by the same number as the loss itself, and a
    sample that is there for the collectives only counts nothing."""
    losses_B = getattr(model, "auxiliary_loss", None)
    if losses_B is None or not losses_B.requires_grad:
        return output
    weight_B = (targets != IGNORE_INDEX).flatten(1).sum(1).to(losses_B.device)
    return _AddLoss.apply(  # type: ignore[no-untyped-call]
        output, (losses_B * weight_B).sum() * loss_scale
    )
