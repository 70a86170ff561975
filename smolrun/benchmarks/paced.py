"""Computing that takes as long as a bench says: more ranks than cores, and machines that are not
there. What is measured then are steps, collectives and sockets, which are real."""

from __future__ import annotations

import torch

from smolrun.algorithms.base import Context
from smolrun.mesh.mesh import Mesh
from smolrun.parts.pace import SharePace
from smolrun.parts.precision import PRECISIONS


class SetPace(SharePace):
    """The next piece of computing takes `next_s`; those after it, such as the update, no longer
    than they do. Nothing leaves before it is over, so nothing is hidden behind it."""

    def __init__(self) -> None:
        super().__init__(1.0)
        self.next_s = 0.0

    def wanted(self) -> float:
        """See SharePace."""
        return self.next_s

    def end(self, waited_s: float) -> None:
        """See Pace."""
        super().end(waited_s)
        self.next_s = 0.0


def paced_context(mesh: Mesh, pace: SetPace, *, staleness: int = 0) -> Context:
    """Plain SGD in float32 on the CPU, at that pace."""
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
