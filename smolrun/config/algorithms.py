"""Group `algorithm`: how the ranks share the work."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, Tag

from smolrun.config.base import Count, NotNegative, Positive, Target
from smolrun.config.targets import Custom, own_target


class Single(Target):
    """One rank that holds everything: the reference that all others must equal."""

    target: Literal["smolrun.algorithms.single:Single"]


class ClassicDP(Target):
    """A replica on every rank; a ring all_reduce averages gradients while backward still runs."""

    target: Literal["smolrun.algorithms.classicdp:ClassicDP"]
    bucket_mb: Positive = Field(
        description="Gradients travel in buckets of this size; smaller overlaps more"
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


class SyncPS(Target):
    """One rank has the optimizer: the others send it gradients, and get new weights, in step."""

    target: Literal["smolrun.algorithms.syncps:syncps"]
    server_trains: bool = Field(
        description="Whether the server takes samples too; false = the others share all of them"
    )
    straggler_s: NotNegative = Field(
        description="Go on so long after the first gradient of a step, without those that are "
        "late; 0 = wait for all"
    )
    polyak: Annotated[float, Field(ge=0, lt=1)] = Field(
        description="Evaluate, save and export an average of the weights too, of which so much "
        "stays with every update; 0 = none"
    )
    pull: Literal["newest", "average"] = Field(description="The weights that gradients are of")
    bucket_mb: Positive = Field(
        description="Gradients travel in buckets of this size; smaller overlaps more"
    )


Algorithm = Annotated[
    Annotated[Single, Tag("Single")]
    | Annotated[ClassicDP, Tag("ClassicDP")]
    | Annotated[FSDP, Tag("FSDP")]
    | Annotated[SyncPS, Tag("SyncPS")]
    | Custom,
    own_target(Single, ClassicDP, FSDP, SyncPS),
]
