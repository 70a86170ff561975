"""Group `algorithm`: how the ranks share the work."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, Tag

from smolrun.config.base import Positive, Target
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


Algorithm = Annotated[
    Annotated[Single, Tag("Single")] | Annotated[ClassicDP, Tag("ClassicDP")] | Custom,
    own_target(Single, ClassicDP),
]
