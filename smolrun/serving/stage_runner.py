"""What one rank of a pipeline computes: its stage, the sampler if it is the last, and the time that
takes; and how long a layer takes, before there is a stage.

Shape suffixes: T tokens of the batch, D width.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Protocol

import msgspec
import psutil
import torch
from torch import Tensor

from smolrun.models.shape import DecoderShape, parameter_shapes
from smolrun.parts.step_clock import FULL_SPEED, Pace
from smolrun.serving.batch import Batch, BatchResult, Row
from smolrun.serving.json_grammar import Grammars
from smolrun.serving.messages import ServingDtype, StageStats
from smolrun.serving.sampler import Sampler
from smolrun.serving.stage import Stage
from smolrun.serving.weight_types import quantized, serving_bytes, stored_as
from smolrun.serving.weights import COMPUTE_DTYPES

# Layers that stay in a processor's cache would seem faster than those of a whole model.
_PROBE_BYTES = 128 * 1024 * 1024
_PROBE_S = 0.7
_PROBE_CONTEXT = 128  # tokens in the cache


class StageRunner(Protocol):
    """The layers of this rank. `run` takes the hidden states of the stage before, None for the
    first one, and returns hidden states [T, D] on the CPU, or what it has sampled if it is the
    last. It runs batches in the order of their numbers."""

    width: int
    dtype: torch.dtype
    max_tokens: int  # of one batch

    def run(self, batch: Batch, hidden_TD: Tensor | None) -> Tensor | BatchResult: ...


class DecoderRunner:
    """A stage of a decoder, and the sampler if it is the last one; a StageRunner."""

    def __init__(self, stage: Stage, max_tokens: int, grammars: Grammars | None = None) -> None:
        self.width = stage.shape.width
        self.dtype = stage.dtype
        self.max_tokens = max_tokens
        self._stage = stage
        self._sampler = Sampler(grammars)

    def run(self, batch: Batch, hidden_TD: Tensor | None) -> Tensor | BatchResult:
        """Hidden states on the CPU, or what was sampled."""
        output = self._stage.run(batch, hidden_TD).cpu()
        if self._stage.has_head:
            return self._sampler.sample(batch, output.numpy())
        return output.contiguous()


@dataclass
class StageTimes:
    """What a stage did so far. `stage` has what does not change; a `pace` makes it compute as a
    slower machine does."""

    stage: StageStats
    pace: Pace = FULL_SPEED
    compute_s: float = 0.0
    wait_s: float = 0.0
    network_s: float = 0.0  # counted on the I/O thread
    tokens: int = 0

    def stats(self, sent_bytes: int) -> StageStats:
        """The figures for the driver."""
        return msgspec.structs.replace(
            self.stage,
            memory_bytes=psutil.Process().memory_info().rss,
            compute_s=self.compute_s,
            wait_s=self.wait_s,
            network_s=self.network_s,
            tokens=self.tokens,
            sent_bytes=sent_bytes,
        )


def run_timed(
    runner: StageRunner, times: StageTimes, batch: Batch, hidden_TD: Tensor | None
) -> Tensor | BatchResult:
    """`runner.run`, whose time counts as computing."""
    began = time.perf_counter()
    times.pace.begin(0.0)
    output = runner.run(batch, hidden_TD)
    times.pace.end(0.0)
    times.compute_s += time.perf_counter() - began
    times.tokens += len(batch.token_ids)
    return output


def layer_seconds(
    shape: DecoderShape,
    kind: ServingDtype,
    group_size: int,
    device: torch.device,
    pace: Pace = FULL_SPEED,
) -> float:
    """How long one layer takes for one token, over layers of zeros that no processor's cache
    holds."""
    vocab_size = 1  # these stages have no embedding and no head
    size = serving_bytes(shape, vocab_size, kind, group_size).layer
    layers = max(1, min(shape.layers, _PROBE_BYTES // size))
    parameters: dict[str, Tensor] = {}
    for name, one in parameter_shapes(shape, vocab_size, 0, layers - 1, False, False).items():
        stored = stored_as(name, one, kind, group_size)
        parameters |= quantized(name, torch.zeros(one, device=device), stored, group_size)
    ends = (0, layers - 1, False, False)
    capacity, dtype = min(_PROBE_CONTEXT, shape.max_sequence_length), COMPUTE_DTYPES[kind]
    stage = Stage(shape, vocab_size, *ends, parameters, slots=1, capacity=capacity, dtype=dtype)
    hidden_TD = torch.zeros((1, shape.width), dtype=dtype)
    batch = Batch(0, [Row(0, stage.capacity - 1, 1, False)], [0])
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < 3 or time.perf_counter() - began < _PROBE_S:
        before = time.perf_counter()
        pace.begin(0.0)
        stage.run(batch, hidden_TD).cpu()
        pace.end(0.0)
        times.append(time.perf_counter() - before)
    return sorted(times)[len(times) // 2] / layers
