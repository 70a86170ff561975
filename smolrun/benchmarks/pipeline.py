"""Pipelines with emulated compute: how long stages idle by schedule, and the cut of a model for
ranks of unequal speed.

    speeds 4:2:1:1       16 equal layers, 4 a rank     cut by speed
    rank 0               [ 1 ] . . . . . .             [  8 layers: 2 ]
    rank 1               [   2   ] . . . .             [  4 layers: 2 ]
    rank 2               [       4       ]             [  2 layers: 2 ]
    rank 3               [       4       ]             [  2 layers: 2 ]

A stage takes the time of its layers, backward twice that of forward, most of which is sleeping; the
schedule, the hops of hidden states and gradients, and the update are those of
algorithm=mp_pipeline. The peer of a schedule is its simulation, in which hops and updates take no
time; the peers of a cut are the other cuts of the same layers, the best ones by that simulation."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from smolrun.algorithms.base import StepResult
from smolrun.algorithms.layer_cut import cut_layers
from smolrun.algorithms.mp_pipeline import Pipeline
from smolrun.benchmarks.compare import compare, summed
from smolrun.benchmarks.serving import smollm2_shape
from smolrun.benchmarks.stragglers import ScriptedPace, paced_context
from smolrun.data.splits import Batch
from smolrun.mesh.mesh import Mesh
from smolrun.models.decoder import Decoder
from smolrun.parts.pipeline_schedule import SCHEDULES, Simulation, simulate
from smolrun.parts.placement import shares
from smolrun.parts.precision import PRECISIONS

_VOCAB, _WIDTH, _TOKENS = 32, 64, 16
_BACKWARD = 2.0  # times as long as forward
_MEASURED_WITH: dict[str, Any] = {"schedule": "1f1b", "micro_batches": "auto", "layers": None}


class PacedPipeline(Pipeline):
    """A pipeline of `layers` equal layers, of which one takes `layer_s` forward at speed 1; what is
    really computed is a part of that. How many layers a stage has is said with every step."""

    def __init__(self, mesh: Mesh, layers: int, layer_s: float) -> None:
        self._pace = ScriptedPace()
        super().__init__(paced_context(mesh, self._pace), **_MEASURED_WITH)
        self.place(_decoder(self.stages))
        self.num_layers, self.layer_s = layers, layer_s
        self.equal = shares(layers, [1.0] * self.stages)

    def run(
        self, schedule: str, micro_batches: int, forward_s: Sequence[float]
    ) -> StepResult | None:
        """A training step of stages that take so long for a micro-batch forward."""
        self._schedule, self._forward_s = SCHEDULES[schedule], forward_s[self.stage]
        tokens = torch.zeros(1, _TOKENS, dtype=torch.int64)
        return self.train_step([Batch(tokens, tokens)] * micro_batches)

    def run_forward(self, batch: Batch, hidden: Tensor | None) -> tuple[Tensor, Tensor]:
        self._pace.next_s += self._forward_s
        return super().run_forward(batch, hidden)

    def run_backward(
        self, batch: Batch, inputs: Tensor, output: Tensor, gradient: Tensor | None
    ) -> dict[str, float]:
        self._pace.next_s += _BACKWARD * self._forward_s
        return super().run_backward(batch, inputs, output, gradient)

    def facts(self) -> dict[str, Any]:
        """The fields that describe the setup, for a row."""
        parameters = sum(parameter.numel() for parameter in self.whole_parameters())
        return {"world_size": self.stages, "parameters": parameters, "paced": True}


def _decoder(layers: int) -> Decoder:
    """Small, as its computing is emulated."""
    small = dataclasses.replace(
        smollm2_shape(layers),
        width=_WIDTH,
        heads=1,
        kv_heads=1,
        head_width=_WIDTH,
        ffn_width=_WIDTH,
    )
    return Decoder(small, _VOCAB)


def compare_schedules(
    pipeline: PacedPipeline,
    schedules: Sequence[str],
    *,
    micro_batches: int,
    steps: int,
    repeats: int,
) -> Iterator[dict[str, Any]]:
    """A row for each schedule, with equal stages on ranks of speed 1; collective. `bubble` is the
    share of a step in which stages idle."""
    forward_s = [pipeline.layer_s * count for count in pipeline.equal]
    for schedule in schedules:
        pipeline.run(schedule, 1, forward_s)  # warm up
        taken = [
            _timed(pipeline, steps, schedule, micro_batches, forward_s) for _ in range(repeats)
        ]
        ideal = simulated(schedule, micro_batches, forward_s)
        result = summed(taken, [(ideal.seconds, 1.0)] * repeats)
        op = f"{schedule}, {micro_batches} micro-batches"
        yield {
            **result.row("pipeline", op, "simulation", **pipeline.facts()),
            "bubble": 1 - (1 - ideal.bubble) / result.ratio,
            "simulated_bubble": ideal.bubble,
        }


def _timed(
    pipeline: PacedPipeline,
    steps: int,
    schedule: str,
    micro_batches: int,
    forward_s: Sequence[float],
) -> tuple[float, float]:
    """Seconds of clock and of processor per step."""
    pipeline.collectives.barrier()
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(steps):
        pipeline.run(schedule, micro_batches, forward_s)
    return (time.perf_counter() - wall) / steps, (time.process_time() - cpu) / steps


def compare_cuts(
    pipeline: PacedPipeline,
    speeds: Sequence[float],
    schedule: str,
    *,
    micro_batches: int,
    splits: int,
    steps: int,
    repeats: int,
) -> Iterator[dict[str, Any]]:
    """Rows of our cut for ranks of such speeds beside equal stages, and beside the best `splits`
    others; collective."""
    own = our_cut(pipeline.num_layers, speeds)

    def seconds_of(split: Sequence[int]) -> list[float]:
        return [pipeline.layer_s * n / speed for n, speed in zip(split, speeds, strict=True)]

    def ideal_s(split: Sequence[int]) -> float:
        return simulated(schedule, micro_batches, seconds_of(split)).seconds

    best = sorted(every_split(pipeline.num_layers, pipeline.stages), key=ideal_s)
    for split in [pipeline.equal, *[split for split in best if split != own][:splits]]:
        result = compare(
            functools.partial(pipeline.run, schedule, micro_batches, seconds_of(own)),
            functools.partial(pipeline.run, schedule, micro_batches, seconds_of(split)),
            repeats=repeats,
            calls=steps,
            meet=pipeline.collectives.barrier,
        )
        yield {
            **result.row("pipeline", _plain(own), _plain(split), **pipeline.facts()),
            "speeds": list(speeds),
            "simulated_ratio": ideal_s(own) / ideal_s(split),
        }


def simulated(schedule: str, micro_batches: int, forward_s: Sequence[float]) -> Simulation:
    """A step of stages that take so many seconds for a forward."""
    stages = len(forward_s)
    actions = [SCHEDULES[schedule](stage, stages, micro_batches) for stage in range(stages)]
    return simulate(actions, forward_s, [_BACKWARD * seconds for seconds in forward_s])


def our_cut(layers: int, speeds: Sequence[float]) -> list[int]:
    """How many layers algorithm=mp_pipeline gives to ranks of such speeds."""
    with torch.device("meta"):
        model = _decoder(layers)
    precision = PRECISIONS["float32"]
    cut = cut_layers(model, None, len(speeds), precision=precision, copies=1, speeds=speeds)
    return [len(stage) for stage in cut]


def every_split(layers: int, stages: int) -> Iterator[list[int]]:
    """All ways to give every stage a layer at least."""
    for ends in itertools.combinations(range(1, layers), stages - 1):
        yield [end - first for first, end in itertools.pairwise((0, *ends, layers))]


def _plain(split: Sequence[int]) -> str:
    return f"cut {'+'.join(map(str, split))}"
