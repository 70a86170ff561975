"""Group `optimizer`: how a gradient becomes an update."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from smolrun.config.base import NotNegative, Positive, Section, Share


class AdamWConfig(Section):
    """Adam with decoupled weight decay."""

    name: Literal["adamw"]
    lr: Positive
    betas: Annotated[list[Share], Field(min_length=2, max_length=2)]
    eps: Positive
    weight_decay: NotNegative


class SGDConfig(Section):
    """Stochastic gradient descent."""

    name: Literal["sgd"]
    lr: Positive
    momentum: Share
    weight_decay: NotNegative
    nesterov: bool


class LionConfig(Section):
    """Lion: the sign of an interpolated momentum."""

    name: Literal["lion"]
    lr: Positive
    betas: Annotated[list[Share], Field(min_length=2, max_length=2)]
    weight_decay: NotNegative


class AdafactorConfig(Section):
    """Adafactor: second moments factored into one value per row and column of a matrix."""

    name: Literal["adafactor"]
    lr: Positive
    beta2_decay: Annotated[float, Field(le=0)]
    eps: Annotated[list[Positive], Field(min_length=2, max_length=2)]
    d: Annotated[float, Field(ge=1)]
    weight_decay: NotNegative


Optimizer = Annotated[
    AdamWConfig | AdafactorConfig | LionConfig | SGDConfig, Field(discriminator="name")
]
