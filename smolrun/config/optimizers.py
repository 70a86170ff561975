"""Group `optimizer`: how a gradient becomes an update."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from smolrun.config.base import NotNegative, Positive, Section, Share


class AdamW(Section):
    """Adam with decoupled weight decay."""

    name: Literal["adamw"]
    lr: Positive = Field(description="Highest learning rate, reached after the warm-up")
    betas: Annotated[list[Share], Field(min_length=2, max_length=2)] = Field(
        description="Memory of the gradient's mean and of its square"
    )
    eps: Positive = Field(description="Keeps the update away from a division by zero")
    weight_decay: NotNegative = Field(description="Pull of every weight towards zero")


class SGD(Section):
    """Stochastic gradient descent."""

    name: Literal["sgd"]
    lr: Positive = Field(description="Highest learning rate, reached after the warm-up")
    momentum: Share = Field(description="Memory of earlier gradients; 0 = none")
    weight_decay: NotNegative = Field(description="Pull of every weight towards zero")
    nesterov: bool = Field(description="Look ahead along the momentum; needs momentum above 0")


Optimizer = Annotated[AdamW | SGD, Field(discriminator="name")]
