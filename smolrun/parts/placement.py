"""Shares of batches, memory and samples, and cuts of layers: pure arithmetic. Knows nothing of
tensors or addresses.

Source of the cut: the linear partition problem, as PipeDream (arXiv:1806.03377) uses it.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any


def shares(total: int, weights: Sequence[float]) -> list[int]:
    """`total` integers split in proportion to `weights`, by largest remainder; they add up
    exactly.

    Equal remainders go to the lower index, so every rank computes the same split.
    """
    if not weights or min(weights) < 0 or sum(weights) <= 0:
        raise ValueError(f"weights must be positive numbers, got {list(weights)}")
    exact = [total * weight / sum(weights) for weight in weights]
    counts = [int(value) for value in exact]
    by_remainder = sorted(
        range(len(weights)), key=lambda index: (counts[index] - exact[index], index)
    )
    for index in by_remainder[: total - sum(counts)]:
        counts[index] += 1
    return counts


def ranked_hosts(cluster: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """The host of every rank, in rank order; empty where the cluster is this machine alone."""
    hosts = (cluster or {}).get("hosts") or []
    return [host for host in hosts for _ in range(host["ranks"])]


def known_speeds(speeds: Sequence[float | str]) -> list[float]:
    """The speeds to start with: 1.0 where a rank's speed is still to be measured ("auto")."""
    return [1.0 if speed == "auto" else float(speed) for speed in speeds]


def rank_speeds(cluster: Mapping[str, Any] | None, world_size: int) -> list[float | str]:
    """The speed of every rank, a number or "auto", as the cluster gives it for its host."""
    return [host["speed"] for host in ranked_hosts(cluster)] or [1.0] * world_size


def memory_shares(hosts: Sequence[Mapping[str, Any]] | None) -> tuple[float, ...]:
    """How much memory each rank has, relative to others; empty where that is not known of all."""
    if not hosts or not all(host["memory_gb"] for host in hosts):
        return ()
    return tuple(host["memory_gb"] / host["ranks"] for host in ranked_hosts({"hosts": hosts}))


def memory_limits(hosts: Sequence[Mapping[str, Any]] | None) -> tuple[float, ...]:
    """Bytes that each rank can hold, infinite where that is not known; empty without hosts."""
    ranked = ranked_hosts({"hosts": hosts})
    return tuple((host["memory_gb"] or math.inf) * 2**30 / host["ranks"] for host in ranked)


@dataclass(frozen=True)
class DataCoordinates:
    """Which samples a rank reads: index i gets a part of every global batch in proportion to
    `weights[i]`, and this rank has `index`. Ranks of one pipeline have the same index, and want
    that many micro-batches at least, where there are as many samples."""

    index: int
    weights: Sequence[float]
    micro_batches: int = 1


def least_of_stages(values: Sequence[float], stages: int) -> list[float]:
    """Of the ranks that hold each stage, one in every replica of a pipeline: what all of them can
    hold, or how fast the slowest is. `values` are in rank order, replica after replica."""
    return [min(values[stage::stages]) for stage in range(stages)] if values else []


def replica_weights(speeds: Sequence[float], stages: int) -> list[float]:
    """Shares of the samples of every replica of a pipeline of so many stages, all cut alike: how
    much faster than the slowest rank of each stage its own slowest one is."""
    least = least_of_stages(speeds, stages)
    return [
        min(speed / slowest for speed, slowest in zip(speeds[first:], least, strict=False))
        for first in range(0, len(speeds), stages)
    ]


