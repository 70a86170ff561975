"""Ranks that are slow now and then: what staleness K wins, beside what it could win at best.

    K = 0    every step lasts as long as its slowest rank
    K = 3    a rank that was slow catches up while the others go on, three steps ahead at most

The best is what an event simulation of the very same trace gives, with a network that takes no
time. The trace says how long every rank computes in every step; real ranks follow it by waiting, so
a small network stands for any, and four ranks fit on two cores. Only the waiting is played: steps,
collectives and sockets are real."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from smolrun.algorithms.classicdp import ClassicDP
from smolrun.benchmarks.compare import summed
from smolrun.benchmarks.paced import SetPace, paced_context
from smolrun.collectives.api import new_group
from smolrun.data.base import Batch
from smolrun.mesh.mesh import Mesh

Trace = list[list[float]]  # seconds of computing, by step and rank


def straggling(
    *, ranks: int, steps: int, step_s: float, chance: float, factor: float, seed: int
) -> Trace:
    """On `chance` of the steps one rank, any of them, takes `factor` times as long."""
    dice = random.Random(seed)  # noqa: S311  (a trace, no secret)
    trace = [[step_s] * ranks for _ in range(steps)]
    for row in trace:
        if dice.random() < chance:
            row[dice.randrange(ranks)] *= factor
    return trace


def simulated_s(trace: Trace, bound: int) -> float:
    """How long the trace takes where no rank begins step t before all are done with t - bound - 1,
    and the network takes no time."""
    clocks = [0.0] * len(trace[0])
    all_done: list[float] = []
    for step, times in enumerate(trace):
        may_begin = all_done[step - bound - 1] if step > bound else 0.0
        clocks = [max(clock, may_begin) + t for clock, t in zip(clocks, times, strict=True)]
        all_done.append(max(clocks))
    return all_done[-1]


def compare_bounds(
    mesh: Mesh,
    bounds: Sequence[int],
    *,
    steps: int,
    step_s: float,
    chance: float,
    factor: float,
    repeats: int,
) -> Iterator[dict[str, Any]]:
    """One row per bound; collective. `efficiency` is 1 where no rank ever waits for another."""
    meet = new_group(mesh).barrier
    for bound in bounds:
        taken, best = [], []
        for repeat in range(repeats):
            trace = straggling(
                ranks=mesh.world_size,
                steps=steps,
                step_s=step_s,
                chance=chance,
                factor=factor,
                seed=repeat,
            )
            meet()
            taken.append(_run(mesh, trace, bound))
            best.append((simulated_s(trace, bound) / steps, 1.0))
        result = summed(taken, best)
        yield {
            **result.row(
                "stragglers",
                f"staleness {bound}",
                "event simulation",
                **facts(mesh, steps),
            ),
            "efficiency": step_s / result.ours_s,
            "best_efficiency": step_s / result.peer_s,
        }


def facts(mesh: Mesh, steps: int) -> dict[str, Any]:
    """What was measured, for a row."""
    parameters = sum(p.numel() for p in network().parameters())
    return {
        "world_size": mesh.world_size,
        "parameters": parameters,
        "steps": steps,
        "paced": True,
    }


def network() -> torch.nn.Module:
    """Small, as its computing is played."""
    return torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))


def _run(mesh: Mesh, trace: Trace, bound: int) -> tuple[float, float]:
    """Seconds of clock and of processor per step."""
    pace = SetPace()
    context = paced_context(mesh, pace, staleness=bound)
    algorithm = ClassicDP(context, bucket_mb=1.0)
    algorithm.place(network())
    batch = Batch(torch.ones(2, 32), torch.zeros(2, dtype=torch.int64))
    algorithm.collectives.barrier()
    wall, cpu = time.perf_counter(), time.process_time()
    for row in trace:
        pace.next_s = row[mesh.rank]
        algorithm.train_step([batch])
    algorithm.drain()
    steps = len(trace)
    return (time.perf_counter() - wall) / steps, (time.process_time() - cpu) / steps
