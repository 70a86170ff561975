"""Stages in one process, one behind the other, and greedy or sampled text by them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

from smolrun.models.sampling import Sampling
from smolrun.serving.batch import Batch, BatchResult, Fork, Opened, Row
from smolrun.serving.messages import ServingDtype
from smolrun.serving.sampler import Sampler
from smolrun.serving.source import ModelSource, load_stage, source_of_folder
from smolrun.serving.stage import Stage
from smolrun.serving.weights import COMPUTE_DTYPES

GREEDY = Sampling(temperature=0.0)


class Chain:
    """A model cut into `num_stages`, with a sampler behind the last one."""

    def __init__(
        self,
        source: ModelSource | Path,
        num_stages: int = 1,
        *,
        slots: int = 8,
        capacity: int = 128,
        dtype: ServingDtype = "float32",
        batch_invariant: bool = False,
    ) -> None:
        if isinstance(source, Path):
            source = source_of_folder(source, source.name)
        layers = source.shape.layers
        ends = [layers * stage // num_stages for stage in range(num_stages + 1)]
        self.stages = []
        for first, end in pairwise(ends):
            part = (first, end - 1, first == 0, end == layers)
            parameters = load_stage(source, *part, dtype)
            self.stages.append(
                Stage(
                    source.shape,
                    source.vocab_size,
                    *part,
                    parameters,
                    slots=slots,
                    capacity=capacity,
                    dtype=COMPUTE_DTYPES[dtype],
                    batch_invariant=batch_invariant,
                )
            )
        self.sampler = Sampler()
        self.number = 0

    def run(
        self,
        rows: Sequence[Row],
        token_ids: Iterable[int],
        forks: Sequence[Fork] = (),
        opened: Sequence[Opened] = (),
    ) -> BatchResult:
        """One pass through all stages."""
        batch = Batch(self.number, list(rows), list(token_ids), list(forks), list(opened))
        self.number += 1
        hidden = None
        for stage in self.stages:
            hidden = stage.run(batch, hidden)
        assert hidden is not None
        return self.sampler.sample(batch, hidden.numpy())

    def open(self, slot: int, prompt: Sequence[int], sampling: Sampling = GREEDY) -> Opened:
        """A sequence whose tokens all come by passes."""
        return Opened(slot, sampling, 0, None, [], len(prompt))

    def prefill(
        self, slot: int, prompt: Sequence[int], *, chunk: int = 1000, start: int = 0
    ) -> int:
        """The token after the prompt, whose first `start` tokens are in the slot already."""
        result = None
        for first in range(start, len(prompt), chunk):
            ids = list(prompt[first : first + chunk])
            is_last = first + chunk >= len(prompt)
            opened = [Opened(slot, GREEDY, 0, None, list(prompt[:start]), len(prompt))]
            row = Row(slot, first, len(ids), is_last)
            result = self.run([row], ids, opened=opened if first == start else [])
        assert result is not None
        return result.sampled[0].token_id

    def decode(self, lengths: dict[int, int], tokens: dict[int, int]) -> dict[int, int]:
        """One step of several sequences at once: by slot, their tokens so far and the next one."""
        rows = [Row(slot, lengths[slot], 1, True) for slot in tokens]
        result = self.run(rows, tokens.values())
        return {sampled.slot: sampled.token_id for sampled in result.sampled}
