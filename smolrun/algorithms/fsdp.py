"""Data parallelism that does not hold everything N times: each stage is the one before it, and one
thing more that is sharded among the ranks (ZeRO's stages).

    bytes per parameter, float32 and adamw   parameters  gradients  optimizer    N = 4
    stage 0   replicas, as classicdp              4          4          8          16
    stage 1   optimizer sharded                   4          4          8/N        10
    stage 2   gradients too                       4          4/N        8/N         7
    stage 3   parameters too                      4/N        4/N        8/N         4

    rank 0  forward  backward ][ reduce_scatter ]  step its slices  [ all_gather, forward ...   1, 2
    rank 1  forward  backward ][ reduce_scatter ]  step its slices  [ all_gather, forward ...
    rank 0  [ gather 0 ][ gather 1 ] ... forward, backward ... [ reduce_scatter ]  step    stage 3

Parameters lie flat in buckets, and every bucket is cut among the ranks, unevenly where ranks have
unequal memory. A rank sums, clips and steps its own slices and gathers the others'. Stages 0 to 2
allow staleness K as classicdp does; stage 3 does not, as it gathers weights in every step and a
stale gradient would belong to earlier ones.

Source: Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models",
2020; Zhao et al., "PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel", 2023.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from smolrun.algorithms.base import Algorithm, Context, EvalSums, PendingUpdate
from smolrun.algorithms.classicdp import classicdp
from smolrun.algorithms.contract import never_empty
from smolrun.algorithms.optimizer_shards import OptimizerShards
from smolrun.data.splits import Batch
from smolrun.errors import ConfigError
from smolrun.parts.buckets import pack
from smolrun.parts.flat_shards import ShardedBucket, cut
from smolrun.parts.reduce_scatter_buckets import ReduceScatterBuckets
from smolrun.parts.replicas import persistent_buffers, sync_replicas
from smolrun.parts.unshard_on_access import ParamGroup, UnshardOnAccess, layers_of, used_in_products


def fsdp(
    context: Context, *, stage: int, bucket_mb: float, max_live_buckets: int, prefetch: int
) -> Algorithm:
    """The algorithm of a stage, with those keys that apply to it."""
    if stage == 0:
        return classicdp(context, bucket_mb=bucket_mb, shard_optimizer="auto")
    if stage == 1:
        return OptimizerShards(context, bucket_mb=bucket_mb)
    if stage == 2:
        return GradientShards(context, bucket_mb=bucket_mb, max_live_buckets=max_live_buckets)
    keys = {"max_live_buckets": max_live_buckets, "prefetch": prefetch}
    return ParameterShards(context, bucket_mb=bucket_mb, **keys)


class GradientShards(OptimizerShards):
    """Stage 2: a gradient is whole only until it is reduced, after every micro-batch."""

    def __init__(self, context: Context, *, bucket_mb: float, max_live_buckets: int) -> None:
        super().__init__(context, bucket_mb=bucket_mb)
        self._max_live = max_live_buckets

    def catch_gradients(self) -> None:
        """Backward fills buckets that are there for a moment."""
        self.gradients = ReduceScatterBuckets(
            self.trained_shards,
            self.collectives,
            self.reducer,
            slots=self.context.staleness + 1,
            max_live=self._max_live,
            wait=self.clock.wait,
        )

    def forward_backward(self, micro_batches: Sequence[Batch]) -> dict[str, float]:
        """One micro-batch after the other; the buckets of each are reduced during its backward."""
        self.gradients.scale = self.loss_scale.value
        self.gradients.begin(self.slot(self.steps_begun))
        stats = {"loss_sum": 0.0, "num_targets": 0.0}
        for batch in micro_batches:
            self.gradients.begin_backward()
            added = self.one_micro_batch(batch)
            self.gradients.end_backward()
            stats = {name: stats[name] + added[name] for name in stats}
        return stats

    def one_micro_batch(self, batch: Batch) -> dict[str, float]:
        """Forward and backward; nothing for a rank without samples."""
        return Algorithm.forward_backward(self, [batch])

    def before_last_backward(self) -> None:
        """Nothing: buckets are reduced in every backward."""

    def synchronize(self, stats: dict[str, float]) -> PendingUpdate:
        """With the works of the buckets that are still being reduced."""
        self._works = self.gradients.works(self.slot(self.steps_begun))
        self._is_finite = self.gradients.is_finite
        return super().synchronize(stats)

    def summed(self, pending: PendingUpdate) -> list[Tensor]:
        """Over all micro-batches."""
        return self.gradients.finish(self.slot(pending.step))


class ParameterShards(GradientShards):
    """Stage 3: a rank holds its slices; a layer is unsharded only while it is used."""

    needs_full_model = False

    def __init__(
        self, context: Context, *, bucket_mb: float, max_live_buckets: int, prefetch: int
    ) -> None:
        super().__init__(context, bucket_mb=bucket_mb, max_live_buckets=max_live_buckets)
        self._prefetch = prefetch
        if context.staleness:
            raise ConfigError(
                "algorithm.stage=3 gathers the newest weights in every step, so a gradient that is "
                "late by staleness.bound would not belong to them; take algorithm.stage=2"
            )

    def place(self, model: nn.Module) -> None:
        """Keeps this rank's slices, one bucket after the other."""
        self.model = model
        sync_replicas(self.collectives, list(model.buffers()))
        products, half = used_in_products(model), self.context.precision.autocast
        master, self.shards = self.context.precision.parameters, []
        layers = []
        for parameters in layers_of(model, self._bucket_bytes):
            parts: list[tuple[ShardedBucket, torch.dtype]] = []
            # Frozen ones apart: they have no gradients, and every rank shall own trained ones.
            kinds = itertools.product(dict.fromkeys((half or master, master)), (True, False))
            for dtype, is_trained in kinds:
                used = [
                    p
                    for p in parameters
                    if ((p in products and half) or master) is dtype
                    and p.requires_grad is is_trained
                ]
                packed = pack(used, self._bucket_bytes)
                buckets = cut(model, packed, self._weights, self.collectives.index, master)
                for bucket in buckets:
                    bucket.load_shard(functools.partial(self.context.first_value, model))
                parts += [(bucket, dtype) for bucket in buckets]
            self.shards += [bucket for bucket, _ in parts]
            layers.append(ParamGroup(parts))
        self.shards.reverse()  # about the order of gradients
        self.step_slices()
        self.catch_gradients()
        self.parameters = UnshardOnAccess(
            model,
            layers,
            self.collectives,
            prefetch=self._prefetch,
            wait=self.clock.wait,
        )

    def replica_tensors(self) -> dict[str, Tensor]:
        """Buffers; no parameter is replicated."""
        return persistent_buffers(self.model)

    def forward_backward(self, micro_batches: Sequence[Batch]) -> dict[str, float]:
        """As stage 2; reshards afterwards. Samples that carry no loss have changed no buffer."""
        self._before_empty: dict[str, Tensor] = {}
        stats = super().forward_backward(micro_batches)
        self.parameters.reshard()
        for name, buffer in persistent_buffers(self.model).items():
            if name in self._before_empty:  # through .data: no change for torch's count of them
                buffer.data.copy_(self._before_empty[name])
        return stats

    def one_micro_batch(self, batch: Batch) -> dict[str, float]:
        """A rank without samples runs the model too, as it must take part in the all_gathers."""
        if not len(batch.inputs) and not self._before_empty:  # a rank's empty ones come last
            buffers = persistent_buffers(self.model).items()
            self._before_empty = {name: buffer.detach().clone() for name, buffer in buffers}
        with self.parameters.forward_backward_pass():
            return super().one_micro_batch(never_empty(batch))

    def gather_slices(self) -> None:
        """Nothing: a layer is gathered when it is used."""

    @torch.no_grad()
    def eval_step(self, micro_batches: Sequence[Batch]) -> EvalSums:
        """Every rank runs every micro-batch, as it takes part in the all_gathers."""
        with self.parameters.forward_backward_pass():
            sums = super().eval_step([never_empty(batch) for batch in micro_batches])
        self.parameters.reshard()
        return sums

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor:
        """On every rank."""
        with self.parameters.forward_backward_pass():
            output = super().logits(tokens)
        self.parameters.reshard()
        return output
