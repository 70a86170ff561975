"""Ranks that are slow now and then under algorithm=edp: how much of their time workers compute.

    worker   [ compute ][ compute, slow now and then       ][ compute ]     no gap: 1
    worker   [ compute ]...[ compute ]...[ compute ]                        gaps: less

Paced as in stragglers.py, and one run of many tickets. A worker counts its time from its first
ticket to the end of its last one, since at the very end there is no work left for all."""

from __future__ import annotations

import random
import time
from typing import Any

import torch

from smolrun.algorithms.base import Algorithm
from smolrun.algorithms.edp import edp
from smolrun.benchmarks.compare import summed
from smolrun.benchmarks.stragglers import ScriptedPace, facts, network, paced_context
from smolrun.collectives.api import new_group
from smolrun.data.splits import Batch
from smolrun.mesh.mesh import Mesh


def compare_edp(
    mesh: Mesh,
    *,
    steps: int,
    step_s: float,
    chance: float,
    factor: float,
    repeats: int,
    wait_fraction: float,
) -> dict[str, Any]:
    """The row of edp with a server and workers on all other ranks; collective, and once on a mesh.

    `ratio` is a worker's time beside its computing, 1 where it never waits for anything. Every
    ticket is slow with the chance that a rank has in a step of `compare_bounds`."""
    pace = ScriptedPace()
    algorithm = edp(
        paced_context(mesh, pace),
        server_trains=False,
        pushes_per_batch="auto",
        staleness_lr_scale="inverse",
        wait_fraction=wait_fraction,
        min_ranks=2,
    )
    algorithm.place(network())
    new_group(mesh).barrier()
    took = torch.zeros(mesh.world_size, 2, repeats, dtype=torch.float64)
    cpu = time.process_time()
    if mesh.rank == 0:
        while algorithm.next_assignment(steps * repeats) is not None:
            algorithm.train_step([])
    else:
        dice = random.Random(mesh.rank)  # noqa: S311  (a trace, no secret)
        slow = chance / (mesh.world_size - 1)
        spans = _work(algorithm, pace, steps * repeats, dice, slow, step_s, factor)
        for index, part in enumerate(torch.tensor(spans).tensor_split(repeats)):
            took[mesh.rank, :, index] = part.mean(0)
    cpu = (time.process_time() - cpu) / (steps * repeats)
    new_group(mesh).all_reduce(took)
    walls, computing = took[1:].mean(0).tolist()
    result = summed([(wall, cpu) for wall in walls], [(compute, 1.0) for compute in computing])
    row = result.row(
        "stragglers",
        f"edp, {mesh.world_size - 1} workers",
        "never waiting",
        **facts(mesh, steps),
    )
    return {**row, "efficiency": 1 / result.ratio, "best_efficiency": 1.0}


def _work(
    algorithm: Algorithm,
    pace: ScriptedPace,
    steps: int,
    dice: random.Random,
    slow: float,
    step_s: float,
    factor: float,
) -> list[tuple[float, float]]:
    """Seconds from the end of a ticket to the end of the next, and of them computing."""
    batch = Batch(torch.ones(2, 32), torch.zeros(2, dtype=torch.int64))
    spans: list[tuple[float, float]] = []
    last = None
    while algorithm.next_assignment(steps) is not None:
        last = time.perf_counter() if last is None else last
        pace.next_s = step_s * (factor if dice.random() < slow else 1.0)
        computing = pace.next_s
        algorithm.train_step([batch])
        now = time.perf_counter()
        spans.append((now - last, computing))
        last = now
    return spans
