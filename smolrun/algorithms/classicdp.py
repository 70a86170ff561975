"""Classic data parallelism: every rank holds the whole model, sees its share of the batch, and
gradients are summed.

    rank 0   backward: [bucket 0][bucket 1][bucket 2]                          update
    network            ......[ ring all_reduce 0 ][ 1 ][ 2 ]
    rank 1   backward: [bucket 0][bucket 1][bucket 2]                          update

Gradients leave in buckets while backward still computes the rest, in a ring that moves 2(N-1)/N of
their bytes. All ranks receive the same bytes and take the same step, so replicas stay equal bit by
bit without ever sending weights.

With staleness K the update of step t applies the sums of step t-K, on all ranks alike: replicas
stay equal, no rank begins step t before all have finished step t-K-1, and the network has K whole
steps to hide behind.

With quantization gradients travel in fewer bits: parts/quantized_all_reduce.py.
All ranks decode the same bytes, so replicas stay equal too; what rounding took away is kept for
the next step.

Equal sums do not make equal replicas where machines are of different kinds, as their optimizer
kernels differ in last bits. There the owner computes: every rank steps its own slices of all
parameters, and the others take the bytes that it found (fsdp's stage 1).

Source: Li et al., "PyTorch Distributed: Experiences on Accelerating Data Parallel Training", 2020
(buckets, overlap); Ho et al., "More Effective Distributed ML via a Stale Synchronous Parallel
Parameter Server", 2013 (bounded staleness)."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch

from smolrun.algorithms import saved, saved_residuals
from smolrun.algorithms.base import Algorithm, Context, PendingUpdate
from smolrun.checkpoints.reader import CheckpointReader
from smolrun.checkpoints.tensor_slice import TensorSlice
from smolrun.collectives.api import new_group
from smolrun.data.splits import Batch
from smolrun.mesh.mesh import Work
from smolrun.parts.buckets import Bucket, GradientBuckets
from smolrun.parts.device_class import device_class, gather_classes
from smolrun.parts.gradient_reducer import GradientReducer
from smolrun.parts.replicas import make_equal

_log = logging.getLogger(__name__)


def classicdp(
    context: Context, *, bucket_mb: float, shard_optimizer: bool | Literal["auto"]
) -> Algorithm:
    """Replicas that all ranks step, or that their owners step; "auto": the latter where ranks are
    of different device classes and the optimizer can step slices. Collective."""
    from smolrun.algorithms.fsdp import OptimizerShards  # whose base class is below

    classes = gather_classes(new_group(context.mesh), device_class(context.device))
    is_mixed = len(set(classes)) > 1
    if shard_optimizer == "auto":
        shard_optimizer = is_mixed and context.is_elementwise
    if is_mixed:
        _log.info("device classes: %s; owner computes: %s", "; ".join(classes), shard_optimizer)
    if shard_optimizer:
        return OptimizerShards(context, bucket_mb=bucket_mb)
    algorithm = ClassicDP(context, bucket_mb=bucket_mb)
    algorithm.replicas_may_differ = is_mixed
    return algorithm


class ClassicDP(Algorithm):
    """Ring all_reduce of bucketed gradients, overlapped with backward."""

    def __init__(self, context: Context, *, bucket_mb: float) -> None:
        super().__init__(context)
        self._bucket_bytes = int(bucket_mb * 1024 * 1024)
        self.sums = GradientReducer(self.collectives, context.quantization)
        self._works: list[Work] = []
        self._is_finite = True

    def place(self, model: torch.nn.Module) -> None:
        """Keeps a replica; makes sure that all start from the same bytes."""
        super().place(model)
        make_equal(self.collectives, [*model.parameters(), *model.buffers()])
        self.catch_gradients()

    def catch_gradients(self) -> None:
        """From now on backward writes into buckets."""
        self.buckets = GradientBuckets(
            self.model.parameters(),
            bucket_bytes=self._bucket_bytes,
            slots=self.context.staleness + 1,
            on_full=self._reduce,
        )

    def slot(self, step: int) -> int:
        """Where the gradients of a step are."""
        return step % (self.context.staleness + 1)

    def replica_tensors(self) -> dict[str, torch.Tensor]:
        """The whole model."""
        return dict(saved.model_tensors(self.model))

    def forward_backward(self, micro_batches: Sequence[Batch]) -> dict[str, float]:
        """As always, but backward writes into this step's slot of the buckets."""
        self._works, self._is_finite = [], True
        self.buckets.begin(self.slot(self.steps_begun))
        facts = super().forward_backward(micro_batches)
        self.buckets.finish()
        return facts

    def before_last_backward(self) -> None:
        """From now on a full bucket may leave."""
        self.buckets.arm()

    def _reduce(self, bucket: Bucket, slot: int) -> None:
        self.clock.before_send()
        flat = bucket.flat[slot]
        if self.loss_scale.value != 1.0:
            flat.div_(self.loss_scale.value)
        # One number tells whether any is not finite; it only names the culprit, the sums decide.
        self._is_finite = self._is_finite and math.isfinite(flat.sum().item())
        self._works.append(self.send(bucket, slot))

    def send(self, bucket: Bucket, slot: int) -> Work:
        """Starts to sum a full bucket over all ranks."""
        return self.sums.all_reduce(bucket.to_host(slot), bucket.index, slot)

    def synchronize(self, facts: dict[str, float]) -> PendingUpdate:
        """The buckets are on their way already; the facts follow them."""
        facts["is_finite"] = float(self._is_finite)
        table, work = self.share_facts(facts)
        return PendingUpdate(self.steps_begun, table, [*self._works, work])

    def bind_gradients(self, pending: PendingUpdate) -> list[torch.Tensor]:
        """Binds the slot of that step."""
        slot = self.slot(pending.step)
        self.buckets.bind(slot)
        return [bucket.from_host(slot) for bucket in self.buckets.buckets]

    @torch.no_grad()
    def update(self, pending: PendingUpdate, weight: float, learning_rate: float) -> float | None:
        """As always; what rounding took away counts only if the update did."""
        norm = super().update(pending, weight, learning_rate)
        self.sums.settle(self.slot(pending.step), is_kept=norm is not None)
        return norm

    def pending_gradients(self, pending: PendingUpdate) -> list[torch.Tensor]:
        """Views into what travelled, which is where `bind_gradients` takes them from."""
        return self.buckets.travelled(self.slot(pending.step))

    def gradient_layout(self) -> list[list[tuple[str, torch.Size]]]:
        """Names and shapes of the gradients in every bucket, as they lie there one by one."""
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        return [[(names[p], p.shape) for p in bucket.parameters] for bucket in self.buckets.buckets]

    def pieces(self) -> list[TensorSlice]:
        """A part of everything, and what this rank has kept of its own gradients."""
        return super().pieces() + saved_residuals.pieces(self)

    def checkpoint_bytes(self) -> int:
        """About how large a checkpoint will be, all ranks together."""
        return super().checkpoint_bytes() + saved_residuals.expected_bytes(self)

    def restore(self, checkpoint: CheckpointReader, state: Mapping[str, Any]) -> None:
        """Goes on where `checkpoint` was made."""
        super().restore(checkpoint, state)
        saved_residuals.restore(self, checkpoint)
