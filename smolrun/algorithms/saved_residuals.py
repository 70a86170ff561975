"""What a checkpoint holds of what rounding took away from gradients: every rank's own, by name.

    residual/<name>    (steps in flight + 1, ranks, shape of the parameter)

The same number of ranks goes on to the byte. Other ranks, or another staleness, are given the sum
over all of them, which is what the training still has to get: each takes its own part of every
parameter, so that nothing counts twice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from smolrun.algorithms.contract import FACTS
from smolrun.checkpoints.reader import CheckpointReader
from smolrun.checkpoints.tensor_slice import TensorSlice
from smolrun.collectives.schedule import even_ranges
from smolrun.errors import CheckpointError

if TYPE_CHECKING:
    from smolrun.algorithms.classicdp import ClassicDP

_PREFIX = "residual/"


def pieces(algorithm: ClassicDP) -> list[TensorSlice]:
    """This rank's residuals; the works of all updates are done.

    What a pending has lost counts if its update will be made, as all ranks can tell by its facts.
    """
    finite = FACTS.index("is_finite")
    kept = {
        algorithm.slot(pending.step): bool(pending.facts[:, finite].all())
        for pending in algorithm.pending_updates
    }
    size, index = algorithm.collectives.size, algorithm.collectives.index
    slots = algorithm.context.staleness + 1
    found = []
    for slot in range(slots):
        for name, shape, residual in _residuals(algorithm, slot, kept.get(slot, False)):
            start = (slot * size + index) * residual.numel()
            found.append(TensorSlice(_PREFIX + name, (slots, size, *shape), start, residual))
    return found


def expected_bytes(algorithm: ClassicDP) -> int:
    """Of all ranks together."""
    if not algorithm.sums.has_feedback:
        return 0
    trained = sum(p.numel() for p in algorithm.model.parameters() if p.requires_grad)
    item = torch.zeros((), dtype=algorithm.context.precision.parameters).itemsize
    slots = algorithm.context.staleness + 1
    return slots * algorithm.collectives.size * trained * max(4, item)


@torch.no_grad()
def restore(algorithm: ClassicDP, checkpoint: CheckpointReader) -> None:
    """Gives every rank its own again, or its part of the sum; zeros where nothing was saved."""
    size, index = algorithm.collectives.size, algorithm.collectives.index
    slots = algorithm.context.staleness + 1
    following = algorithm.slot(algorithm.steps_begun)
    for slot in range(slots):
        for name, shape, residual in _residuals(algorithm, slot, is_kept=False):
            key = _PREFIX + name
            if key not in checkpoint.manifest.tensors:
                continue
            rows, ranks, *found = checkpoint.shape(key)
            if tuple(found) != tuple(shape):
                raise CheckpointError(
                    f"{checkpoint.folder} is of another model: {key} is {tuple(found)}, not "
                    f"{tuple(shape)}"
                )
            count = residual.numel()
            if (rows, ranks) == (slots, size):
                start = (slot * size + index) * count
                residual.copy_(checkpoint.read(key, start, start + count).view(-1))
            elif slot == following:
                low, high = even_ranges(count, size)[index]
                for row in range(rows * ranks):
                    first = row * count
                    part = checkpoint.read(key, first + low, first + high)
                    residual[low:high] += part.view(-1)


def _residuals(
    algorithm: ClassicDP, slot: int, is_kept: bool
) -> Iterator[tuple[str, torch.Size, Tensor]]:
    """Every trained parameter's own part of a slot, flat; the living tensors."""
    if not algorithm.sums.has_feedback:
        return
    trained = {name for name, p in algorithm.model.named_parameters() if p.requires_grad}
    for number, bucket in enumerate(algorithm.gradient_layout()):
        numels = [math.prod(shape) for _, shape in bucket]
        dtype = algorithm.context.precision.parameters
        feedback = algorithm.sums.feedback(number, slot, sum(numels), dtype)
        parts = feedback.after(is_kept).split(numels)
        for (name, shape), part in zip(bucket, parts, strict=True):
            if name in trained:
                yield name, shape, part
