"""What the ranks of a run are to each other, asked of the configuration: whether they go step by
step together, and whether rank 0 only serves the others."""

from __future__ import annotations

from collections.abc import Iterator

from smolrun.config import RunConfig, ranks, world_size
from smolrun.config.algorithms import EDP, SyncPS


def waits_for_all(config: RunConfig) -> bool:
    """Whether every step waits for its slowest rank, as in most algorithms."""
    algorithm = config.algorithm
    is_loose = isinstance(algorithm, SyncPS) and algorithm.straggler_s > 0
    return not (is_loose or isinstance(algorithm, EDP))


def only_serves(config: RunConfig) -> bool:
    """Whether rank 0 has the optimizer, and no samples."""
    algorithm = config.algorithm
    if not isinstance(algorithm, EDP | SyncPS):
        return False
    return world_size(config) > 1 and not algorithm.server_trains


def late_gradients(config: RunConfig) -> int:
    """How many gradients of earlier steps a rank has in memory beside its newest."""
    bound = config.staleness.bound
    # There a bound says how far a worker may be behind; what it pushed, it does not keep.
    return 0 if bound == "auto" or isinstance(config.algorithm, EDP) else bound


def tell_roles(config: RunConfig) -> Iterator[str]:
    """Whom a user might miss among those that train."""
    if only_serves(config):
        where = ranks(config)[0].host
        yield f"rank 0 on {where} serves and does not train (algorithm.server_trains=false)"
