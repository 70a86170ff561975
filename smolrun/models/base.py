"""What the house asks of a model: how it is built, what it reads, how its parameters start.

Knows nothing of ranks, meshes or configuration objects: a model is plain torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from torch import Tensor

Kind = Literal["tokens", "features"]


class ModelSpec(Protocol):
    """What the data asks of the model; `smolrun.data.base.Prepared` fits.

    num_outputs is the vocabulary size for tokens or the number of classes for features. num_inputs
    is the number of features of one sample (None for tokens). sequence_length is in tokens (None
    for features).
    """

    @property
    def num_outputs(self) -> int: ...
    @property
    def num_inputs(self) -> int | None: ...
    @property
    def sequence_length(self) -> int | None: ...


@dataclass(frozen=True)
class Init:
    """How one parameter starts; std is only read where kind is "normal" (its mean is 0)."""

    kind: Literal["normal", "zeros", "ones"]
    std: float = 0.0


@runtime_checkable
class HasInitRule(Protocol):
    """A model that tells how each of its parameters starts, and so may be built on the meta device."""

    def init_rule(self, name: str, parameter: Tensor) -> Init: ...
