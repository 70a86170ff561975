"""Stage 1 of fsdp, and classicdp on unlike machines: every rank holds the whole model, and the
optimizer for its own slices of it.

    rank 0   backward ][ reduce_scatter ]  steps its slices  [ all_gather, and the next forward
    rank 1   backward ][ reduce_scatter ]  steps its slices  [ all_gather, and the next forward

Parameters lie flat in buckets, and every bucket is cut among the ranks, in proportion to
`Context.shard_weights`. A rank sums, clips and steps its own slices and gathers the others'.
A layer waits for its gather when forward uses it, so the network works while forward does.

Source: Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models",
2020.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from smolrun.algorithms.base import Context, PendingUpdate
from smolrun.algorithms.bucketed import BucketedAlgorithm
from smolrun.checkpoints.tensor_slice import TensorSlice
from smolrun.mesh.mesh import Work
from smolrun.parts.buckets import Bucket, pack
from smolrun.parts.flat_shards import PendingAllGather, ShardedBucket, cut
from smolrun.parts.norms import combine_norms
from smolrun.parts.replicas import model_tensors, sync_replicas
from smolrun.parts.unshard_on_access import watch


class OptimizerShards(BucketedAlgorithm):
    """Replicas of which a rank sums and steps its own slices only."""

    def __init__(self, context: Context, *, bucket_mb: float) -> None:
        super().__init__(context, bucket_mb=bucket_mb)
        self._weights = context.shard_weights or (1.0,) * self.collectives.size
        self._gathers: dict[ShardedBucket, PendingAllGather] = {}  # of parameters that were stepped

    def place(self, model: nn.Module) -> None:
        """Keeps a replica, moved into flat buckets, and steps this rank's slices of it."""
        self.model = model
        sync_replicas(self.collectives, [*model.parameters(), *model.buffers()])
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.shards = cut(
            model, pack(trained, self._bucket_bytes), self._weights, self.collectives.index
        )
        self._replica = [bucket.flatten_parameters() for bucket in self.shards]
        self._bucket_of = {p: bucket for bucket in self.shards for p in bucket.parameters}
        watch(model, self._use)
        self.step_slices()
        self.catch_gradients()

    def step_slices(self) -> None:
        """Makes the optimizer for this rank's slices of what is trained."""
        self.trained_shards = [bucket for bucket in self.shards if bucket.is_trained]
        self._trained_slices = {
            part.name: part for bucket in self.trained_shards for part in bucket.slices
        }
        self.optimized_params = [(name, part.values) for name, part in self._trained_slices.items()]
        # torch's optimizers need a parameter; a rank may own none, of a very small head.
        nothing = torch.empty(
            0, dtype=self.context.precision.parameters, device=self.context.device
        )
        self.optimizer = self.context.make_optimizer(
            self.optimized_params or [("", nn.Parameter(nothing))]
        )

    # -- a step ----

    def send(self, bucket: Bucket, slot: int) -> Work:
        """Half of an all_reduce: every rank gets its own part of the sum."""
        sizes = self.shards[bucket.index].sizes
        return self.reducer.reduce_scatter(bucket.to_host(slot), sizes, bucket.index, slot)

    def bind_gradients(self, pending: PendingUpdate) -> list[Tensor]:
        """This rank's parts of the sums."""
        pairs = zip(self.trained_shards, self.summed(pending), strict=True)
        return [bucket.bind(own.to(bucket.device)) for bucket, own in pairs]

    def summed(self, pending: PendingUpdate) -> list[Tensor]:
        """This rank's part of every bucket's sum, once the works of the update are done; memory
        that a checkpoint is written from and read into."""
        slot = self.slot(pending.step)
        pairs = zip(self.shards, self.buckets.buckets, strict=True)
        return [shard.own(bucket.host[slot]) for shard, bucket in pairs]

    @torch.no_grad()
    def update(self, pending: PendingUpdate, weight: float, learning_rate: float) -> float | None:
        """Steps this rank's slices; then starts to gather those of all ranks."""
        self.wait_for_transfers()  # what is being sent must not change
        norm = super().update(pending, weight, learning_rate)
        if norm is not None:
            self.gather_slices()
        return norm

    def gather_slices(self) -> None:
        """Starts to gather what the other ranks have stepped; first what forward needs first."""
        for bucket, flat in reversed(list(zip(self.shards, self._replica, strict=True))):
            self._gathers[bucket] = bucket.gather(self.collectives, flat)

    def wait_for_transfers(self) -> None:
        """Blocks until the replica is whole."""
        for bucket in list(self._gathers):
            self._finish_gather(bucket)

    def _use(self, parameter: nn.Parameter) -> None:
        """Called before `parameter` is read from the model: an old value is never seen."""
        bucket = self._bucket_of.get(parameter)
        if bucket in self._gathers:
            self._finish_gather(bucket)

    def _finish_gather(self, bucket: ShardedBucket) -> None:
        gathering = self._gathers.pop(bucket)
        self.clock.wait(gathering.work)
        gathering.copy_to_device()

    def replica_tensors(self) -> dict[str, Tensor]:
        """The whole model; blocks until it is there."""
        self.wait_for_transfers()
        return super().replica_tensors()

    def norm_squared(self, gradients: list[Tensor]) -> float:
        """Every element has one owner, so the squares of all ranks add up."""
        own = torch.tensor([super().norm_squared(gradients)], dtype=torch.float64)
        return self.all_ranks(own).item()

    def whole_norms(self, norms: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
        """A layer's norm from its parts on all ranks."""
        names = [name for name, p in self.model.named_parameters() if p.requires_grad]
        return combine_norms(norms, names, self.all_ranks)

    # -- what a checkpoint holds: the keys that a whole model would have, in slices ----

    def gradient_layout(self) -> list[list[tuple[str, torch.Size]]]:
        """As the parameters lie in the buckets of shards."""
        return [
            list(zip(bucket.names, bucket.shapes, strict=True)) for bucket in self.trained_shards
        ]

    def model_slices(self) -> Iterator[TensorSlice]:
        """This rank's slices; of a parameter that is whole here, the rest is for reading only."""
        own = {part.name: part for bucket in self.shards for part in bucket.slices}
        cut_names = {name for bucket in self.shards for name in bucket.names}
        for name, tensor in model_tensors(self.model):
            key = f"model/{name}"
            if name not in cut_names:
                yield TensorSlice.whole(key, tensor)
                continue
            if name in own:
                part = own[name]
                yield TensorSlice(key, part.shape, part.start, part.values.detach())
            if self.needs_full_model:
                yield TensorSlice.whole(key, tensor, "other")
            elif name not in own:
                nothing = tensor.new_empty(0, dtype=self.context.precision.parameters)
                yield TensorSlice(key, tuple(tensor.shape), 0, nothing, "other")

    def optimizer_slice(self, key: str, name: str, values: Tensor) -> TensorSlice:
        """Of this rank's slice of a parameter."""
        part = self._trained_slices[name]
        if values.ndim:
            return TensorSlice(key, part.shape, part.start, values)
        # A counter, equal in all slices of a parameter.
        return TensorSlice.whole(key, values, "this" if part.start == 0 else "other")

    def is_on_other_rank(self, name: str) -> bool:
        """Whether this rank has no slice of a trained parameter."""
        trained = (bucket.names for bucket in self.trained_shards)
        return name not in self._trained_slices and any(name in names for names in trained)

    def pending_slices(self) -> Iterator[TensorSlice]:
        """This rank's parts of the sums."""
        for number, pending in enumerate(self.pending_updates):
            for bucket, own in zip(self.trained_shards, self.summed(pending), strict=True):
                for part in bucket.slices:
                    key = f"in_flight/{number}/{part.name}"
                    yield TensorSlice(key, part.shape, part.start, part.of(own))

    def whole_parameters(self) -> Iterator[nn.Parameter]:
        """In the dtype of the shards; parameters may be there in half precision just now."""
        bucket_of = {p: bucket for bucket in self.shards for p in bucket.parameters}
        for parameter in self.model.parameters():
            if bucket := bucket_of.get(parameter):
                whole = torch.empty(parameter.shape, dtype=bucket.dtype, device="meta")
                yield nn.Parameter(whole, bucket.is_trained)
            else:
                yield parameter
