"""A whole training step of ours beside torch's own on gloo: DistributedDataParallel, FSDP2, or a
pipeline of torch.distributed.pipelining.

Same model, same batches, same optimizer, same clipping, in the same processes.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import (
    bf16_compress_hook,
    fp16_compress_hook,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from smolrun.algorithms.base import Algorithm, StepResult
from smolrun.algorithms.contract import loss_sum
from smolrun.algorithms.mp import ModelParallel
from smolrun.benchmarks.compare import compare
from smolrun.data.splits import IGNORE_INDEX, Batch
from smolrun.models.base import StagedModel

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

    def __call__(self, batches: Sequence[Batch], learning_rate: float) -> None:
        """Forward, backward, clip, update; keeps this rank's loss."""
        (batch,) = batches
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


_SCHEDULES: Mapping[str, Any] = {"1f1b": Schedule1F1B, "gpipe": ScheduleGPipe}


class PipeliningStep:
    """A training step of torch.distributed.pipelining, in the stages that `ours` has: `model` is
    the whole one. Norms and losses are summed over stages; so is the gradient of a tied embedding.
    """

    name = "pipelining-gloo"

    def __init__(
        self,
        ours: ModelParallel,
        model: StagedModel,
        make_optimizer: Callable[..., torch.optim.Optimizer],
        *,
        schedule: str,
        grad_clip: float,
    ) -> None:
        self.parameters = sum(parameter.numel() for parameter in ours.whole_parameters())
        self._tied = model.tied_parameter
        model.keep_stage(ours.layers, ours.is_first, ours.is_last)
        assert isinstance(model, torch.nn.Module)
        self._named = dict(model.named_parameters())
        self._ends = dist.new_group([0, ours.stages - 1])
        self._stage = PipelineStage(model, ours.stage, ours.stages, torch.device("cpu"))
        self._schedule = _SCHEDULES[schedule]
        self._optimizer = make_optimizer(self._named.items())
        self._grad_clip = grad_clip
        self._num_targets = 1
        self._pipeline: Any = None  # made for the number of micro-batches of the first step
        self.loss = 0.0

    def __call__(self, batches: Sequence[Batch], learning_rate: float) -> None:
        """Forward, backward, clip, update; keeps the loss of all samples."""
        if self._pipeline is None:
            self._pipeline = self._schedule(
                self._stage, len(batches), self._mean_loss, scale_grads=False
            )
        targets = torch.cat([batch.targets for batch in batches])
        self._num_targets = int((targets != IGNORE_INDEX).sum())
        self._optimizer.zero_grad()
        losses: list[Tensor] = []
        inputs = [torch.cat([batch.inputs for batch in batches])] if self._stage.is_first else []
        given = {"target": targets, "losses": losses} if self._stage.is_last else {}
        self._pipeline.step(*inputs, return_outputs=False, **given)
        self._clip(sum(loss.item() for loss in losses))
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()

    def _mean_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """A micro-batch's part of the mean loss of the batch."""
        return loss_sum(logits, targets) / self._num_targets

    def _clip(self, loss: float) -> None:
        """By the norm of all stages' gradients; sums the loss too."""
        own = dict(self._named)
        if self._tied in own and self._stage.num_stages > 1:
            dist.all_reduce(own[self._tied].grad, group=self._ends)
            if self._stage.is_last:
                del own[self._tied]  # the first stage counts it
        gradients = [parameter.grad for parameter in own.values() if parameter.grad is not None]
        sums = torch.tensor([float(torch.nn.utils.get_total_norm(gradients)) ** 2, loss])
        dist.all_reduce(sums)
        norm, self.loss = sums[0].sqrt(), sums[1].item()
        if self._grad_clip:
            torch.nn.utils.clip_grads_with_norm_(self._named.values(), self._grad_clip, norm)


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
    peer: PeerStep | PipeliningStep,
    batches: Callable[[int], list[Batch]],
    *,
    steps: int,
    warm_up: int,
    repeats: int,
) -> dict[str, Any]:
    """One row; collective. `batches(step)` gives this rank's samples, the same for both sides.

    `wait_s` is the time that rank 0 waited for the network in a step, `bytes_sent` what it sent: of
    the time that these bytes need on the link, all that is not waited for overlaps compute.
    `cable_bytes`: all bytes that rank 0's host sent in a step of either side, packet headers
    included; meaningful where every rank has a host of its own.
    """
    mesh, sent_before = algorithm.context.mesh, algorithm.context.mesh.bytes_sent
    results: list[StepResult] = []

    def our_step(step: int) -> None:
        if result := algorithm.train_step(batches(step)):
            results.append(result)
        if step < warm_up or (step - warm_up + 1) % steps == 0:
            # At the end of a measurement: pending communication counts too.
            algorithm.wait_for_transfers()

    ours = _MeasuredStep(our_step)
    theirs = _MeasuredStep(lambda step: peer(batches(step), algorithm.context.learning_rate(step)))
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
