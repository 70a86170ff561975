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

Source: as in parts/pipeline_schedule.py; weights in two versions: Narayanan et al.,
"Memory-Efficient Pipeline-Parallel DNN Training", 2021 (PipeDream-2BW).
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from smolrun.algorithms.base import Algorithm, Context, PendingUpdate
from smolrun.algorithms.mp import ModelParallel
from smolrun.collectives.api import new_group
from smolrun.data.splits import Batch
from smolrun.mesh.mesh import Work
from smolrun.parts.pipeline_schedule import SCHEDULES, StageAction, without_flush
from smolrun.parts.placement import DataCoordinates
from smolrun.parts.stage_links import PendingReceive

_AHEAD = 2  # actions whose receives are posted before they begin; each may need memory for a tensor
_PER_STAGE = 4  # micro-batches: 3 stages then idle for 2 of 14 parts of a step


def mp_pipeline(
    context: Context,
    *,
    schedule: Literal["1f1b", "gpipe"],
    micro_batches: int | Literal["auto"],
    layers: Sequence[Sequence[int]] | None,
) -> Algorithm:
    """The pipeline of a schedule; 1f1b with stale gradients is not emptied between steps."""
    if schedule == "1f1b" and context.staleness:
        return PipelineWithoutFlush(context, schedule, micro_batches, layers)
    return Pipeline(context, schedule, micro_batches, layers)


class Pipeline(ModelParallel):
    """One stage of layers, several micro-batches in flight."""

    def __init__(
        self,
        context: Context,
        schedule: str,
        micro_batches: int | Literal["auto"],
        layers: Sequence[Sequence[int]] | None,
    ) -> None:
        super().__init__(context, layers=layers)
        self._schedule = SCHEDULES[schedule]
        is_auto = micro_batches == "auto"
        self._micro_batches = _PER_STAGE * self.stages if is_auto else int(micro_batches)
        # What went forward and not backward yet, with inputs and outputs; oldest first.
        self.open: deque[tuple[Batch, Tensor, Tensor]] = deque()

    def data_coordinates(self, speeds: Sequence[float]) -> DataCoordinates:
        """All stages read the same samples, in as many micro-batches at least."""
        return DataCoordinates(0, [1.0], self._micro_batches)

    def forward_backward(self, micro_batches: Sequence[Batch]) -> dict[str, float]:
        """All micro-batches through all stages and back."""
        self.optimizer.zero_grad(set_to_none=True)
        batches = [batch for batch in micro_batches if len(batch.inputs)]
        stats = self.walk(self._schedule(self.stage, self.stages, len(batches)), batches)
        self.links.finish()
        return stats

    def walk(self, actions: Sequence[StageAction], batches: Sequence[Batch]) -> dict[str, float]:
        """Runs actions in their order: forwards of `batches`, backwards of what is open and of
        these. Receives are posted some actions before."""
        stats = {"loss_sum": 0.0, "num_targets": 0.0}
        to_post = {
            "forward": iter(batches),
            "backward": iter([*(o[0] for o in self.open), *batches]),
        }
        forward, posted = iter(batches), deque[PendingReceive | None]()
        for number, (kind, micro_batch) in enumerate(actions):
            for ahead, _ in actions[number + len(posted) : number + _AHEAD + 1]:
                post = self.post_inputs if ahead == "forward" else self.post_gradient
                posted.append(post(next(to_post[ahead])))
            arrived = self.links.take(posted.popleft())
            with self.clock.span(f"{kind} {micro_batch}"):
                if kind == "forward":
                    batch = next(forward)
                    self.open.append((batch, *self.run_forward(batch, arrived)))
                else:
                    added = self.run_backward(*self.open.popleft(), arrived)
                    stats = {name: stats[name] + added[name] for name in stats}
        return stats


