"""What a model is built from, and how its parameters are initialised.

A model is plain torch: it knows nothing of ranks, meshes or configuration objects.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from smolrun.models.shape import DecoderShape

Kind = Literal["tokens", "features"]


class ModelSpec(Protocol):
    """What the data requires of the model; `smolrun.data.prepared.Prepared` fits.

    num_outputs is the vocabulary size, or the number of classes. num_inputs is the number of
    features of one sample (None for tokens); sequence_length counts tokens (None for features).
    model_folder is where a model that had to be fetched lies (None: it had not).
    """

    @property
    def num_outputs(self) -> int: ...
    @property
    def num_inputs(self) -> int | None: ...
    @property
    def sequence_length(self) -> int | None: ...
    @property
    def model_folder(self) -> str | None: ...


@dataclass(frozen=True)
class Init:
    """How one parameter starts; std is only read where kind is "normal" (its mean is 0).

    A model gives it by `init_rule(name, parameter) -> Init`, and may then be built on the meta
    device, that is, without any memory for its parameters.
    """

    kind: Literal["normal", "zeros", "ones"]
    std: float = 0.0


@runtime_checkable
class StagedModel(Protocol):
    """A decoder that can be cut into stages of layers: the one with the embedding takes token ids,
    all others hidden states [B, T, D]; the one with the head returns logits, all others hidden
    states. Parameters keep the names that they have in the whole model."""

    shape: DecoderShape
    vocab_size: int

    @property
    def tied_parameter(self) -> str | None:
        """The parameter that both the first and the last stage hold."""

    def keep_stage(self, layers: range, has_embedding: bool, has_head: bool) -> None:
        """Drops what is outside of a stage, in place."""
