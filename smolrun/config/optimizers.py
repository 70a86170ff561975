"""Group `optimizer`: how a gradient becomes an update."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from smolrun.config.base import NotNegative, Positive, Section, Share


class AdamWConfig(Section):
    """Adam with decoupled weight decay."""

    name: Literal["adamw"]
    lr: Positive = Field(description="Highest learning rate, reached after the warm-up")
    betas: Annotated[list[Share], Field(min_length=2, max_length=2)] = Field(
        description="Memory of the gradient's mean and of its square"
    )
    eps: Positive = Field(description="Keeps the update away from a division by zero")
    weight_decay: NotNegative = Field(description="Pull of every weight towards zero")


class SGDConfig(Section):
    """Stochastic gradient descent."""

    name: Literal["sgd"]
    lr: Positive = Field(description="Highest learning rate, reached after the warm-up")
    momentum: Share = Field(description="Memory of earlier gradients; 0 = none")
    weight_decay: NotNegative = Field(description="Pull of every weight towards zero")
    nesterov: bool = Field(description="Look ahead along the momentum; needs momentum above 0")


class LionConfig(Section):
    """Steps of one size, by the sign of a running mean."""

    name: Literal["lion"]
    lr: Positive = Field(description="Highest learning rate, reached after the warm-up")
    betas: Annotated[list[Share], Field(min_length=2, max_length=2)] = Field(
        description="Share of the memory in the direction; memory of the gradient's mean"
    )
    weight_decay: NotNegative = Field(description="Pull of every weight towards zero")


class AdafactorConfig(Section):
    """Adam with almost no memory: rows and columns of a matrix share what is remembered."""

    name: Literal["adafactor"]
    lr: Positive = Field(description="Largest step, relative to the size of the weights")
    beta2_decay: Annotated[float, Field(le=0)] = Field(
        description="How fast the memory of squared gradients grows longer: 1 - step^this",
        json_schema_extra={"allowed": "a number <= 0"},
    )
    eps: Annotated[list[Positive], Field(min_length=2, max_length=2)] = Field(
        description="Smallest gradient that counts; smallest size that a tensor is taken to have"
    )
    d: Annotated[float, Field(ge=1)] = Field(
        description="Longest update (root mean square) before the step size",
        json_schema_extra={"allowed": "a number >= 1"},
    )
    weight_decay: NotNegative = Field(description="Pull of every weight towards zero")


Optimizer = Annotated[
    AdamWConfig | AdafactorConfig | LionConfig | SGDConfig, Field(discriminator="name")
]
