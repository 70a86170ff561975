"""Ranks with emulated compute: slow now and then (staleness K), or of unequal speed (shares in
proportion). More ranks than cores, and machines that are not there; steps, collectives and sockets
are real.

    K = 0    every step lasts as long as its slowest rank
    K = 3    a rank that was slow catches up while the others continue, three steps ahead at most

The best possible time is that of an event simulation of the same trace, with a network that takes
no time. The trace says how long every rank computes in every step; ranks follow it by sleeping, so
a small network stands for any, and four ranks fit on two cores.

Under algorithm=edp workers never wait for each other: a worker counts its time from its first work
item to the end of its last one, since at the very end there is no work left for all.

    worker   [ compute ][ compute, slow now and then       ][ compute ]     no gap: efficiency 1
    worker   [ compute ]...[ compute ]...[ compute ]                        gaps: less

    speeds 4:2:1:1       equal shares                  in proportion
    rank 0               [ 8 ]                         [     16     ]
    rank 1               [   8   ]                     [     8      ]
    rank 2               [       8       ]             [     4      ]
    rank 3               [       8       ]             [     4      ]

A sample takes `sample_s` at speed 1, most of which is sleeping. All sides are paced alike."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from smolrun.algorithms.base import Algorithm, Context
from smolrun.algorithms.classicdp import ClassicDP
from smolrun.algorithms.edp import edp
from smolrun.benchmarks.compare import compare, summed
from smolrun.benchmarks.step import PeerStep
from smolrun.collectives.api import new_group
from smolrun.data.splits import Batch
from smolrun.mesh.mesh import Mesh
from smolrun.parts.placement import shares
from smolrun.parts.precision import PRECISIONS
from smolrun.parts.step_clock import EmulatedPace

Trace = list[list[float]]  # seconds of computing, by step and rank


class ScriptedPace(EmulatedPace):
    """The computing of the next step takes `next_s`, the update before it included. No gradient is
    sent before it has ended, so no communication overlaps it."""

    def __init__(self) -> None:
        super().__init__(1.0)
        self.next_s = 0.0
        self._spent_s = 0.0  # on updates since the last gradient

    def wanted(self) -> float:
        return max(0.0, self.next_s - self._spent_s)

    def end(self, waited_s: float) -> None:
        super().end(waited_s)
        is_update = self.next_s == 0.0
        self._spent_s = self._spent_s + self.took(waited_s) if is_update else 0.0
        self.next_s = 0.0


def paced_context(mesh: Mesh, pace: ScriptedPace, *, staleness: int = 0) -> Context:
    """A Context with plain SGD in float32 on the CPU, at that pace."""
    torch.set_num_threads(1)
    return Context(
        mesh=mesh,
        device=torch.device("cpu"),
        precision=PRECISIONS["float32"],
        make_optimizer=lambda named: torch.optim.SGD([p for _, p in named], lr=1e-3),
        learning_rate=lambda update: 1e-3,
        staleness=staleness,
        pace=pace,
    )


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
                **_row_facts(mesh, steps),
            ),
            "efficiency": step_s / result.ours_s,
            "best_efficiency": step_s / result.peer_s,
        }


def _row_facts(mesh: Mesh, steps: int) -> dict[str, Any]:
    """The fields that describe the setup, for a row."""
    parameters = sum(p.numel() for p in _network().parameters())
    world_size = mesh.world_size
    return {"world_size": world_size, "parameters": parameters, "steps": steps, "paced": True}


def _network() -> torch.nn.Module:
    """Small, as its computing is emulated."""
    return torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 8))


def _run(mesh: Mesh, trace: Trace, bound: int) -> tuple[float, float]:
    """Seconds of clock and of processor per step."""
    pace = ScriptedPace()
    context = paced_context(mesh, pace, staleness=bound)
    algorithm = ClassicDP(context, bucket_mb=1.0)
    algorithm.place(_network())
    batch = _batch(2, 32)
    algorithm.collectives.barrier()
    wall, cpu = time.perf_counter(), time.process_time()
    for row in trace:
        pace.next_s = row[mesh.rank]
        algorithm.train_step([batch])
    algorithm.drain()
    steps = len(trace)
    return (time.perf_counter() - wall) / steps, (time.process_time() - cpu) / steps


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

    `ratio` is a worker's time beside its computing, 1 where it never waits. Every work
    item is slow with the chance that a rank has in a step of `compare_bounds`."""
    pace = ScriptedPace()
    algorithm = edp(
        paced_context(mesh, pace),
        server_trains=False,
        pushes_per_batch="auto",
        staleness_lr_scale="inverse",
        wait_fraction=wait_fraction,
        min_ranks=2,
    )
    algorithm.place(_network())
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
        **_row_facts(mesh, steps),
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
    """Seconds from the end of a work item to the end of the next, and of them computing."""
    batch = _batch(2, 32)
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


def compare_shares(
    mesh: Mesh,
    speeds: Sequence[float],
    *,
    global_batch_size: int,
    sample_s: float,
    steps: int,
    warm_up: int,
    repeats: int,
) -> Iterator[dict[str, Any]]:
    """Three rows; collective, gloo must have been joined."""
    pace = ScriptedPace()
    algorithm, peer = ClassicDP(paced_context(mesh, pace), bucket_mb=1.0), _ddp(pace)
    algorithm.place(_wide_network())
    proportional = shares(global_batch_size, speeds)[mesh.rank]
    equal = shares(global_batch_size, [1.0] * len(speeds))[mesh.rank]

    def ours(count: int) -> None:
        pace.next_s = count * sample_s / speeds[mesh.rank]
        algorithm.train_step([_batch(count, 256)])

    def theirs(count: int) -> None:
        pace.next_s = count * sample_s / speeds[mesh.rank]
        pace.begin(0.0)
        peer([_batch(count, 256)], 1e-3)

    facts = {
        "world_size": mesh.world_size,
        "parameters": sum(parameter.numel() for parameter in algorithm.model.parameters()),
        "speeds": list(speeds),
        "paced": True,
    }
    taken = []
    for name, other in (
        ("smolrun, equal shares", lambda: ours(equal)),
        ("ddp-gloo, equal shares", lambda: theirs(equal)),
    ):
        result = compare(
            lambda: ours(proportional),
            other,
            repeats=repeats,
            calls=steps,
            meet=algorithm.collectives.barrier,
            warm_up=warm_up,
        )
        taken.append((result.ours_s, result.ours_cpu_s))
        yield result.row("unequal", "train_step", name, **facts)
    ideal_s = global_batch_size * sample_s / sum(speeds)
    ideal = [(ideal_s, cpu_s) for _, cpu_s in taken]
    yield summed(taken, ideal).row("unequal", "train_step", "sum of speeds", **facts)


def _ddp(pace: ScriptedPace) -> PeerStep:
    model = _wide_network()
    # As with ours, no gradient leaves before computing is over.
    model.register_forward_hook(lambda *_: pace.rest(0.0))
    return PeerStep(
        "ddp", model, lambda named: torch.optim.SGD([p for _, p in named], lr=1e-3), 0.0
    )


def _wide_network() -> torch.nn.Module:
    return torch.nn.Sequential(
        torch.nn.Linear(256, 2048), torch.nn.ReLU(), torch.nn.Linear(2048, 256)
    )


def _batch(count: int, features: int) -> Batch:
    return Batch(torch.ones(count, features), torch.zeros(count, dtype=torch.int64))