@dataclass(frozen=True)
class BatchPlan:
    """How one rank walks its part of every global batch.

    All ranks run the same number of micro-batches, so that collectives meet; their sizes differ and
    may be 0."""

    first: int  # this rank's first sample within the global batch
    sizes: tuple[int, ...]  # samples per micro-batch
    global_batch_size: int
    micro_batch_size: int | None = None  # the most samples at once; None: as many as there are

    def at(self, step: int) -> BatchPlan:
        """This plan, which holds for every step."""
        return self

    def part(self, index: int, count: int) -> BatchPlan:
        """The plan of one of `count` equal parts of every global batch; no samples where `count`
        is 0."""
        if not count:
            return BatchPlan(0, (), self.global_batch_size, self.micro_batch_size)
        return plan_batches(self.global_batch_size, [1.0] * count, index, self.micro_batch_size)

    def alone(self, count: int) -> BatchPlan:
        """The plan of a rank that takes whole batches: with no more samples at once than one of
        `count` ranks would have."""
        most = self.micro_batch_size or -(-self.global_batch_size // count)
        return plan_batches(self.global_batch_size, [1.0], 0, most)

    def positions(self, step: int) -> list[range]:
        """The global sample positions of each micro-batch of a step."""
        first = step * self.global_batch_size + self.first
        return [range(*ends) for ends in pairwise(accumulate(self.sizes, initial=first))]


def plan_batches(
    global_batch_size: int,
    weights: Sequence[float],
    rank: int,
    micro_batch_size: int | None = None,
    micro_batches: int = 1,
) -> BatchPlan:
    """Rank `rank`'s part of a batch shared by `weights` (speeds); at most `micro_batch_size`
    samples at once, in at least so many micro-batches where there are as many samples."""
    counts = shares(global_batch_size, weights)
    largest = max(counts)
    num_micro_batches = max(
        -(-largest // (micro_batch_size or largest)), min(micro_batches, largest)
    )
    sizes = shares(counts[rank], [1.0] * num_micro_batches)
    return BatchPlan(sum(counts[:rank]), tuple(sizes), global_batch_size, micro_batch_size)


class BatchPlans:
    """One rank's plan of every step, where the shares may change; on all ranks alike."""

    def __init__(
        self, plan: Callable[[Sequence[float]], BatchPlan], weights: Sequence[float]
    ) -> None:
        """`plan(weights)` is this rank's plan for such shares, which are `weights` at first."""
        self._plan = plan
        self.shares: list[tuple[int, list[float]]] = [(0, list(weights))]  # (from step, weights)

    def at(self, step: int) -> BatchPlan:
        """The plan that holds in a step, not one long past."""
        return self._plan(next(shares for first, shares in self.shares[::-1] if first <= step))

    def change(self, now: int, first: int, weights: Sequence[float]) -> None:
        """Other shares from step `first` on; steps before `now` will not be asked for again."""
        past = [index for index, (begun, _) in enumerate(self.shares) if begun <= now]
        self.shares = [*self.shares[past[-1] :], (first, list(weights))]


@dataclass(frozen=True)
class Stages:
    """Layers cut into contiguous stages: `layers[rank]` are those of a rank, empty if it was left
    out; `seconds[rank]` is its time for one pass, without hops."""

    layers: list[range]
    seconds: list[float]


def cut(
    costs: Sequence[float],
    speeds: Sequence[float],
    *,
    sizes: Sequence[float] | None = None,
    limits: Sequence[float] | None = None,
    shared_size: float = 0.0,
    may_leave_out: bool = False,
) -> Stages | None:
    """The cut of layers over ranks, in order, whose slowest stage is as fast as possible; of those
    the one with the least sum of times. None if no cut fits.

    `costs[layer]` are seconds at speed 1, with those of the embedding in the first one and of the
    head in the last. `sizes[layer]` are bytes and `limits[rank]` what a rank can hold; a rank with
    both ends holds `shared_size` bytes less (a tied embedding). Every rank gets a layer, unless
    `may_leave_out`: then ranks may stay empty.

    Exact, by dynamic programming over (ranks, layers): O(ranks x layers^2)."""
    if not costs or min(costs) < 0 or not speeds or min(speeds) <= 0:
        raise ValueError(f"costs and speeds must be positive: {list(costs)}, {list(speeds)}")
    seconds_before = [0.0, *accumulate(costs)]
    bytes_before = [0.0, *accumulate(sizes or [0.0] * len(costs))]

    def seconds(rank: int, first: int, end: int) -> float:
        """Of a stage; infinite where it is not allowed."""
        if first == end:
            return 0.0 if may_leave_out else math.inf
        size = bytes_before[end] - bytes_before[first]
        size -= shared_size if (first, end) == (0, len(costs)) else 0
        fits = limits is None or size <= limits[rank]
        return (seconds_before[end] - seconds_before[first]) / speeds[rank] if fits else math.inf

    slowest = _best_ends(len(costs), len(speeds), seconds, max)
    if slowest is None:
        return None
    most = max(seconds(rank, *ends) for rank, ends in enumerate(pairwise(slowest)))

    def seconds_within(rank: int, first: int, end: int) -> float:
        needed = seconds(rank, first, end)
        return needed if needed <= most else math.inf

    ends = _best_ends(len(costs), len(speeds), seconds_within, operator.add)
    assert ends is not None, "the cut with the fastest slowest stage is within its own time"
    stages = [range(*pair) for pair in pairwise(ends)]
    return Stages(stages, [seconds(rank, *pair) for rank, pair in enumerate(pairwise(ends))])


def _best_ends(
    num_layers: int,
    num_ranks: int,
    seconds: Callable[[int, int, int], float],
    join: Callable[[float, float], float],
) -> list[int] | None:
    """Layer 0, and the end of each rank's stage, with the least `join` of all seconds; None if it
    is infinite."""
    best = [0.0] + [math.inf] * num_layers  # of the ranks so far, by layers that they hold
    chosen: list[list[int]] = []  # by rank and end: where its stage begins
    for rank in range(num_ranks):
        firsts = []
        following = []
        for end in range(num_layers + 1):
            options = [
                (join(best[first], seconds(rank, first, end)), first)
                for first in range(end + 1)
                if best[first] < math.inf
            ]
            value, first = min(options, default=(math.inf, 0))
            following.append(value)
            firsts.append(first)
        best = following
        chosen.append(firsts)
    if best[num_layers] == math.inf:
        return None
    ends = [num_layers]
    for firsts in reversed(chosen):
        ends.append(firsts[ends[-1]])
    return ends[::-1]


def checked_layers(layers: Sequence[Sequence[int]], num_layers: int, num_ranks: int) -> list[range]:
    """Stages that were given as [first layer, last layer], one a rank; [] leaves a rank out.
    ValueError says what is wrong with them."""
    if len(layers) != num_ranks:
        raise ValueError(f"{len(layers)} stages for {num_ranks} ranks; write one for each rank")
    stages, following = [], 0
    for rank, stage in enumerate(layers):
        if not stage:
            stages.append(range(following, following))
            continue
        if len(stage) != 2:
            raise ValueError(f"rank {rank}: write [first layer, last layer], not {list(stage)}")
        first, last = stage
        if first != following or last < first:
            raise ValueError(
                f"rank {rank}: layers {first} to {last} do not continue at layer {following}; "
                "stages are in the order of ranks, without gaps"
            )
        following = last + 1
        stages.append(range(first, following))
    if following != num_layers:
        raise ValueError(
            f"the stages end with layer {following - 1}, but the model has layers 0 to "
            f"{num_layers - 1}"
        )
    return stages
