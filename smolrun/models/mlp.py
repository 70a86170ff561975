"""A plain multilayer perceptron, the smallest real model: features in, class logits out.

Shape suffixes: B batch, F features, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import ClassVar

from torch import Tensor, nn

from smolrun.errors import ConfigError
from smolrun.models.base import Init, Kind, ModelSpec

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU}


class MLP(nn.Module):
    """Linear layers with an activation between them; the last one gives the logits."""

    consumes: ClassVar[Kind] = "features"

    def __init__(
        self, num_inputs: int, num_outputs: int, widths: Sequence[int], activation: str
    ) -> None:
        super().__init__()
        sizes = pairwise([num_inputs, *widths, num_outputs])
        self.layers = nn.ModuleList(nn.Linear(size, after) for size, after in sizes)
        self.activation = ACTIVATIONS[activation]()

    def forward(self, inputs_BF: Tensor) -> Tensor:
        """Logits [B, C] for float inputs [B, F]."""
        hidden = inputs_BF
        for index, layer in enumerate(self.layers):
            hidden = layer(hidden if index == 0 else self.activation(hidden))
        return hidden

    def init_rule(self, name: str, parameter: Tensor) -> Init:
        """He initialisation (arXiv:1502.01852): rectified layers keep the size of activations."""
        if name.endswith("bias"):
            return Init("zeros")
        return Init("normal", math.sqrt(2.0 / parameter.shape[1]))


def build(spec: ModelSpec, *, widths: Sequence[int], activation: str) -> MLP:
    """The MLP for `spec`; raises ConfigError with every problem found."""
    problems = []
    if spec.num_inputs is None:
        problems.append(
            "model=mlp reads features, but the data gives tokens; use data=digits or model=gpt_tiny"
        )
    if any(width < 1 for width in widths):
        problems.append(f"model.widths={list(widths)}: every width must be at least 1")
    if activation not in ACTIVATIONS:
        problems.append(f"model.activation={activation!r}: must be one of {', '.join(ACTIVATIONS)}")
    if problems or spec.num_inputs is None:
        raise ConfigError(problems)
    return MLP(spec.num_inputs, spec.num_outputs, widths, activation)
