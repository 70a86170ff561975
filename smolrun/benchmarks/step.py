"""A whole training step of ours beside torch's own on gloo: DistributedDataParallel, or FSDP2.

Same model, same batches, same optimizer, same clipping, in the same processes.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import psutil
import torch
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from smolrun.algorithms.base import Algorithm
from smolrun.algorithms.contract import IGNORED
from smolrun.benchmarks.compare import compare
from smolrun.data.base import Batch


class PeerStep:
    """A step as people write it with torch alone."""

    def __init__(
        self,
        kind: str,
        model: torch.nn.Module,
        make_optimizer: Callable[..., torch.optim.Optimizer],
        grad_clip: float,
    ) -> None:
        self.name = f"{kind}-gloo"
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        self.model = DistributedDataParallel(model) if kind == "ddp" else _cut(model)
        self._optimizer = make_optimizer(self.model.named_parameters())
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


def _cut(model: torch.nn.Module) -> torch.nn.Module:
    """As its documentation shows it: every block is a group of its own, the rest is one more."""
    for block in getattr(model, "blocks", torch.nn.ModuleDict()).values():
        fully_shard(block)
    fully_shard(model)
    return model


def _cable_bytes() -> int:
    """What this host has sent so far over anything but its loopback."""
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

    `wait_s` is what rank 0 waited for the network in a step, `bytes_sent` what it sent: of the
    time that these bytes need on the link, all that is not waited for is hidden behind compute.
    `cable_bytes` are what rank 0's host sent in a step of either side, whoever did, packet headers
    included; they say something where ranks are on hosts of their own.
    """
    counts = {"ours": 0, "peer": 0}
    losses = {"ours": 0.0, "peer": 0.0}
    waits: list[float] = []
    mesh = algorithm.context.mesh
    sent_before = mesh.bytes_sent
    cable: dict[str, list[int]] = {"ours": [], "peer": []}

    def counted(name: str, step: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            before = _cable_bytes()
            step()
            cable[name].append(_cable_bytes() - before)

        return run

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
    sides = counted("ours", our_step), counted("peer", peer_step)
    result = compare(*sides, repeats=repeats, calls=steps, meet=meet, warm_up=warm_up)
    return result.row(
        "step",
        "train_step",
        peer.name,
        world_size=algorithm.collectives.size,
        parameters=peer.parameters,
        steps_run=counts["ours"],
        wait_s=statistics.median(waits) if waits else None,
        bytes_sent=(mesh.bytes_sent - sent_before) / counts["ours"],
        cable_bytes={name: statistics.median(sent) for name, sent in cable.items()},
        final_loss_ours=losses["ours"],
        final_loss_peer_rank0=losses["peer"],
    )
