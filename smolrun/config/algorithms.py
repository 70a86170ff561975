"""Group `algorithm`: how the ranks share the work."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, Tag

from smolrun.config.base import Auto, Count, Positive, Target
from smolrun.config.targets import Custom, own_target


class Single(Target):
    """One rank that holds everything: the reference that all others must equal."""

    target: Literal["smolrun.algorithms.single:Single"]


class ClassicDP(Target):
    """A replica on every rank; a ring all_reduce averages gradients while backward still runs."""

    target: Literal["smolrun.algorithms.classicdp:classicdp"]
    bucket_mb: Positive = Field(
        description="Gradients travel in buckets of this size; smaller overlaps more"
    )
    owner_computes: Auto | bool = Field(
        description="Every rank updates its own part of the model and sends it to the others, so "
        "that replicas are equal to the last bit; auto = where ranks differ in system, processor, "
        "torch or device, and the optimizer is not adafactor"
    )


class FSDP(Target):
    """As classicdp, but optimizer, gradients and parameters are cut among the ranks, not copied."""

    target: Literal["smolrun.algorithms.fsdp:fsdp"]
    stage: Literal[0, 1, 2, 3] = Field(
        description="Cut among the ranks: 0 nothing, 1 the optimizer, 2 gradients too, "
        "3 parameters too"
    )
    bucket_mb: Positive = Field(
        description="Gradients travel in buckets of this size; stage 3 gathers smaller layers "
        "together"
    )
    max_live_buckets: Count = Field(
        description="Stages 2, 3: buckets of gradients that are in memory at one time; more "
        "overlap more",
    )
    prefetch: Annotated[int, Field(ge=0)] = Field(
        description="Stage 3: layers that are fetched before they are used"
    )


Algorithm = Annotated[
    Annotated[Single, Tag("Single")]
    | Annotated[ClassicDP, Tag("ClassicDP")]
    | Annotated[FSDP, Tag("FSDP")]
    | Custom,
    own_target(Single, ClassicDP, FSDP),
]
