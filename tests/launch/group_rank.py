"""The real worker entry point and the real mesh, with a stand-in for the task: the ranks of a group
add up 2 ** rank by all_reduces, small and large, in every generation, until there have been three
of them."""

from __future__ import annotations

import os
import sys
import types
from typing import Any

import torch

from smolrun.collectives.api import new_group
from smolrun.errors import GenerationEnded, PeerLost
from smolrun.events import RankStep
from smolrun.launch.channel import WorkerChannel
from smolrun.launch.control import StartMessage
from smolrun.mesh.mesh import Mesh
from smolrun.worker import process

STEPS = 20  # of the last generation
LARGE = 300_000  # above what is sent without a grant


def work(start: StartMessage, mesh: Mesh, channel: WorkerChannel) -> dict[str, Any]:
    sums: list[list[int]] = []
    while True:
        try:
            add_up(start, mesh, channel, sums)
            break
        except (PeerLost, GenerationEnded):
            mesh = process.regroup(start, mesh, channel)
    mesh.close()
    return {"sums": sums, "pid": os.getpid()}


def add_up(start: StartMessage, mesh: Mesh, channel: WorkerChannel, sums: list[list[int]]) -> None:
    group = new_group(mesh)
    for step in range(10**9):
        for size in (1, LARGE):
            tensor = torch.full((size,), float(1 << start.rank))
            group.all_reduce(tensor)
            assert bool((tensor == tensor[0]).all())
            found = [mesh.generation, int(tensor[0])]
            if found not in sums:
                sums.append(found)
        channel.emit(RankStep(step, start.rank, 0.01, 0.0, None, 0, 0))
        if mesh.generation == 2 and step == STEPS:
            return


if __name__ == "__main__":
    task = types.ModuleType("smolrun.tasks.stand_in")
    task.work = work  # type: ignore[attr-defined]
    sys.modules[task.__name__] = task
    process.main()
