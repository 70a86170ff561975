"""A whole training step of ours beside DistributedDataParallel's on gloo.

Same model, same batches, same optimizer, same clipping, in the same processes.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import (
    bf16_compress_hook,
    fp16_compress_hook,
)
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from smolrun.algorithms.base import Algorithm
from smolrun.algorithms.contract import IGNORED
from smolrun.benchmarks.compare import compare
from smolrun.data.base import Batch

HOOKS = {"fp16": fp16_compress_hook, "bf16": bf16_compress_hook}


class PeerStep:
    """A step as people write it with torch alone; `hook` compresses gradients."""

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        grad_clip: float,
        hook: str = "none",
    ) -> None:
        self.name = "ddp-gloo" if hook == "none" else f"ddp-gloo-{hook}"
        self.model = DistributedDataParallel(model)
        if hook != "none":
            self.model.register_comm_hook(state=None, hook=HOOKS[hook])
        self._optimizer = optimizer
        self._grad_clip = grad_clip
        self.loss = 0.0

    def __call__(self, batch: Batch, learning_rate: float) -> None:
        """Forward, backward, clip, update; keeps this rank's loss."""
        logits = self.model(batch.inputs).flatten(0, -2)
        loss = cross_entropy(logits, batch.targets.flatten(), ignore_index=IGNORED)
        self._optimizer.zero_grad()
        loss.backward()
        if self._grad_clip:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self._grad_clip)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()
        self.loss = loss.item()


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

    `wait_s` is what rank 0 waited for the network in a step, `bytes_sent` what it sent: of the
    time that these bytes need on the link, all that is not waited for is hidden behind compute.
    """
    counts = {"ours": 0, "peer": 0}
    losses = {"ours": 0.0, "peer": 0.0}
    waits: list[float] = []
    mesh = algorithm.context.mesh
    sent_before = mesh.bytes_sent

    def our_step() -> None:
        result = algorithm.train_step([batch(counts["ours"])])
        counts["ours"] += 1
        if result is not None:
            losses["ours"] = result.loss
            waits.append(result.wait_s)

    def peer_step() -> None:
        step = counts["peer"]
        peer(batch(step), algorithm.context.learning_rate(step))
        counts["peer"] += 1
        losses["peer"] = peer.loss

    meet = algorithm.collectives.barrier
    result = compare(our_step, peer_step, repeats=repeats, calls=steps, meet=meet, warm_up=warm_up)
    return result.row(
        "step",
        "train_step",
        peer.name,
        world_size=algorithm.collectives.size,
        parameters=sum(parameter.numel() for parameter in peer.model.parameters()),
        quantization=algorithm.context.quantization.kind,
        steps_run=counts["ours"],
        wait_s=statistics.median(waits) if waits else None,
        bytes_sent=(mesh.bytes_sent - sent_before) / counts["ours"],
        final_loss_ours=losses["ours"],
        final_loss_peer_rank0=losses["peer"],
    )
