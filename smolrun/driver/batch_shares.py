"""Who computes how much of a global batch: by the speeds of the cluster file, or as measured.

Only wiring: the plans are in parts/placement.py, the decision in training/load_balancer.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from smolrun.config import RunConfig, has_dedicated_server, world_size
from smolrun.events import Event
from smolrun.parts.placement import (
    BatchPlan,
    BatchPlans,
    DataCoordinates,
    plan_batches,
    rank_speeds,
    ranked_hosts,
    shares,
)
from smolrun.training.load_balancer import BalancePolicy, LoadBalancer
from smolrun.training.loader import prefetched_steps

if TYPE_CHECKING:
    from smolrun.data.prepared import Prepared
    from smolrun.training.loader import PlanSource


def largest_plan(config: RunConfig) -> BatchPlan:
    """The plan of the rank with the largest share, as the run begins."""
    micro = config.training.micro_batch_size
    weights = _numbers(rank_speeds(config.cluster.model_dump(), world_size(config)))
    has_server = has_dedicated_server(config)
    parts = config.algorithm.batch_parts(world_size(config) - has_server)
    if parts is not None:
        weights = [1.0] * parts
    elif has_server:
        weights[0] = 0.0
    return plan_batches(
        config.training.global_batch_size,
        weights,
        weights.index(max(weights)),
        None if micro == "auto" else micro,
    )


def _numbers(speeds: Sequence[float | str]) -> list[float]:
    return [1.0 if speed == "auto" else float(speed) for speed in speeds]


def share_work(
    config: Mapping[str, Any],
    prepared: Prepared,
    speeds: Sequence[float | str],
    coordinates_of: Callable[[Sequence[float]], DataCoordinates],
    emit: Callable[[Event], None],
) -> tuple[PlanSource, LoadBalancer | None]:
    """This rank's plan, and what changes it where a speed is "auto". `coordinates_of` says
    which part of a batch the rank reads.

    Numbers are used as they are. One "auto" is enough to have all ranks measured, because measured
    speeds and given numbers have no unit in common: then the numbers are where it begins.
    """
    training = config["training"]
    size = training["global_batch_size"]
    micro = None if training["micro_batch_size"] == "auto" else training["micro_batch_size"]
    coordinates = coordinates_of(_numbers(speeds))
    weights, index = coordinates.weights, coordinates.index
    if "auto" not in speeds:
        return plan_batches(size, weights, index, micro), None
    counts = shares(size, weights)
    plans = BatchPlans(lambda now: plan_batches(size, now, index, micro), counts)
    idle = [number for number, weight in enumerate(weights) if not weight]
    ahead = 0 if prepared.stream is None else prefetched_steps(prepared.stream["prefetch_steps"])
    hosts = [host["name"] for host in ranked_hosts(config.get("cluster"))]
    return plans, LoadBalancer(
        BalancePolicy(counts, idle=idle),
        plans,
        steps=training["steps"],
        emit=emit,
        prefetched_steps=ahead,
        hosts=hosts,
    )
