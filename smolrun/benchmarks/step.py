"""A whole training step of ours beside torch's own on gloo: DistributedDataParallel, or FSDP2.

Same model, same batches, same optimizer, same clipping, in the same processes.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import (
    bf16_compress_hook,
    fp16_compress_hook,
)
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from smolrun.algorithms.base import Algorithm, StepResult
from smolrun.benchmarks.compare import compare
from smolrun.data.splits import IGNORE_INDEX, Batch

_HOOKS = {"ddp-fp16": fp16_compress_hook, "ddp-bf16": bf16_compress_hook}


class PeerStep:
    """A training step with torch alone. `kind` is ddp, ddp-fp16 or ddp-bf16 (gradients are sent in
    so many bits, by torch's own hooks), or fsdp2."""

    def __init__(
        self,
        kind: str,
        model: torch.nn.Module,
        make_optimizer: Callable[..., torch.optim.Optimizer],
        grad_clip: float,
    ) -> None:
        self.name = f"{kind}-gloo"
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        self.model = (
            _fully_sharded(model) if kind == "fsdp2" else _replicated(model, _HOOKS.get(kind))
        )
        self._optimizer = make_optimizer(self.model.named_parameters())
        self._grad_clip = grad_clip
        self.loss = 0.0

    def __call__(self, batch: Batch, learning_rate: float) -> None:
        """Forward, backward, clip, update; keeps this rank's loss."""
        logits = self.model(batch.inputs).flatten(0, -2)
        loss = cross_entropy(logits, batch.targets.flatten(), ignore_index=IGNORE_INDEX)
        self._optimizer.zero_grad()
        loss.backward()
        if self._grad_clip:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self._grad_clip)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()
        self.loss = loss.item()


def _replicated(model: torch.nn.Module, hook: Callable[..., Any] | None) -> torch.nn.Module:
    replicated = DistributedDataParallel(model)
    if hook is not None:
        replicated.register_comm_hook(state=None, hook=hook)
    return replicated


def _fully_sharded(model: torch.nn.Module) -> torch.nn.Module:
    """FSDP2 as in its documentation: every block is a group, the rest is one more."""
    for block in getattr(model, "blocks", torch.nn.ModuleDict()).values():
        fully_shard(block)
    fully_shard(model)
    return model


@dataclass
class _MeasuredStep:
    """Runs the steps of one side, and records the bytes that this host sends in each."""

    step: Callable[[int], None]
    count: int = 0
    cable: list[int] = field(default_factory=list)

    def __call__(self) -> None:
        before = _cable_bytes()
        self.step(self.count)
        self.count += 1
        self.cable.append(_cable_bytes() - before)


def _cable_bytes() -> int:
    """Bytes that this host has sent so far over all interfaces but loopback."""
    found = psutil.net_io_counters(pernic=True)
    return sum(count.bytes_sent for name, count in found.items() if not name.startswith("lo"))


def compare_step(
    algorithm: Algorithm,
    peer: PeerStep,
    batch: Callable[[int], Batch],
    *,
    steps: int,
    warm_up: int,
    repeats: int,
) -> dict[str, Any]:
    """One row; collective. `batch(step)` gives this rank's samples, the same for both sides.

    `wait_s` is the time that rank 0 waited for the network in a step, `bytes_sent` what it sent: of
    the time that these bytes need on the link, all that is not waited for overlaps compute.
    `cable_bytes`: all bytes that rank 0's host sent in a step of either side, packet headers
    included; meaningful where every rank has a host of its own.
    """
    mesh, sent_before = algorithm.context.mesh, algorithm.context.mesh.bytes_sent
    results: list[StepResult] = []

    def our_step(step: int) -> None:
        if result := algorithm.train_step([batch(step)]):
            results.append(result)
        if step < warm_up or (step - warm_up + 1) % steps == 0:
            # At the end of a measurement: pending communication counts too.
            algorithm.replica_tensors()

    ours = _MeasuredStep(our_step)
    theirs = _MeasuredStep(lambda step: peer(batch(step), algorithm.context.learning_rate(step)))
    meet = algorithm.collectives.barrier
    result = compare(ours, theirs, repeats=repeats, calls=steps, meet=meet, warm_up=warm_up)
    return result.row(
        "step",
        "train_step",
        peer.name,
        world_size=algorithm.collectives.size,
        parameters=peer.parameters,
        quantization=algorithm.context.quantization.kind,
        steps_run=ours.count,
        wait_s=statistics.median(result.wait_s for result in results),
        bytes_sent=(mesh.bytes_sent - sent_before) / ours.count,
        cable_bytes={
            "ours": statistics.median(ours.cable),
            "peer": statistics.median(theirs.cable),
        },
        final_loss_ours=results[-1].loss,
        final_loss_peer_rank0=peer.loss,
    )
