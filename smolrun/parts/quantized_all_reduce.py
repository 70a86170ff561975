"""Sums over all ranks of quantized tensors: rounded twice, whatever the number of ranks.

    rank 0   [ a0 | b0 ]   all to all   a0 + Q(a1) = a    all gather   [ Q(a) | Q(b) ]
    rank 1   [ a1 | b1 ]  ------------> Q(b0) + b1 = b   ------------> [ Q(a) | Q(b) ]

Every rank sums its own part of the tensor, in rank order and in full precision, from what the
others sent of it. A ring would round at every hop; here a number is rounded once on its way to the
sum, and the sum once on its way back. All ranks decode the same bytes of every sum, their own one
too, so they end with the same numbers. A rank alone sends nothing, and nothing is rounded.

With feedback, what the first rounding takes away is kept by the rank that sent it, and what the
second takes away by the rank that summed: of every number, one of them each. So the sums that came
out and the residuals of all ranks are together what went in.

Source: Alistarh et al., "QSGD", 2017; Tang et al., "DoubleSqueeze", 2019 (feedback both ways)."""

from __future__ import annotations

from collections.abc import Generator, Sequence

import torch
from torch import Tensor

from smolrun.collectives.api import Collectives
from smolrun.collectives.chain import Phase
from smolrun.collectives.schedule import Range, even_ranges, ranges_of
from smolrun.mesh.mesh import Work
from smolrun.parts.quantization import ErrorFeedback, Quantizer

# Numbers of a tensor that are one chain: a few milliseconds of computing, so that heartbeats come
# through, and part of a large tensor is sent while the next is encoded.
_PART = 1 << 20


class QuantizedAllReduce:
    """As `collectives`, but tensors are sent as `quantizer` encodes them. Always asynchronous; the
    tensors are flat and must not be touched until the work is done."""

    def __init__(self, collectives: Collectives, quantizer: Quantizer, part: int = _PART) -> None:
        self._collectives = collectives
        self._quantizer = quantizer
        self._index, self._size = collectives.index, collectives.size
        self._part = part

    def all_reduce(self, flat: Tensor, feedback: ErrorFeedback | None = None) -> Work:
        """Sums the tensors of all ranks in place."""
        sizes = [stop - start for start, stop in even_ranges(flat.numel(), self._size)]
        parts = self._parts(flat, sizes, feedback)
        chains = [self._reduce_and_gather(part) for part in parts]
        return self._collectives.run_chains("quantized all_reduce", chains, 2)

    def reduce_scatter(
        self, flat: Tensor, sizes: Sequence[int], feedback: ErrorFeedback | None = None
    ) -> Work:
        """Rank i gets the sum of `sizes[i]` numbers in place, where they lie; the rest of the
        tensor is used up."""
        chains = [self._reduce_own(part) for part in self._parts(flat, sizes, feedback)]
        return self._collectives.run_chains("quantized reduce_scatter", chains, 1)

    def _parts(
        self, flat: Tensor, sizes: Sequence[int], feedback: ErrorFeedback | None
    ) -> list[_Segment]:
        """Every rank's range is cut into equally many pieces: one piece of each is a part."""
        residual, lost = feedback.take() if feedback else (None, None)
        count = max(1, -(-flat.numel() // self._part))
        pieces = [
            [(start + low, start + high) for low, high in even_ranges(stop - start, count)]
            for start, stop in ranges_of(sizes)
        ]
        return [_Segment(flat, ranges, residual, lost) for ranges in zip(*pieces, strict=True)]

    def _reduce_own(self, part: _Segment) -> Generator[Phase, None, None]:
        total = yield from self._reduce(part)
        part.numbers[self._index].copy_(total)
        part.give_back()

    def _reduce_and_gather(self, part: _Segment) -> Generator[Phase, None, None]:
        total = yield from self._reduce(part)
        if self._size == 1:
            part.numbers[0].copy_(total)
            return part.give_back()
        places = ranges_of([self._wire_bytes(numbers) for numbers in part.numbers])
        wires = torch.empty(places[-1][1], dtype=torch.uint8)
        own = wires[slice(*places[self._index])]
        self._quantizer.encode(total, own, part.lost[self._index])
        yield Phase("all_gather", wires, places, wires, places)
        for numbers, place in zip(part.numbers, places, strict=True):
            self._quantizer.decode(wires[slice(*place)], numbers)
        part.give_back()

    def _reduce(self, part: _Segment) -> Generator[Phase, None, Tensor]:
        """This rank's piece of the sum; nothing of it is rounded that was here before."""
        part.take()
        me, numbers = self._index, part.numbers
        if (own_lost := part.lost[me]) is not None:
            own_lost.zero_()
        sends = ranges_of([self._wire_bytes(n) if i != me else 0 for i, n in enumerate(numbers)])
        wires = torch.empty(sends[-1][1], dtype=torch.uint8)
        for rank, place in enumerate(sends):
            if rank != me:
                self._quantizer.encode(numbers[rank], wires[slice(*place)], part.lost[rank])
        come = ranges_of(
            [self._wire_bytes(numbers[me]) if i != me else 0 for i in range(self._size)]
        )
        arrived = torch.empty(come[-1][1], dtype=torch.uint8)
        yield Phase("all_to_all", wires, sends, arrived, come)
        total = torch.zeros_like(numbers[me])
        for rank, place in enumerate(come):
            if rank == me:
                total.add_(numbers[me])
            else:
                self._quantizer.decode(arrived[slice(*place)], total, adds=True)
        return total

    def _wire_bytes(self, numbers: Tensor) -> int:
        return self._quantizer.wire_bytes(numbers.numel(), numbers.dtype)


class _Segment:
    """A piece of every rank's range: `numbers[rank]` in float32 at least, `lost[rank]` is where the
    rounding of it is kept."""

    def __init__(
        self, flat: Tensor, ranges: Sequence[Range], residual: Tensor | None, lost: Tensor | None
    ) -> None:
        self._flat = [flat.detach()[slice(*place)] for place in ranges]
        self._residual = residual if residual is None else [residual[slice(*r)] for r in ranges]
        self.lost = [lost if lost is None else lost[slice(*place)] for place in ranges]
        self.numbers: list[Tensor] = []

    def take(self) -> None:
        """The numbers to send: the tensor's, and what was lost before."""
        is_half = self._flat[0].itemsize < 4
        self.numbers = [flat.float() if is_half else flat for flat in self._flat]
        if self._residual is not None:
            for numbers, residual in zip(self.numbers, self._residual, strict=True):
                numbers.add_(residual)

    def give_back(self) -> None:
        """Puts the numbers where they came from."""
        for flat, numbers in zip(self._flat, self.numbers, strict=True):
            if numbers is not flat:
                flat.copy_(numbers)
