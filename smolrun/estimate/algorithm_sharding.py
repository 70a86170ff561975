"""What a dry run has to know of fsdp and syncps: what a rank holds of a replica by a configuration,
and the same configuration with more of it cut."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from importlib.resources import files

import yaml

from smolrun.config import RunConfig, world_size
from smolrun.config.algorithms import EDP, FSDP, ClassicDP, SyncPS
from smolrun.config.sharding import Sharding
from smolrun.estimate.memory import item_bytes


def sharding_of(
    config: RunConfig,
    share: float,
    shapes: Iterable[Sequence[int]],
    largest_layer: int,
    is_first: bool,
) -> Sharding:
    """For a rank that holds `share`, or for rank 0; `largest_layer` counts numbers."""
    algorithm = config.algorithm
    if isinstance(algorithm, ClassicDP) and algorithm.owner_computes is True:
        return Sharding(1, share)
    if isinstance(algorithm, SyncPS):
        workers = world_size(config) - 1
        if is_first:
            return Sharding(links=workers, seats=workers, averages=int(algorithm.polyak > 0))
        return Sharding(stage=1, share=0.0, links=1)
    if isinstance(algorithm, EDP):
        # The server: a push and a copy of the weights for each worker. A worker: two pushes, and
        # the weights that come.
        workers = world_size(config) - 1
        if is_first:
            return Sharding(links=workers, seats=2 * workers)
        return Sharding(stage=1, share=0.0, links=1, seats=3)
    if not isinstance(algorithm, FSDP):
        return Sharding()
    bucket = int(algorithm.bucket_mb * 2**20) // item_bytes(config.precision)
    largest = max(math.prod(shape) for shape in shapes)
    layers = (1 + algorithm.prefetch) * max(bucket, largest_layer)
    return Sharding(
        algorithm.stage, share, max(bucket, largest), algorithm.max_live_buckets, layers
    )


def at_stage(config: RunConfig, stage: int) -> RunConfig:
    """The same run with algorithm=fsdp algorithm.stage=..."""
    file = files("smolrun.conf") / "algorithm" / "fsdp.yaml"
    section = yaml.safe_load(file.read_text(encoding="utf-8"))
    algorithm = FSDP(**{**section, "stage": stage})
    return config.model_copy(update={"algorithm": algorithm})
