"""What the stages of a model must know of each other's gradients: their norms, and the gradient of
a matrix that two of them hold, embedding and head in one. The first stage owns the matrix, the last
one has a copy. Where several pipelines train one model, the ranks that hold one stage sum theirs.

    last   -- gradient of the copy --> first    while other stages still go backward
    stage  <- all_reduce ------------> stage    of other replicas, while other stages go backward
    first  -- new values ------------> last     while the next step fills the pipeline
    all    -- squared norm ----------> all      of every stage's part of the gradient

A pipeline adds the gradient of its copy before the owners sum the matrix: so they sum it once, and
all of them send equal values to their copies.

Source: Press and Wolf, "Using the Output Embedding to Improve Language Models", 2017 (tied
embeddings).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from smolrun.algorithms.single import unscaled_gradient
from smolrun.collectives.api import Collectives, new_group
from smolrun.mesh.mesh import Work
from smolrun.parts.buckets import pack, views_of
from smolrun.parts.norms import squared_norm
from smolrun.parts.stage_links import TIED, PendingReceive, StageLinks
from smolrun.parts.step_clock import StepClock

_BUCKET_BYTES = 4 << 20  # of gradients that are summed at once, as bucket_mb of classicdp


@dataclass(frozen=True)
class _Sum:
    """Gradients that are summed over replicas, one after the other in `flat`."""

    flat: Tensor
    gradients: list[Tensor]
    work: Work

    def copy_back(self) -> None:
        """The sums to where the gradients were."""
        for own, found in zip(self.gradients, views_of(self.flat, self.gradients), strict=True):
            own.copy_(found)


@dataclass
class OpenStep:
    """A step whose update is not made, on one stage."""

    loss_scale: float = 1.0  # of its gradients until they are whole
    backwards: int = 0  # without a flush: micro-batches that still add to them
    tied_gradient: PendingReceive | None = None  # of the copy, which the owner has to add
    gradients: list[Tensor] | None = None  # from when they are whole
    sums: list[_Sum] = field(default_factory=list)  # over replicas
    is_finite: bool = True  # of several replicas: the gradient of this one
    # By rank: the squared norm of its stage's gradient, and whether its own part was finite.
    norms: Tensor | None = None
    gathered: Work | None = None  # is done when these are known


class StageGradients:
    """The open steps of one stage, by number, oldest first."""

    def __init__(self, replicas: Collectives, links: StageLinks, clock: StepClock) -> None:
        """`replicas` is the group of the ranks that hold this stage."""
        self.steps: dict[int, OpenStep] = {}
        self._clock = clock
        self._tied: _TiedEmbedding | None = None
        # Of its own: stages may be at different places of a step when they know their part.
        self._group = new_group(replicas.mesh, name="gradient norm")
        self._replicas, self._stages = replicas, self._group.size // replicas.size
        self._links = links

    def tie(self, matrix: nn.Parameter, trained: Sequence[nn.Parameter]) -> None:
        """Two stages hold this matrix; the first one has it among what it has `trained`."""
        index = next((index for index, own in enumerate(trained) if own is matrix), None)
        self._tied = _TiedEmbedding(self._links, matrix, index, self._stages - 1)
        # Of its own: the matrix of a step may be summed after other gradients of the next one.
        mesh, ranks = self._replicas.mesh, self._replicas.ranks
        self._tied_replicas = new_group(mesh, ranks, f"tied embedding of stage {ranks[0]}")

    def begin(self, number: int, loss_scale: float) -> OpenStep:
        """A step without gradients."""
        self.poll()
        received = self._tied.begin() if self._tied else None
        self.steps[number] = OpenStep(loss_scale, tied_gradient=received)
        return self.steps[number]

    def resume(self, number: int, gradients: list[Tensor]) -> None:
        """A step of a checkpoint; what two stages hold has been added."""
        self.steps[number] = OpenStep(gradients=gradients)
        self._gather(self.steps[number], gradients)

    def complete(self, number: int, gradients: list[Tensor]) -> None:
        """The gradient of a step is whole on this stage; never blocks."""
        step = self.steps[number]
        step.gradients = gradients
        if self._tied:
            self._tied.complete(step.loss_scale)
        tied = self._tied.index if self._tied else None  # must wait for that of the copy
        others = [own for index, own in enumerate(gradients) if index != tied]
        self._sum(step, self._replicas, others)
        self.poll()

    def poll(self) -> None:
        """Does for whole gradients what needs no waiting: stages should not wait for a norm that
        another one would only send when it needs it itself."""
        for step in self.steps.values():
            if not self._advance(step, blocks=False):
                return

    def wait(self, number: int) -> tuple[Tensor, Tensor]:
        """Blocks until the gradient of every stage is known: their squared norms, by stage, and
        whether they were finite, by rank. That of the matrix is its owner's alone."""
        step = self.steps[number]
        self._advance(step, blocks=True)
        assert step.norms is not None and step.gathered is not None, "it has been gathered"
        self._clock.wait(step.gathered)
        squares, are_finite = step.norms.unbind(1)
        # Of sums it is not known whose numbers made them too large.
        are_finite = torch.isfinite(squares) if are_finite.all() else are_finite
        # Unlike machines may round their norms differently; all ranks take one.
        return squares[: self._stages], are_finite

    def _advance(self, step: OpenStep, *, blocks: bool) -> bool:
        """Adds the gradient of the copy, sums, and sends the norm, in this order and each once;
        whether all of it is done."""
        if step.gathered is not None or step.gradients is None:
            return step.gathered is not None
        if self._tied and (received := step.tied_gradient) and (blocks or received.work.is_done):
            matrix = self._tied.add(received, step.gradients)
            step.tied_gradient = None
            self._sum(step, self._tied_replicas, [matrix])
        if not blocks and (step.tied_gradient or not all(one.work.is_done for one in step.sums)):
            return False
        for one in step.sums:
            self._clock.wait(one.work)
            one.copy_back()
        step.sums.clear()
        self._gather(step, step.gradients)
        return True

    def _sum(self, step: OpenStep, group: Collectives, gradients: list[Tensor]) -> None:
        """Starts to sum over replicas; never blocks."""
        for packed in pack(gradients, _BUCKET_BYTES) if group.size > 1 else ():
            flat = torch.cat([one.detach().flatten() for one in packed]).cpu()
            step.is_finite = step.is_finite and math.isfinite(flat.sum().item())
            self._clock.before_send()
            step.sums.append(_Sum(flat, packed, group.all_reduce(flat, async_op=True)))

    def _gather(self, step: OpenStep, gradients: list[Tensor]) -> None:
        own = torch.tensor([squared_norm(gradients), step.is_finite], dtype=torch.float64)
        self._clock.before_send()
        step.norms = torch.zeros((self._group.size, 2), dtype=torch.float64)
        step.gathered = self._group.all_gather(step.norms, own, async_op=True)

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
        self._links, self._matrix, self.index = links, matrix, index
        self._other = 0 if index is None else last
        self._new_values: PendingReceive | None = None

    def begin(self) -> PendingReceive | None:
        """The owner starts to receive the gradient of a step."""
        return None if self.index is None else self._post()

    def complete(self, loss_scale: float) -> None:
        """The gradient of this stage is whole: that of the copy is sent."""
        if self.index is None:
            self._send(unscaled_gradient(self._matrix, loss_scale))

    def add(self, pending: PendingReceive, gradients: list[Tensor]) -> Tensor:
        """The owner's gradient, with that of the copy added to it; blocks until it is there."""
        found = self._links.take(pending)
        assert found is not None and self.index is not None, "the owner has posted it"
        return gradients[self.index].add_(found.to(gradients[self.index].device))

    def updated(self) -> None:
        """The owner sends its values."""
        if self.index is None:
            self._new_values = self._post()
        else:
            self._send(self._matrix)

    def refresh(self) -> None:
        """Blocks until the owner's values are sent, and the copy has them."""
        if self.index is not None:
            self._links.finish(TIED)  # of the copy's gradients none changes
        elif (values := self._links.take(self._new_values)) is not None:
            self._matrix.data, self._new_values = values.to(self._matrix.device), None

    def _post(self) -> PendingReceive:
        return self._links.post(TIED, self._other, self._matrix.shape, exact=True)

    def _send(self, tensor: Tensor) -> None:
        self._links.send(TIED, self._other, tensor, exact=True)
