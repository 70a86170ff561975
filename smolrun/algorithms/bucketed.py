"""What algorithms have in common whose gradients are written by backward into flat buckets, each of
which is sent when it is full: classicdp, fsdp, syncps.

    backward: [bucket 0][bucket 1][bucket 2]
    network             [send 0  ][send 1  ][send 2  ]      what `send` means is the algorithm's

With staleness K there are K + 1 slots of every bucket, one per step whose update is pending. With
quantization a rank keeps what rounding has taken from its own gradients, the residual, and a
checkpoint holds it:

    residual/<name>    (slots, ranks, shape of the parameter)

The same number of ranks resumes it to the byte. Other ranks, or another staleness, get the sum over
all of them, which training still has to apply: each takes its own part of every parameter, so
nothing counts twice.

Source: Li et al., "PyTorch Distributed: Experiences on Accelerating Data Parallel Training", 2020.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from smolrun.algorithms.base import Algorithm, Context, PendingUpdate
from smolrun.checkpoints.reader import CheckpointReader
from smolrun.checkpoints.tensor_slice import TensorSlice
from smolrun.collectives.schedule import even_ranges
from smolrun.data.splits import Batch
from smolrun.errors import CheckpointError
from smolrun.mesh.mesh import Work
from smolrun.parts.buckets import Bucket, GradientBuckets
from smolrun.parts.gradient_reducer import GradientReducer
from smolrun.parts.replicas import model_tensors, sync_replicas


class BucketedAlgorithm(Algorithm):
    """Replicas whose gradients are in buckets; a subclass says how a full one is sent."""

    def __init__(self, context: Context, *, bucket_mb: float) -> None:
        super().__init__(context)
        self._bucket_bytes = int(bucket_mb * 1024 * 1024)
        self.reducer = GradientReducer(self.collectives, context.quantization)
        self._works: list[Work] = []
        self._is_finite = True

    def place(self, model: nn.Module) -> None:
        """Keeps a replica; makes sure that all start from the same bytes. Collective."""
        super().place(model)
        sync_replicas(self.collectives, [*self.replicated(), *model.buffers()])
        self.catch_gradients()

    def replicated(self) -> list[nn.Parameter]:
        """The parameters that all ranks hold, whose gradients are in the buckets."""
        return list(self.model.parameters())

    def catch_gradients(self) -> None:
        """From now on backward writes into buckets."""
        self.buckets = GradientBuckets(
            self.replicated(),
            bucket_bytes=self._bucket_bytes,
            slots=self.context.staleness + 1,
            on_full=self._on_full,
        )

    def slot(self, step: int) -> int:
        """Where the gradients of a step are."""
        return step % (self.context.staleness + 1)

    def replica_tensors(self) -> dict[str, Tensor]:
        """The whole model."""
        return dict(model_tensors(self.model))

    # -- a step ----

    def forward_backward(self, micro_batches: Sequence[Batch]) -> dict[str, float]:
        """Backward writes into this step's slot of the buckets."""
        self._works, self._is_finite = [], True
        self.buckets.begin(self.slot(self.steps_begun))
        stats = super().forward_backward(micro_batches)
        self.buckets.finish()
        return stats

    def before_last_backward(self) -> None:
        """From now on a full bucket is sent."""
        self.buckets.arm()

    def _on_full(self, bucket: Bucket, slot: int) -> None:
        """Called by backward's hooks, in this thread."""
        self.clock.before_send()
        flat = bucket.flat[slot]
        if self.loss_scale.value != 1.0:
            flat.div_(self.loss_scale.value)
        # One number shows whether any is not finite; it only names the rank, the sums decide.
        self._is_finite = self._is_finite and math.isfinite(flat.sum().item())
        self._works.append(self.send(bucket, slot))

    @abstractmethod
    def send(self, bucket: Bucket, slot: int) -> Work:
        """Starts to send a full bucket to where it is summed."""

    def synchronize(self, stats: dict[str, float]) -> PendingUpdate:
        """The buckets have been sent already; the statistics follow them."""
        stats["is_finite"] = float(self._is_finite)
        shared, works = self.share_stats(stats)
        return PendingUpdate(self.steps_begun, shared, [*self._works, *works])

    def bind_gradients(self, pending: PendingUpdate) -> list[Tensor]:
        """Binds the slot of that step."""
        slot = self.slot(pending.step)
        self.buckets.bind(slot)
        return [bucket.from_host(slot) for bucket in self.buckets.buckets]

    @torch.no_grad()
    def update(self, pending: PendingUpdate, weight: float, learning_rate: float) -> float | None:
        """What rounding took away counts only if the update is made."""
        norm = super().update(pending, weight, learning_rate)
        self.reducer.settle(self.slot(pending.step), is_kept=norm is not None)
        return norm

    def pending_gradients(self, pending: PendingUpdate) -> list[Tensor]:
        """Views of the host memory from which `bind_gradients` takes them."""
        return self.buckets.host_gradients(self.slot(pending.step))

    # -- what a checkpoint holds ----

    def gradient_layout(self) -> list[list[tuple[str, torch.Size]]]:
        """Names and shapes of the gradients in every bucket, in the order in which they lie."""
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        return [[(names[p], p.shape) for p in bucket.parameters] for bucket in self.buckets.buckets]

    def owned(self) -> Iterator[TensorSlice]:
        """Also this rank's residuals."""
        yield from super().owned()
        yield from self.residual_slices()

    def residual_slices(self) -> Iterator[TensorSlice]:
        """This rank's residuals; the works of all pending updates are done. A step's counts if its
        update will be made, which all ranks can tell by its statistics."""
        kept = {
            self.slot(pending.step): all(pending.stats.column("is_finite"))
            for pending in self.pending_updates
        }
        size, index = self.collectives.size, self.collectives.index
        slots = self.context.staleness + 1
        for slot in range(slots):
            for name, shape, residual in self._residuals(slot, kept.get(slot, False)):
                start = (slot * size + index) * residual.numel()
                yield TensorSlice(f"residual/{name}", (slots, size, *shape), start, residual)

    def checkpoint_bytes(self) -> int:
        """With the residuals of all ranks."""
        return super().checkpoint_bytes() + self.residual_bytes()

    def residual_bytes(self) -> int:
        """Of all ranks together."""
        if not self.reducer.has_feedback:
            return 0
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        slots = self.context.staleness + 1
        item = self.context.precision.parameters.itemsize
        return slots * self.collectives.size * trained * max(4, item)

    @torch.no_grad()
    def restore(self, checkpoint: CheckpointReader, state: Mapping[str, Any]) -> None:
        """With the residuals."""
        super().restore(checkpoint, state)
        self.restore_residuals(checkpoint)

    @torch.no_grad()
    def restore_residuals(self, checkpoint: CheckpointReader) -> None:
        """This rank's own, or its part of the sum of all; zeros where nothing was saved."""
        size, index = self.collectives.size, self.collectives.index
        slots = self.context.staleness + 1
        following = self.slot(self.steps_begun)
        for slot in range(slots):
            for name, shape, residual in self._residuals(slot, is_kept=False):
                key = f"residual/{name}"
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
                    residual.copy_(checkpoint.read(key, start, start + count))
                elif slot == following:
                    low, high = even_ranges(count, size)[index]
                    for first in range(0, rows * ranks * count, count):
                        residual[low:high] += checkpoint.read(key, first + low, first + high)

    def _residuals(self, slot: int, is_kept: bool) -> Iterator[tuple[str, torch.Size, Tensor]]:
        """Every trained parameter's part of a slot, flat; views of the residuals themselves."""
        if not self.reducer.has_feedback:
            return
        for number, bucket in enumerate(self.gradient_layout()):
            numels = [math.prod(shape) for _, shape in bucket]
            dtype = self.context.precision.parameters
            feedback = self.reducer.feedback(number, slot, sum(numels), dtype)
            parts = feedback.after(is_kept).split(numels)
            for (name, shape), part in zip(bucket, parts, strict=True):
                yield name, shape, part
