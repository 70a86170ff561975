"""Computing that takes as long as a bench says: more ranks than cores, and machines that are not
there. What is measured then are steps, collectives and sockets, which are real."""

from __future__ import annotations

import torch

from smolrun.algorithms.base import Context
from smolrun.mesh.mesh import Mesh
from smolrun.parts.precision import PRECISIONS
from smolrun.parts.step_clock import EmulatedPace


class SetPace(EmulatedPace):
    """The computing of the next step takes `next_s`, the update before it included. No gradient
    leaves before it is over, so nothing is hidden behind it."""

    def __init__(self) -> None:
        super().__init__(1.0)
        self.next_s = 0.0
        self._spent_s = 0.0  # on updates since the last gradient

    def wanted(self) -> float:
        """See EmulatedPace."""
        return max(0.0, self.next_s - self._spent_s)

    def end(self, waited_s: float) -> None:
        """See Pace."""
        super().end(waited_s)
        is_update = self.next_s == 0.0
        self._spent_s = self._spent_s + self.took(waited_s) if is_update else 0.0
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
