"""Pipeline parallelism: the stages of mp, and several micro-batches on their way through them, so
that all ranks compute.

    rank 0   F0 F1 F2 .  .  B0 F3 B1 .  B2 .  B3     1f1b, 3 stages, 4 micro-batches
    rank 1   .  F0 F1 .  B0 F2 B1 F3 B2 .  B3 .
    rank 2   .  .  F0 B0 F1 B1 F2 B2 F3 B3 .  .

A rank walks the actions of its stage (parts/pipeline_schedule.py), one after the other. What an
action needs from a neighbour is received while earlier ones compute, and what it sends leaves while
later ones do. At the end of a step the pipeline is empty again and all stages update, so the result
is that of `single`, whatever the schedule.

With staleness K, 1f1b does not empty the pipeline: a gradient is applied K steps later anyway, so
its last micro-batches may go backward in the next step, and only the first step has to fill it.

    rank 0   F0 F1 F2 .  .  B0 F3 B1 | F0 B2 F1 B3 F2 B0 F3 B1 | F0 B2 ...
    rank 1   .  F0 F1 .  B0 F2 B1 F3 B2 | F0 B3 F1 B0 F2 B1 F3 B2 | F0 ...
    rank 2   .  .  F0 B0 F1 B1 F2 B2 F3 B3 | F0 B0 F1 B1 F2 B2 F3 B3 | ...

A micro-batch goes backward through the weights that it went forward through, so all stages but the
last one have the weights three times: the newest, and those of this step and of the one before.

With `replicas` the ranks are several pipelines with one cut, one after the other: of N stages, rank
r is stage r % N of pipeline r // N. Each reads its own share of the samples, and when the gradient
of a stage is whole, the ranks that hold that stage sum theirs, while other stages go backward.

    replica 0   rank 0   F0 F1 .  B0 .  B1 [ all_reduce  ]        with rank 2
                rank 1   .  F0 B0 F1 B1 [ all_reduce  ]           with rank 3
    replica 1   rank 2   F0 F1 .  B0 .  B1 [ all_reduce  ]
                rank 3   .  F0 B0 F1 B1 [ all_reduce  ]

Source: as in parts/pipeline_schedule.py; weights in two versions: Narayanan et al.,
"Memory-Efficient Pipeline-Parallel DNN Training", 2021 (PipeDream-2BW).
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from smolrun.algorithms.base import Algorithm, Context, PendingUpdate
from smolrun.algorithms.classicdp import device_class, gather_classes
from smolrun.algorithms.mp import ModelParallel
from smolrun.data.splits import Batch
from smolrun.parts.pipeline_schedule import SCHEDULES, StageAction, without_flush
from smolrun.parts.placement import DataCoordinates
from smolrun.parts.stage_links import PendingReceive, posted_ahead

_PER_STAGE = 4  # micro-batches: 3 stages then idle for 2 of 14 parts of a step


def mp_pipeline(
    context: Context,
    *,
    schedule: Literal["1f1b", "gpipe"],
    micro_batches: int | Literal["auto"],
    layers: Sequence[Sequence[int]] | None,
    replicas: int,
) -> Algorithm:
    """The pipeline of a schedule, or one of `replicas`; 1f1b with stale gradients is not emptied
    between steps. Collective where there are several."""
    make = PipelineWithoutFlush if schedule == "1f1b" and context.staleness else Pipeline
    algorithm = make(context, schedule, micro_batches, layers, replicas)
    if replicas > 1:
        classes = gather_classes(algorithm.collectives, device_class(context.device))
        algorithm.replicas_may_differ = len(set(classes)) > 1
    return algorithm


class Pipeline(ModelParallel):
    """One stage of layers, several micro-batches in flight."""

    def __init__(
        self,
        context: Context,
        schedule: str,
        micro_batches: int | Literal["auto"],
        layers: Sequence[Sequence[int]] | None,
        replicas: int = 1,
    ) -> None:
        super().__init__(context, replicas, layers=layers)
        self._schedule = SCHEDULES[schedule]
        is_auto = micro_batches == "auto"
        self._micro_batches = _PER_STAGE * self.stages if is_auto else int(micro_batches)
        # What went forward and not backward yet, with inputs and outputs; oldest first.
        self.open: deque[tuple[Batch, Tensor, Tensor]] = deque()

    def data_coordinates(self, speeds: Sequence[float]) -> DataCoordinates:
        """As in mp, in as many micro-batches at least."""
        return replace(super().data_coordinates(speeds), micro_batches=self._micro_batches)

    def forward_backward(self, micro_batches: Sequence[Batch]) -> dict[str, float]:
        """All micro-batches through all stages and back."""
        self.begin_step()
        batches = [batch for batch in micro_batches if len(batch.inputs)]
        stats = self.walk(self._schedule(self.stage, self.stages, len(batches)), batches)
        self.end_step()
        return stats

    def walk(self, actions: Sequence[StageAction], batches: Sequence[Batch]) -> dict[str, float]:
        """Runs actions in their order: forwards of `batches`, backwards of what is open and of
        these."""
        stats, forward = {"loss_sum": 0.0, "num_targets": 0.0}, iter(batches)
        receives = posted_ahead(self._receives(actions, batches))
        for (kind, micro_batch), pending in zip(actions, receives, strict=True):
            arrived = self.links.take(pending)
            with self.clock.span(f"{kind} {micro_batch}"):
                if kind == "forward":
                    batch = next(forward)
                    self.open.append((batch, *self.run_forward(batch, arrived)))
                else:
                    added = self.run_backward(*self.open.popleft(), arrived)
                    stats = {name: stats[name] + added[name] for name in stats}
        return stats

    def _receives(
        self, actions: Sequence[StageAction], batches: Sequence[Batch]
    ) -> Iterator[PendingReceive | None]:
        """Posts what each action needs from a neighbour, in their order, whenever it is asked."""
        forward = iter(batches)
        backward = iter([*(batch for batch, _, _ in self.open), *batches])
        for kind, _ in actions:
            if kind == "forward":
                yield self.post_inputs(next(forward))
            else:
                yield self.post_gradient(next(backward))


class PipelineWithoutFlush(Pipeline):
    """With stale gradients: the last micro-batches of a step go backward in the next one."""

    more_copies = 2

    def place(self, model: nn.Module) -> None:
        """Also the weights of two steps, where a step ends with micro-batches that are open."""
        super().place(model)
        self._versions = [] if self.is_last else [copy.deepcopy(self.model) for _ in range(2)]

    def forward_backward(self, micro_batches: Sequence[Batch]) -> dict[str, float]:
        """All micro-batches forward, and as many backward as the stages after this one allow."""
        batches = [batch for batch in micro_batches if len(batch.inputs)]
        self.begin_step().backwards = len(batches)
        self.running = self._version(self.steps_begun)
        held = dict(self.running.named_parameters())
        trained = [held[name] for name, own in self.optimized_params if own.requires_grad]
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        # Those of a step before stay as they are: each step has its own.
        self._gradients[self.steps_begun] = [p.grad for p in trained if p.grad is not None]
        stats = self.walk(self._actions(len(batches)), batches)
        if not batches:  # a replica too slow for a share of the samples: its sums are the others'
            self.stage_gradients.complete(self.steps_begun, self._gradients[self.steps_begun])
        self.running = self.model
        self.links.prune()
        return stats

    def _actions(self, micro_batches: int) -> list[StageAction]:
        if not micro_batches:
            return []
        return without_flush(self.stage, self.stages, micro_batches, len(self.open))

    @torch.no_grad()
    def _version(self, step: int) -> nn.Module:
        """A model with the newest weights, which stay as they are until the step is done."""
        if self.is_last:
            return self.model
        version = self._versions[step % 2]
        for own, newest in zip(version.parameters(), self.model.parameters(), strict=True):
            own.copy_(newest)
        return version

    def run_backward(
        self, batch: Batch, inputs: Tensor, output: Tensor, gradient: Tensor | None
    ) -> dict[str, float]:
        """After the last one of a step its gradient is whole."""
        stats = super().run_backward(batch, inputs, output, gradient)
        steps = self.stage_gradients.steps
        number, step = next(item for item in steps.items() if item[1].backwards)
        step.backwards -= 1
        if not step.backwards:
            for own in self._gradients[number]:
                own.div_(step.loss_scale)
            self.stage_gradients.complete(number, self._gradients[number])
        self.stage_gradients.poll()
        return stats

    def wait_for(self, pending: PendingUpdate) -> None:
        """Blocks until the gradient is whole, and its norm is known."""
        # Of the last step: no other one will follow that completes it.
        if self.stage_gradients.steps[pending.step].backwards:
            todo = [StageAction("backward", number) for number in range(-len(self.open), 0)]
            with self.clock.compute():
                self.walk(todo, [])
        super().wait_for(pending)
