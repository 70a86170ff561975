"""A whole training step of classicdp beside DistributedDataParallel on gloo: same model, same
batches, same optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from smolrun.algorithms.base import IGNORED, Algorithm
from smolrun.benchmarks.compare import compare
from smolrun.data.base import Batch


def compare_step(
    algorithm: Algorithm,
    peer_model: torch.nn.Module,
    peer_optimizer: torch.optim.Optimizer,
    batch: Callable[[int], Batch],
    *,
    steps: int,
    warm_up: int,
    repeats: int,
) -> dict[str, Any]:
    """One row; collective. `peer_model` is a second copy of the placed model, `batch(step)` this
    rank's samples."""
    peer = DistributedDataParallel(peer_model)
    counts = {"ours": 0, "peer": 0}
    losses = {"ours": 0.0, "peer": 0.0}

    def our_step() -> None:
        result = algorithm.train_step([batch(counts["ours"])])
        counts["ours"] += 1
        losses["ours"] = result.loss if result is not None else 0.0

    def peer_step() -> None:
        samples = batch(counts["peer"])
        counts["peer"] += 1
        loss = cross_entropy(
            peer(samples.inputs).flatten(0, -2), samples.targets.flatten(), ignore_index=IGNORED
        )
        peer_optimizer.zero_grad()
        loss.backward()
        clip = algorithm.context.grad_clip
        if clip:
            torch.nn.utils.clip_grad_norm_(peer.parameters(), clip)
        peer_optimizer.step()
        losses["peer"] = loss.item()

    result = compare(
        our_step,
        peer_step,
        repeats=repeats,
        calls=steps,
        meet=algorithm.collectives.barrier,
        warm_up=warm_up,
    )
    return {
        "bench": "step",
        "op": "train_step",
        "world_size": algorithm.collectives.size,
        "parameters": sum(parameter.numel() for parameter in peer_model.parameters()),
        "ours_s": result.ours_s,
        "peer": "ddp-gloo",
        "peer_s": result.peer_s,
        "ratio": result.ratio,
        "repeats": result.repeats,
        "spread": list(result.spread),
        "cpu_ratio": result.ours_cpu_s / result.peer_cpu_s,
        "final_losses": [losses["ours"], losses["peer"]],
    }
