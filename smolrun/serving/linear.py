"""A weight matrix for inference: the one place where the weights of a stage's products live."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class Linear:
    """y = W x + b for rows x, in the dtype of W (float32 or bfloat16)."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None = None) -> None:
        self.weight = weight_OI
        self.bias = bias_O

    @classmethod
    def joined(cls, weights: list[Tensor], biases: list[Tensor]) -> Linear:
        """Several products of one input as one: outputs side by side. No biases: []."""
        return cls(torch.cat(weights), torch.cat(biases) if biases else None)

    def __call__(self, inputs_TI: Tensor) -> Tensor:
        return F.linear(inputs_TI, self.weight, self.bias)

    def rows(self, ids_T: Tensor) -> Tensor:
        """Rows of the matrix, for one that is also an embedding."""
        return F.embedding(ids_T, self.weight)

    @property
    def nbytes(self) -> int:
        """Memory of the weights."""
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)
