"""Hidden states and their gradients between neighbouring stages of a model, point to point.

    stage 0 -- activations --> stage 1 -- activations --> stage 2
            <-- gradients ----         <-- gradients ----

A receive is posted before its tensor is needed: a large tensor is not sent until its receiver has
memory for it, so the network works while the stage computes. Micro-batches pass in the same order
on both sides, so counting them is enough for equal tags. One thread uses it, the one that computes.

Knows nothing of models and schedules.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from smolrun.mesh.mesh import Mesh, Work
from smolrun.mesh.streams import OperationCounter, Stream
from smolrun.parts.quantization import Quantization
from smolrun.parts.step_clock import StepClock

ACTIVATIONS, GRADIENTS = Stream.STAGE_ACTIVATIONS, Stream.STAGE_GRADIENTS


@dataclass(frozen=True)
class PendingReceive:
    """A tensor of `shape` that is on its way, encoded, into `wire` on the CPU."""

    shape: tuple[int, ...]
    wire: Tensor
    work: Work


class StageLinks:
    """Sends to and receives from the stages before and after this one. Numbers in `dtype` travel as
    they are, or in fewer bits; what rounding takes away is lost, as no other tensor could make up
    for it: the next one is of other samples."""

    def __init__(
        self, mesh: Mesh, clock: StepClock, dtype: torch.dtype, quantization: Quantization
    ) -> None:
        self._mesh, self._clock, self._dtype = mesh, clock, dtype
        self._quantizer = quantization.quantizer()
        self._working_dtype = quantization.working_dtype(dtype)
        self._sent: list[Work] = []
        self._next_sent = {kind: OperationCounter(kind) for kind in (ACTIVATIONS, GRADIENTS)}
        self._next_received = {kind: OperationCounter(kind) for kind in (ACTIVATIONS, GRADIENTS)}

    def post(self, kind: Stream, source: int, shape: Sequence[int]) -> PendingReceive:
        """Starts to receive the next tensor of a kind from rank `source`; never blocks."""
        size = self._quantizer.wire_bytes(math.prod(shape), self._working_dtype)
        wire = torch.empty(size, dtype=torch.uint8)
        tag = self._next_received[kind].take()
        return PendingReceive(tuple(shape), wire, self._mesh.recv(source, tag, wire))

    def take(self, pending: PendingReceive | None) -> Tensor | None:
        """The tensor, on the CPU; blocks until it is there. None of nothing."""
        if pending is None:
            return None
        self._clock.before_send()  # an emulated machine would still compute, before it waits
        self._clock.wait(pending.work)
        values = torch.empty(pending.shape, dtype=self._working_dtype)
        self._quantizer.decode(pending.wire, values.view(-1))
        return values.to(self._dtype)

    def send(self, kind: Stream, target: int, tensor: Tensor) -> None:
        """Starts to send a tensor; never blocks."""
        self._clock.before_send()
        flat = tensor.detach().to("cpu", self._working_dtype).contiguous().view(-1)
        wire = self._quantizer.encode(flat)
        self._sent.append(self._mesh.send(target, self._next_sent[kind].take(), wire))

    def prune(self) -> None:
        """Forgets what has been sent; never blocks."""
        self._sent = [work for work in self._sent if not work.is_done or work.error is not None]

    def finish(self) -> None:
        """Blocks until everything is sent."""
        for work in self._sent:
            self._clock.wait(work)
        self._sent.clear()
