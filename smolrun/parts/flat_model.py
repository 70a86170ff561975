"""What is trained of a model as a few flat tensors, one per type of number: that is how gradients
and weights travel.

    model     [ embedding | block 0 | block 1 | head ]
    flat      [ head, block 1, block 0, embedding    ]     in this order on all ranks

Knows nothing of who sends it where."""

from __future__ import annotations

import sys
from collections.abc import Iterable

import torch

from smolrun.parts.buckets import pack

Flats = list[torch.Tensor]


class FlatModel:
    """The trained parameters of a model, and how they lie in flat tensors."""

    def __init__(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        self._packs = pack(trained, sys.maxsize)
        self.sizes = [sum(p.numel() for p in packed) for packed in self._packs]
        self.dtypes = [packed[0].dtype for packed in self._packs]

    def zeros(self) -> Flats:
        """Room for all parameters, where they are."""
        return [
            torch.zeros(size, dtype=packed[0].dtype, device=packed[0].device)
            for size, packed in zip(self.sizes, self._packs, strict=True)
        ]

    def host_zeros(self) -> Flats:
        """Room for all parameters in this machine's own memory, from where they can travel."""
        return [
            torch.zeros(size, dtype=dtype)
            for size, dtype in zip(self.sizes, self.dtypes, strict=True)
        ]

    def bind(self, flats: Flats) -> list[torch.Tensor]:
        """Makes every `parameter.grad` a view into `flats`; returns these."""
        for parameter, view in self._views(flats):
            parameter.grad = view
        return flats

    @torch.no_grad()
    def copy_to(self, flats: Flats) -> None:
        """The parameters as they are now."""
        for parameter, view in self._views(flats):
            view.copy_(parameter)

    @torch.no_grad()
    def load(self, flats: Flats) -> None:
        """The parameters become these."""
        for parameter, view in self._views(flats):
            parameter.copy_(view)

    def _views(self, flats: Flats) -> Iterable[tuple[torch.nn.Parameter, torch.Tensor]]:
        for packed, flat in zip(self._packs, flats, strict=True):
            parts = flat.split([parameter.numel() for parameter in packed])
            yield from zip(
                packed, [v.view_as(p) for p, v in zip(packed, parts, strict=True)], strict=True
            )