class PipelineWithoutFlush(Pipeline):
    """With stale gradients: the last micro-batches of a step go backward in the next one."""

    more_copies = 2

    def place(self, model: nn.Module) -> None:
        """Also the weights of two steps, where a step ends with micro-batches that are open."""
        super().place(model)
        self._versions = [] if self.is_last else [copy.deepcopy(self.model) for _ in range(2)]
        # Of every step whose update is not made: gradients, their loss scale, backwards to come.
        self._gradients: dict[int, list[Tensor]] = {}
        self._scales: dict[int, float] = {}
        self._backwards: dict[int, int] = {}
        self._tied_sums: dict[int, list[Work]] = {}
        self._norms_squared: dict[int, tuple[Tensor, Work]] = {}
        # Stages are at different places of a step when they know their part of the norm.
        self._norm_group = new_group(self.context.mesh, self.collectives.ranks, "gradient norm")

    def forward_backward(self, micro_batches: Sequence[Batch]) -> dict[str, float]:
        """All micro-batches forward, and as many backward as the stages after this one allow."""
        step = self.steps_begun
        self.optimizer.zero_grad(set_to_none=True)  # of the update before; steps have their own
        batches = [batch for batch in micro_batches if len(batch.inputs)]
        self.running = self._version(step)
        trained = [p for p in self.running.parameters() if p.requires_grad]
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        self._gradients[step] = [p.grad for p in trained if p.grad is not None]
        self._scales[step], self._backwards[step] = self.loss_scale.value, len(batches)
        actions = without_flush(self.stage, self.stages, len(batches), len(self.open))
        stats = self.walk(actions, batches)
        self.running = self.model
        self.links.prune()
        return stats

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
        step = next(iter(self._backwards))
        self._backwards[step] -= 1
        if not self._backwards[step]:
            del self._backwards[step]
            self._complete(step)
        return stats

    def _complete(self, step: int) -> None:
        """Starts to sum over stages what they have to know of a gradient that is whole."""
        gradients, scale = self._gradients[step], self._scales.pop(step)
        for gradient in gradients:
            gradient.div_(scale)
        self._tied_sums[step] = self.sum_tied(gradients)
        if not (self.is_first and self._tied_sums[step]):  # else this stage's part needs the sum
            self._start_norm(step)

    def _start_norm(self, step: int) -> None:
        total = self.own_squares(self._gradients[step])
        work = self._norm_group.all_reduce(total, async_op=True)
        self._norms_squared[step] = total, work

    def synchronize(self, stats: dict[str, float]) -> PendingUpdate:
        """The gradient may not be whole yet: the norm will say whether it is finite."""
        gradients = self._gradients[self.steps_begun]
        self._delayed.append(gradients)
        stats["is_finite"] = float(all(bool(torch.isfinite(own).all()) for own in gradients))
        return PendingUpdate(self.steps_begun, *self.share_stats(stats))

    def wait_for(self, pending: PendingUpdate) -> None:
        """Blocks until the gradient is whole, and summed."""
        super().wait_for(pending)
        if pending.step in self._backwards:  # the last step: nothing will follow that completes it
            todo = [StageAction("backward", number) for number in range(-len(self.open), 0)]
            with self.clock.compute():
                self.walk(todo, [])
        for work in self._tied_sums.get(pending.step, []):
            self.clock.wait(work)
        if pending.step in self._gradients and pending.step not in self._norms_squared:
            self._start_norm(pending.step)

    @torch.no_grad()
    def update(self, pending: PendingUpdate, weight: float, learning_rate: float) -> float | None:
        """Also forgets the step."""
        self._updated = pending.step
        norm = super().update(pending, weight, learning_rate)
        for kept in (self._gradients, self._tied_sums, self._norms_squared):
            kept.pop(pending.step, None)
        return norm

    def norm_squared(self, gradients: list[Tensor]) -> float:
        """Summed already, unless the gradient comes from a checkpoint."""
        if self._updated not in self._norms_squared:
            return super().norm_squared(gradients)
        total, work = self._norms_squared[self._updated]
        self.clock.wait(work)
        return total.item()
