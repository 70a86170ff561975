"""Which runs go on without some of their ranks, and how many they need: asked of the
configuration, before anything is started."""

from __future__ import annotations

from collections.abc import Collection

from smolrun.config import RunConfig, ranks


def least_ranks(config: RunConfig) -> int | None:
    """How many ranks, rank 0 included, an elastic run needs; None where a run needs them all.

    An algorithm is elastic if the class of its configuration says `is_elastic`.
    """
    if not getattr(config.algorithm, "is_elastic", False):
        return None
    return int(getattr(config.algorithm, "min_ranks", 1))


def is_enough(config: RunConfig, missing: Collection[str]) -> bool:
    """Whether an elastic run can begin without these hosts."""
    there = [rank.rank for rank in ranks(config) if rank.host not in missing]
    return 0 in there and len(there) >= (least_ranks(config) or 0)
