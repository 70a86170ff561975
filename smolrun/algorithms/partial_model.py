"""What algorithms share whose ranks hold parts of a model, by name: stages of layers (mp), some of
the experts (ep). A checkpoint has the names and shapes of the whole model, whatever the parts are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn

from smolrun.algorithms.base import Algorithm
from smolrun.algorithms.layer_cut import without_values
from smolrun.checkpoints.tensor_slice import TensorSlice
from smolrun.parts.replicas import model_tensors


class PartialModel(Algorithm):
    """A rank has some parameters of the model whole, and knows the shapes of the others."""

    needs_full_model = False

    def keep_part(self, model: nn.Module, drop: Callable[[], None]) -> None:
        """`drop` removes from the model what other ranks hold; what stays gets its first values."""
        self._whole = without_values(model)
        drop()
        for name, parameter in model.named_parameters():
            value = self.context.first_value(model, name, parameter)
            parameter.data = value.to(parameter.device, parameter.dtype)

    def trained_names(self) -> list[str]:
        """Of all parameters of the whole model that are trained."""
        return [name for name, parameter in self._whole.items() if parameter.requires_grad]

    def model_slices(self) -> Iterator[TensorSlice]:
        """This rank's parameters, and no element of the others."""
        yield from super().model_slices()
        held = dict(model_tensors(self.model))
        for name, parameter in self._whole.items():
            if name not in held:
                nothing = torch.empty(0, dtype=parameter.dtype)
                yield TensorSlice(f"model/{name}", tuple(parameter.shape), 0, nothing, "other")

    def is_on_other_rank(self, name: str) -> bool:
        """Whether this rank has no part of a parameter."""
        return name in self._whole and name not in dict(self.optimized_params)

    def whole_parameters(self) -> Iterator[nn.Parameter]:
        """Of all ranks, without values."""
        yield from self._whole.values()
