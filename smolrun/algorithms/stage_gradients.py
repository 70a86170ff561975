"""What the stages of a model must know of each other's gradients: their norms, and the gradient of
a matrix that two of them hold, embedding and head in one. The first stage owns the matrix, the last
one has a copy.

    last   -- gradient of the copy --> first    while other stages still go backward
    first  -- new values ------------> last     while the next step fills the pipeline
    all    -- squared norm ----------> all      of every stage's part of the gradient

Source: Press and Wolf, "Using the Output Embedding to Improve Language Models", 2017 (tied
embeddings).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from smolrun.algorithms.single import unscaled_gradient
from smolrun.collectives.api import new_group
from smolrun.mesh.mesh import Mesh, Work
from smolrun.parts.norms import squared_norm
from smolrun.parts.stage_links import TIED, PendingReceive, StageLinks
from smolrun.parts.step_clock import StepClock


@dataclass
class OpenStep:
    """A step whose update is not made, on one stage."""

    loss_scale: float = 1.0  # of its gradients until they are whole
    backwards: int = 0  # without a flush: micro-batches that still add to them
    tied_gradient: PendingReceive | None = None  # of the copy, which the owner has to add
    squares: Tensor | None = None  # by stage: the squared norm of its part of the gradient
    norm: Work | None = None  # is done when these are known


class StageGradients:
    """The open steps of one stage, by number, oldest first."""

    def __init__(self, mesh: Mesh, links: StageLinks, clock: StepClock) -> None:
        self.steps: dict[int, OpenStep] = {}
        self._clock = clock
        self._tied: _TiedEmbedding | None = None
        # Of its own: stages may be at different places of a step when they know their part.
        self._group = new_group(mesh, range(mesh.world_size), "gradient norm")
        self._links = links

    def tie(self, matrix: nn.Parameter, trained: Sequence[nn.Parameter]) -> None:
        """Two stages hold this matrix; the first one has it among what it has `trained`."""
        index = next((index for index, own in enumerate(trained) if own is matrix), None)
        self._tied = _TiedEmbedding(self._links, matrix, index, self._group.size - 1)

    def begin(self, number: int, loss_scale: float) -> OpenStep:
        """A step without gradients."""
        received = self._tied.begin() if self._tied else None
        self.steps[number] = OpenStep(loss_scale, tied_gradient=received)
        return self.steps[number]

    def resume(self, number: int, gradients: list[Tensor]) -> None:
        """A step of a checkpoint; what two stages hold has been added."""
        self.steps[number] = OpenStep()
        self._gather(self.steps[number], gradients)

    def complete(self, number: int, gradients: list[Tensor]) -> None:
        """The gradient of a step is whole on this stage; never blocks."""
        step = self.steps[number]
        if self._tied:
            self._tied.complete(step.loss_scale)
        if step.tied_gradient is None:  # else the norm needs that first
            self._gather(step, gradients)

    def wait(self, number: int, gradients: list[Tensor]) -> Tensor:
        """Blocks until the squared norm of every stage's gradient is known, by stage. That of the
        matrix is its owner's alone."""
        step = self.steps[number]
        if self._tied and step.tied_gradient:
            self._tied.add(step.tied_gradient, gradients)
            step.tied_gradient = None
            self._gather(step, gradients)
        assert step.norm and step.squares is not None, "the gradient is whole"
        self._clock.wait(step.norm)
        return step.squares

    def _gather(self, step: OpenStep, gradients: list[Tensor]) -> None:
        own = torch.tensor([squared_norm(gradients)], dtype=torch.float64)
        self._clock.before_send()
        step.squares = torch.zeros(self._group.size, dtype=torch.float64)
        step.norm = self._group.all_gather(step.squares, own, async_op=True)

    def end(self, number: int, *, is_updated: bool) -> None:
        """The oldest step; the new values of the matrix begin to travel."""
        del self.steps[number]
        if self._tied and is_updated:
            self._tied.updated()

    def refresh(self) -> None:
        """Before the matrix is used, or changed: blocks until both stages have the same values."""
        if self._tied:
            self._tied.refresh()


class _TiedEmbedding:
    """The matrix on one of its two stages; `index` is its place among the owner's gradients, None:
    this is the copy."""

    def __init__(
        self, links: StageLinks, matrix: nn.Parameter, index: int | None, last: int
    ) -> None:
        self._links, self._matrix, self._index = links, matrix, index
        self._other = 0 if index is None else last
        self._new_values: PendingReceive | None = None

    def begin(self) -> PendingReceive | None:
        """The owner starts to receive the gradient of a step."""
        return None if self._index is None else self._post()

    def complete(self, loss_scale: float) -> None:
        """The gradient of this stage is whole: that of the copy is sent."""
        if self._index is None:
            self._send(unscaled_gradient(self._matrix, loss_scale))

    def add(self, pending: PendingReceive, gradients: list[Tensor]) -> None:
        """Adds the gradient of the copy to the owner's; blocks until it is there."""
        found = self._links.take(pending)
        assert found is not None and self._index is not None, "the owner has posted it"
        gradients[self._index].add_(found.to(gradients[self._index].device))

    def updated(self) -> None:
        """The owner sends its values."""
        if self._index is None:
            self._new_values = self._post()
        else:
            self._send(self._matrix)

    def refresh(self) -> None:
        """Blocks until the owner's values are sent, and the copy has them."""
        if self._index is not None:
            self._links.finish(TIED)  # of the copy's gradients none changes
        elif (values := self._links.take(self._new_values)) is not None:
            self._matrix.data, self._new_values = values.to(self._matrix.device), None

    def _post(self) -> PendingReceive:
        return self._links.post(TIED, self._other, self._matrix.shape, exact=True)

    def _send(self, tensor: Tensor) -> None:
        self._links.send(TIED, self._other, tensor, exact=True)
