"""Buckets of gradients that exist from their first gradient until they are reduced: each rank keeps
its own part of the sum only.

    backward   [ bucket 0 fills ][ bucket 1 fills ][ bucket 2 ...
    network                      [ reduce 0       ][ reduce 1
    memory     [ 0              ][ 0, 1           ][ 1, 2             at most max_live buckets

Backward waits where more would be alive. Buckets are reduced in one order on all ranks: that of
their numbers in the first backward, then the order in which rank 0's buckets were full in it, which
is broadcast once.

Source: Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models",
2020 (gradients that are reduced and freed during backward); Li et al., "PyTorch Distributed",
2020 (buckets in the order of the first backward)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from smolrun.collectives.api import Collectives
from smolrun.mesh.mesh import Work
from smolrun.parts.flat_shards import ShardedBucket
from smolrun.parts.gradient_reducer import GradientReducer


@dataclass(frozen=True)
class _Leaving:
    """A full bucket that is being reduced."""

    number: int
    slot: int
    host: Tensor
    work: Work


class ReduceScatterBuckets:
    """Takes the gradients of `buckets` from backward, reduces them, and adds this rank's parts to
    `sums[slot]`, one flat tensor per bucket, for each of `slots` pending updates. `wait` blocks
    until a work is done."""

    def __init__(
        self,
        buckets: Sequence[ShardedBucket],
        collectives: Collectives,
        sums: GradientReducer,
        *,
        slots: int,
        max_live: int,
        wait: Callable[[Work], None],
    ) -> None:
        self.sums = [[torch.zeros_like(b.shard) for b in buckets] for _ in range(slots)]
        self.is_finite = True  # of this rank's own gradients, since `begin`
        self.scale = 1.0  # the loss scale by which gradients are divided
        self._buckets = buckets
        self._collectives = collectives
        self._reducing = sums
        self._max_live = max_live
        self._wait = wait
        self._slot = 0
        self._filling: dict[int, tuple[Tensor, list[Tensor]]] = {}
        self._leaving: list[_Leaving] = []
        self._order = list(range(len(buckets)))
        self._is_ordered = False
        self._were_full: list[int] = []
        self._missing: list[int] = []
        self._launched = 0
        for number, bucket in enumerate(buckets):
            for place, parameter in enumerate(bucket.parameters):
                parameter.register_post_accumulate_grad_hook(self._catch(number, place))

    def begin(self, slot: int) -> None:
        """Starts a step: zeroes its sums."""
        self._slot, self.is_finite = slot, True
        for total in self.sums[slot]:
            total.zero_()

    def begin_backward(self) -> None:
        """Call before each backward of the step."""
        self._missing = [len(bucket.parameters) for bucket in self._buckets]
        self._launched, self._were_full = 0, []

    def end_backward(self) -> None:
        """Call after each: reduces what was not filled, with zeros for missing gradients."""
        self._missing = [0] * len(self._buckets)
        self._launch_full()
        if not self._is_ordered:
            self._agree_on_order()

    def finish(self, slot: int) -> list[Tensor]:
        """This rank's parts of the sums of a step whose works are done."""
        for leaving in [leaving for leaving in self._leaving if leaving.slot == slot]:
            self._settle(leaving)
        return self.sums[slot]

    def works(self, slot: int) -> list[Work]:
        """Of all buckets of a step that are being reduced."""
        return [leaving.work for leaving in self._leaving if leaving.slot == slot]

    def _catch(self, number: int, place: int) -> Callable[[Tensor], None]:
        def gradient_is_there(parameter: Tensor) -> None:
            if number not in self._filling:
                self._filling[number] = self._allocate(self._buckets[number])
            assert parameter.grad is not None
            self._filling[number][1][place].copy_(parameter.grad)
            parameter.grad = None
            self._missing[number] -= 1
            if self._missing[number] == 0:
                self._were_full.append(number)
                self._launch_full()

        return gradient_is_there

    def _allocate(self, bucket: ShardedBucket) -> tuple[Tensor, list[Tensor]]:
        while self._leaving and len(self._leaving) + len(self._filling) >= self._max_live:
            self._settle(self._leaving[0])
        flat = torch.zeros(bucket.size, dtype=bucket.dtype, device=bucket.device)
        return flat, bucket.views(flat)

    def _launch_full(self) -> None:
        while self._launched < len(self._order):
            number = self._order[self._launched]
            if self._missing[number]:
                break
            self._launched += 1
            bucket = self._buckets[number]
            if number not in self._filling:
                self._filling[number] = self._allocate(bucket)
            flat, _ = self._filling.pop(number)
            if self.scale != 1.0:
                flat.div_(self.scale)
            # The sum of all shows whether any is not finite; it only names the rank.
            self.is_finite = self.is_finite and math.isfinite(flat.sum().item())
            host = flat.cpu()
            work = self._reducing.reduce_scatter(host, bucket.sizes, number, self._slot)
            self._leaving.append(_Leaving(number, self._slot, host, work))

    def _settle(self, leaving: _Leaving) -> None:
        self._wait(leaving.work)
        own = self._buckets[leaving.number].own(leaving.host)
        self.sums[leaving.slot][leaving.number].add_(own.to(self._buckets[leaving.number].device))
        self._leaving.remove(leaving)

    def _agree_on_order(self) -> None:
        """Collective, once: from now on buckets are reduced in the order in which rank 0's became
        full. Where rank 0 had no samples, the order of their numbers stays."""
        never = [number for number in self._order if number not in self._were_full]
        order = torch.tensor([*self._were_full, *never])
        self._wait(self._collectives.broadcast(order, async_op=True))
        self._order, self._is_ordered = order.tolist(), True
