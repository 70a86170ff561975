"""Group `optimizer`: how a gradient becomes an update."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from smolrun.config.base import NotNegative, Positive, Section, Share


class AdamWConfig(Section):
    """Adam with decoupled weight decay."""

    name: Literal["adamw"]
    lr: Positive = Field(description="Peak learning rate, reached after the warm-up")
    betas: Annotated[list[Share], Field(min_length=2, max_length=2)] = Field(
        description="beta1, beta2: decay rates of the first and second moments"
    )
    eps: Positive = Field(description="Added to the denominator")
    weight_decay: NotNegative = Field(description="Decoupled weight decay")


class SGDConfig(Section):
    """Stochastic gradient descent."""

    name: Literal["sgd"]
    lr: Positive = Field(description="Peak learning rate, reached after the warm-up")
    momentum: Share = Field(description="Momentum factor; 0 = none")
    weight_decay: NotNegative = Field(description="Decoupled weight decay")
    nesterov: bool = Field(description="Nesterov momentum; needs momentum above 0")


class LionConfig(Section):
    """Lion: the sign of an interpolated momentum."""

    name: Literal["lion"]
    lr: Positive = Field(description="Peak learning rate, reached after the warm-up")
    betas: Annotated[list[Share], Field(min_length=2, max_length=2)] = Field(
        description="beta1, beta2: momentum in the update direction; decay rate of the momentum"
    )
    weight_decay: NotNegative = Field(description="Decoupled weight decay")


class AdafactorConfig(Section):
    """Adafactor: second moments factored into one value per row and column of a matrix."""

    name: Literal["adafactor"]
    lr: Positive = Field(description="Learning rate, relative to the RMS of the weights")
    beta2_decay: Annotated[float, Field(le=0)] = Field(
        description="Decay of the second moment at step t: 1 - t^this",
        json_schema_extra={"allowed": "a number <= 0"},
    )
    eps: Annotated[list[Positive], Field(min_length=2, max_length=2)] = Field(
        description="eps1 (of squared gradients), eps2 (lower bound of the RMS of a tensor)"
    )
    d: Annotated[float, Field(ge=1)] = Field(
        description="Clipping threshold: RMS of the update",
        json_schema_extra={"allowed": "a number >= 1"},
    )
    weight_decay: NotNegative = Field(description="Decoupled weight decay")


Optimizer = Annotated[
    AdamWConfig | AdafactorConfig | LionConfig | SGDConfig, Field(discriminator="name")
]
