"""Sums gradients over the ranks: as they are, or quantized with error feedback.

A bucket's residual belongs to a bucket and to a slot, as the bucket's memory does: with staleness K
there are K + 1 of each, and a step adds the residual of the last step in the same slot, whose
update is known to be made or skipped. It is settled after the update, so a skipped step changes no
residual."""

from __future__ import annotations

import torch
from torch import Tensor

from smolrun.collectives.api import Collectives
from smolrun.collectives.schedule import ranges_of
from smolrun.mesh.mesh import Work
from smolrun.parts.quantization import ErrorFeedback, Quantization
from smolrun.parts.quantized_all_reduce import QuantizedAllReduce


class GradientReducer:
    """Sums flat gradients on the CPU in place; always asynchronous."""

    def __init__(self, collectives: Collectives, quantization: Quantization) -> None:
        self._collectives = collectives
        self._quantization = quantization
        self._quantized: QuantizedAllReduce | None = None
        if not quantization.is_none:
            self._quantized = QuantizedAllReduce(collectives, quantization.quantizer())
        self.has_feedback = not quantization.is_none and quantization.error_feedback
        self._feedback: dict[tuple[int, int], ErrorFeedback] = {}

    def all_reduce(self, flat: Tensor, bucket: int, slot: int) -> Work:
        """Starts to sum a whole tensor, the same bytes on all ranks."""
        if self._quantized is None:
            return self._collectives.all_reduce(flat, async_op=True)
        return self._quantized.all_reduce(flat, self._of(flat, bucket, slot))

    def reduce_scatter(self, flat: Tensor, sizes: list[int], bucket: int, slot: int) -> Work:
        """Starts to sum a tensor of which rank i gets `sizes[i]` numbers, where they lie; the rest
        is used up."""
        if self._quantized is None:
            own = flat[slice(*ranges_of(sizes)[self._collectives.index])]
            return self._collectives.reduce_scatter(own, flat, sizes, async_op=True)
        return self._quantized.reduce_scatter(flat, sizes, self._of(flat, bucket, slot))

    def encode(self, flat: Tensor, bucket: int, slot: int) -> Tensor:
        """The tensor as it is sent to one rank that sums: as it is, or encoded."""
        if self._quantized is None:
            return flat
        quantization, feedback = self._quantization, self._of(flat, bucket, slot)
        if feedback is None:
            return quantization.quantizer().encode(flat.to(quantization.working_dtype(flat.dtype)))
        return feedback.encode(flat, quantization.quantizer())

    def settle(self, slot: int, is_kept: bool) -> None:
        """A step is over; its residuals count if its update was made."""
        for (_, of_slot), feedback in self._feedback.items():
            if of_slot == slot:
                feedback.settle(is_kept)

    def feedback(self, bucket: int, slot: int, numel: int, dtype: torch.dtype) -> ErrorFeedback:
        """What a bucket of `numel` gradients in `dtype` has lost in a slot; zeros at first."""
        key = (bucket, slot)
        if key not in self._feedback:
            self._feedback[key] = ErrorFeedback(numel, self._quantization.working_dtype(dtype))
        return self._feedback[key]

    def _of(self, flat: Tensor, bucket: int, slot: int) -> ErrorFeedback | None:
        if not self.has_feedback:
            return None
        return self.feedback(bucket, slot, flat.numel(), flat.dtype)
