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
parameters, and the others take the bytes that it found (optimizer_shards.py, fsdp's stage 1).

Source: Li et al., "PyTorch Distributed: Experiences on Accelerating Data Parallel Training", 2020
(buckets, overlap); Ho et al., "More Effective Distributed ML via a Stale Synchronous Parallel
Parameter Server", 2013 (bounded staleness)."""

from __future__ import annotations

import logging
import platform
from typing import Literal

import torch

from smolrun.algorithms.base import Algorithm, Context
from smolrun.algorithms.bucketed import BucketedAlgorithm
from smolrun.algorithms.optimizer_shards import OptimizerShards
from smolrun.collectives.api import Collectives, new_group
from smolrun.mesh.mesh import Work
from smolrun.parts.buckets import Bucket

_log = logging.getLogger(__name__)

_TEXT_BYTES = 160  # of a device class


def classicdp(
    context: Context, *, bucket_mb: float, shard_optimizer: bool | Literal["auto"]
) -> Algorithm:
    """Replicas that all ranks step, or that their owners step; "auto": the latter where ranks are
    of different device classes and the optimizer can step slices. Collective."""
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


class ClassicDP(BucketedAlgorithm):
    """Every bucket is summed over all ranks, in a ring."""

    def send(self, bucket: Bucket, slot: int) -> Work:
        """Starts the all_reduce of a full bucket."""
        return self.reducer.all_reduce(bucket.to_host(slot), bucket.index, slot)


def device_class(device: torch.device) -> str:
    """Such as "Linux x86_64, torch 2.13.0+cpu, cpu AVX2". Ranks of one class compute the same bits;
    another operating system, processor, build of torch or device may round differently, as
    compilers and vector units fuse and order operations differently."""
    unit = ""
    if device.type == "cpu":
        unit = torch.backends.cpu.get_cpu_capability()
    elif device.type == "cuda":
        unit = torch.cuda.get_device_name(device)
    machine = f"{platform.system()} {platform.machine()}"
    return f"{machine}, torch {torch.__version__}, {device.type} {unit}".strip()


def gather_classes(collectives: Collectives, own: str) -> list[str]:
    """The device classes of all ranks, in rank order; collective."""
    table = torch.zeros((collectives.size, _TEXT_BYTES), dtype=torch.uint8)
    text = own.encode("ascii", "replace")[:_TEXT_BYTES].ljust(_TEXT_BYTES)
    collectives.all_gather(table, torch.tensor(list(text), dtype=torch.uint8))
    return [bytes(row.tolist()).decode("ascii", "replace").rstrip() for row in table]
