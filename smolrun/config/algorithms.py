"""Group `algorithm`: how the ranks share the work."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, Tag

from smolrun.config.base import Auto, Count, NotNegative, Positive, Target
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


class EDP(Target):
    """A server and workers that never wait for each other; ranks may come, go and come back."""

    is_elastic: ClassVar[bool] = True

    target: Literal["smolrun.algorithms.edp:edp"]
    server_trains: bool = Field(
        description="Whether the server takes samples too; others wait for it meanwhile"
    )
    pushes_per_batch: Auto | Count = Field(
        description="Parts of a global batch, each an update of its own; auto = one per rank that "
        "trains"
    )
    damping: Literal["none", "inverse", "inverse_sqrt"] = Field(
        description="How much less the learning rate is for a gradient that is `age` updates late: "
        "inverse = 1 / (1 + age), inverse_sqrt = the root of that, none = not at all"
    )
    patience: NotNegative = Field(
        description="A worker waits for the weights with its own push in them if that takes at "
        "most this share of its computing time; 0 = never, which makes gradients twice as late"
    )
    min_ranks: Count = Field(
        description="With fewer ranks than that, the server counted, the run ends"
    )


Algorithm = Annotated[
    Annotated[Single, Tag("Single")]
    | Annotated[ClassicDP, Tag("ClassicDP")]
    | Annotated[FSDP, Tag("FSDP")]
    | Annotated[SyncPS, Tag("SyncPS")]
    | Annotated[EDP, Tag("EDP")]
    | Custom,
    own_target(Single, ClassicDP, FSDP, SyncPS, EDP),
]
