"""Ranks of unequal speed: shares in proportion, beside equal shares, beside
DistributedDataParallel, and beside what the machines could do if none had to wait.

    speeds 4:2:1:1       equal shares                  in proportion
    rank 0               [ 8 ]                         [     16     ]
    rank 1               [   8   ]                     [     8      ]
    rank 2               [       8       ]             [     4      ]
    rank 3               [       8       ]             [     4      ]

Computing is paced, as four machines do not fit on one: a sample takes `sample_s` at speed 1, most
of which is waiting, so a network of a million numbers stands for any. Steps, collectives and
sockets are real, and all sides are paced alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from smolrun.algorithms.classicdp import ClassicDP
from smolrun.benchmarks.compare import compare, summed
from smolrun.benchmarks.paced import SetPace, paced_context
from smolrun.benchmarks.step import PeerStep
from smolrun.data.base import Batch
from smolrun.mesh.mesh import Mesh
from smolrun.parts.placement import shares


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
    pace = SetPace()
    algorithm, peer = ClassicDP(paced_context(mesh, pace), bucket_mb=1.0), _ddp(pace)
    algorithm.place(_network())
    proportional = shares(global_batch_size, speeds)[mesh.rank]
    equal = shares(global_batch_size, [1.0] * len(speeds))[mesh.rank]

    def ours(count: int) -> None:
        pace.next_s = count * sample_s / speeds[mesh.rank]
        algorithm.train_step([_batch(count)])

    def theirs(count: int) -> None:
        pace.next_s = count * sample_s / speeds[mesh.rank]
        pace.begin(0.0)
        peer(_batch(count), 1e-3)

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


def _ddp(pace: SetPace) -> PeerStep:
    model = _network()
    # As with ours, no gradient leaves before computing is over.
    model.register_forward_hook(lambda *_: pace.rest(0.0))
    return PeerStep(
        "ddp", model, lambda named: torch.optim.SGD([p for _, p in named], lr=1e-3), 0.0
    )


def _network() -> torch.nn.Module:
    return torch.nn.Sequential(
        torch.nn.Linear(256, 2048), torch.nn.ReLU(), torch.nn.Linear(2048, 256)
    )


def _batch(count: int) -> Batch:
    return Batch(torch.ones(count, 256), torch.zeros(count, dtype=torch.int64))
