"""Pipeline parallelism: the stages of mp, and several micro-batches on their way through them, so
that all ranks compute.

    rank 0   F0 F1 F2 .  .  B0 F3 B1 .  B2 .  B3     1f1b, 3 stages, 4 micro-batches
    rank 1   .  F0 F1 .  B0 F2 B1 F3 B2 .  B3 .
    rank 2   .  .  F0 B0 F1 B1 F2 B2 F3 B3 .  .

A rank walks the actions of its stage (parts/pipeline_schedule.py), one after the other. What an
action needs from a neighbour is received while earlier ones compute, and what it sends leaves while
later ones do. At the end of a step the pipeline is empty again and all stages update, so the result
is that of `single`, whatever the schedule.

Source: as in parts/pipeline_schedule.py.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Literal

from torch import Tensor

from smolrun.algorithms.base import Context
from smolrun.algorithms.mp import ModelParallel
from smolrun.data.splits import Batch
from smolrun.parts.pipeline_schedule import SCHEDULES, StageAction
from smolrun.parts.placement import DataCoordinates
from smolrun.parts.stage_links import PendingReceive

_AHEAD = 2  # actions whose receives are posted before they begin; each may need memory for a tensor
_PER_STAGE = 4  # micro-batches: 3 stages then idle for 2 of 14 parts of a step


class Pipeline(ModelParallel):
    """One stage of layers, several micro-batches in flight."""

    def __init__(
        self,
        context: Context,
        *,
        schedule: Literal["1f1b", "gpipe"],
        micro_batches: int | Literal["auto"],
        layers: Sequence[Sequence[int]] | None,
    ) -> None:
        super().__init__(context, layers=layers)
        self._schedule = SCHEDULES[schedule]
        is_auto = micro_batches == "auto"
        self._micro_batches = _PER_STAGE * self.stages if is_auto else int(micro_batches)

    def data_coordinates(self, speeds: Sequence[float]) -> DataCoordinates:
        """All stages read the same samples, in as many micro-batches at least."""
        return DataCoordinates(0, [1.0], self._micro_batches)

    def forward_backward(self, micro_batches: Sequence[Batch]) -> dict[str, float]:
        """All micro-batches through all stages and back."""
        self.optimizer.zero_grad(set_to_none=True)
        batches = [batch for batch in micro_batches if len(batch.inputs)]
        stats = {"loss_sum": 0.0, "num_targets": 0.0}
        kept: dict[int, tuple[Tensor, Tensor]] = {}  # inputs and outputs, until their backward
        for action, pending in self._with_receives(batches):
            kind, number = action
            arrived = self.links.take(pending)
            with self.clock.span(f"{kind} {number}"):
                if kind == "forward":
                    kept[number] = self.run_forward(batches[number], arrived)
                else:
                    added = self.run_backward(batches[number], *kept.pop(number), arrived)
                    stats = {name: stats[name] + added[name] for name in stats}
        self.links.finish()
        return stats

    def _with_receives(
        self, batches: Sequence[Batch]
    ) -> Iterator[tuple[StageAction, PendingReceive | None]]:
        """The actions of this stage, each with what it receives, which was posted before."""
        actions = self._schedule(self.stage, self.stages, len(batches))
        posted: deque[PendingReceive | None] = deque()
        for number, action in enumerate(actions):
            for kind, following in actions[number + len(posted) : number + _AHEAD + 1]:
                post = self.post_inputs if kind == "forward" else self.post_gradient
                posted.append(post(batches[following]))
            yield action, posted.popleft()
