"""Hidden states and their gradients between neighbouring stages of a model, and a matrix that the
first and the last of them hold, point to point.

    stage 0 -- activations --> stage 1 -- activations --> stage 2
            <-- gradients ----         <-- gradients ----
            <-- gradient of a tied embedding ------
            --- its new values ------------------->

A receive is posted before its tensor is needed: a large tensor is not sent until its receiver has
memory for it, so the network works while the stage computes. Micro-batches pass in the same order
on both sides, so counting them is enough for equal tags. One thread uses it, the one that computes.

Knows nothing of models and schedules.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from smolrun.mesh.mesh import Mesh, Work
from smolrun.mesh.streams import OperationCounter, Stream
from smolrun.parts.quantization import Quantization, Quantizer
from smolrun.parts.step_clock import StepClock

ACTIVATIONS, GRADIENTS = Stream.STAGE_ACTIVATIONS, Stream.STAGE_GRADIENTS
TIED = Stream.STAGE_TIED
RECEIVES_AHEAD = 2  # of actions to come; each may need memory for a tensor


@dataclass(frozen=True)
class PendingReceive:
    """A tensor of `shape` that is on its way to the CPU: into `wire`, which is the tensor itself
    unless a quantizer has encoded it."""

    shape: tuple[int, ...]
    wire: Tensor
    work: Work
    quantizer: Quantizer | None


class StageLinks:
    """Sends to and receives from the stages before and after this one. Numbers in `dtype` travel in
    fewer bits where `quantization` says so, but for `exact` ones; what rounding takes away is lost,
    as no other tensor could make up for it: the next one is of other samples. Stage 0 of this
    pipeline is rank `first_rank`."""

    def __init__(
        self,
        mesh: Mesh,
        clock: StepClock,
        dtype: torch.dtype,
        quantization: Quantization,
        first_rank: int = 0,
    ) -> None:
        self._mesh, self._clock, self._dtype = mesh, clock, dtype
        self._first_rank = first_rank
        self._quantizer = None if quantization.is_none else quantization.quantizer()
        self._working_dtype = quantization.working_dtype(dtype)
        kinds = (ACTIVATIONS, GRADIENTS, TIED)
        self._sent: dict[Stream, list[Work]] = {kind: [] for kind in kinds}
        self._next_sent = {kind: OperationCounter(kind) for kind in kinds}
        self._next_received = {kind: OperationCounter(kind) for kind in kinds}

    def post(
        self, kind: Stream, source: int, shape: Sequence[int], *, exact: bool = False
    ) -> PendingReceive:
        """Starts to receive the next tensor of a kind from stage `source`; never blocks."""
        quantizer = None if exact else self._quantizer
        if quantizer is None:
            wire = torch.empty(tuple(shape), dtype=self._dtype)
        else:
            size = quantizer.wire_bytes(math.prod(shape), self._working_dtype)
            wire = torch.empty(size, dtype=torch.uint8)
        work = self._mesh.recv(self._first_rank + source, self._next_received[kind].take(), wire)
        return PendingReceive(tuple(shape), wire, work, quantizer)

    def take(self, pending: PendingReceive | None) -> Tensor | None:
        """The tensor, on the CPU; blocks until it is there. None of nothing."""
        if pending is None:
            return None
        self._clock.before_send()  # an emulated machine would still compute, before it waits
        self._clock.wait(pending.work)
        if pending.quantizer is None:
            return pending.wire
        values = torch.empty(pending.shape, dtype=self._working_dtype)
        pending.quantizer.decode(pending.wire, values.view(-1))
        return values.to(self._dtype)

    def send(self, kind: Stream, target: int, tensor: Tensor, *, exact: bool = False) -> None:
        """Starts to send a tensor to stage `target`, which must not change until `finish`; never
        blocks."""
        self._clock.before_send()
        quantizer = None if exact else self._quantizer
        dtype = self._dtype if quantizer is None else self._working_dtype
        wire = tensor.detach().to("cpu", dtype).contiguous()
        if quantizer is not None:
            wire = quantizer.encode(wire.view(-1))
        to, tag = self._first_rank + target, self._next_sent[kind].take()
        self._sent[kind].append(self._mesh.send(to, tag, wire))

    def prune(self) -> None:
        """Forgets what has been sent; never blocks."""
        for kind, works in self._sent.items():
            self._sent[kind] = [work for work in works if not work.is_done or work.error]

    def finish(self, *kinds: Stream) -> None:
        """Blocks until all tensors of these kinds are sent; of all kinds if none is given."""
        for kind in kinds or tuple(self._sent):
            for work in self._sent[kind]:
                self._clock.wait(work)
            self._sent[kind].clear()


def posted_ahead(receives: Iterable[PendingReceive | None]) -> Iterator[PendingReceive | None]:
    """The same; `receives` posts one whenever it is asked, and is asked for some more than have
    been used."""
    remaining = iter(receives)
    posted = deque(islice(remaining, RECEIVES_AHEAD))
    for pending in remaining:
        posted.append(pending)
        yield posted.popleft()
    yield from posted
