"""A model in stages (mp, mp_pipeline) before it runs: which rank has which layers, what it holds
for how many micro-batches, and how long a step takes.

The cut is made by the function that cuts in the run (algorithms/layer_cut.py); a step follows the
schedule that the run follows (parts/pipeline_schedule.py).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from smolrun.algorithms.ep import expert_ranges, layers_of_experts
from smolrun.algorithms.layer_cut import copies_held, cut_layers, cut_text
from smolrun.algorithms.mp_pipeline import PipelineWithoutFlush
from smolrun.config import RunConfig, ranks, resolved, world_size
from smolrun.config.sharding import StagesConfig
from smolrun.errors import ConfigError
from smolrun.estimate.trace import CannotTrace, build_on_meta
from smolrun.models.base import ModelSpec, StagedModel
from smolrun.parts.pipeline_schedule import SCHEDULES, Simulation, simulate
from smolrun.parts.placement import (
    known_speeds,
    least_of_stages,
    memory_limits,
    rank_speeds,
)
from smolrun.parts.precision import PRECISIONS
from smolrun.targets import load_target, model_keywords
from smolrun.training.optimizer import make_optimizer


class StageKind(NamedTuple):
    """Stages of equal kind need and do the same."""

    layers: int
    has_embedding: bool
    has_head: bool


Numbers = tuple[tuple[tuple[int, ...], ...], int]
"""Shapes of trained parameters, and how many numbers are in all else."""


@dataclass(frozen=True)
class StageShare:
    """What one rank holds where ranks hold stages of layers; `width` is that of hidden states."""

    layers: range
    kind: StageKind
    numbers: Numbers
    width: int


def model_maker(config: RunConfig, spec: ModelSpec) -> Callable[[], nn.Module]:
    """Builds the model of the configuration."""
    section = resolved(config)["model"]
    return functools.partial(load_target(section["target"]), spec, **model_keywords(section))


def build(make: Callable[[], nn.Module]) -> tuple[nn.Module, str]:
    """The model on the meta device; with values, and the reason, where it cannot be built so."""
    try:
        return build_on_meta(make), ""
    except CannotTrace as error:
        return make(), str(error)


def cut_of(
    config: RunConfig,
    model: nn.Module,
    precision_name: str,
    optimizer_name: str,
    *,
    is_limited: bool = True,
) -> list[range]:
    """The layers of every rank of an algorithm with stages, as the run cuts them; without
    `is_limited` by speed alone. ConfigError where the model or its layers cannot be cut so."""
    section, size = resolved(config), world_size(config)
    keys = config.algorithm.stages(size)
    assert keys is not None, "the algorithm has no stages"
    limits = memory_limits(section["cluster"]["hosts"]) if is_limited else ()
    return cut_layers(
        model,
        keys.layers,
        keys.count,
        precision=PRECISIONS[precision_name],
        copies=more_copies(config) + _copies(config, precision_name, optimizer_name),
        speeds=least_of_stages(known_speeds(rank_speeds(section["cluster"], size)), keys.count),
        memory_bytes=least_of_stages(limits, keys.count),
    )


def _copies(config: RunConfig, precision_name: str, optimizer_name: str) -> int:
    """Numbers in memory for each parameter."""
    optimizer = resolved(config)["optimizer"]
    if optimizer_name != optimizer["name"]:  # with the keys that it has by default
        optimizer = {"name": optimizer_name}
        optimizer |= {"momentum": 0.9} if optimizer_name == "sgd" else {}
    make = functools.partial(make_optimizer, **optimizer)
    return copies_held(make, PRECISIONS[precision_name], staleness_of(config))


@dataclass(frozen=True)
class ExpertShare:
    """What one rank holds where ranks hold experts: `numbers` of all, `experts` of these in its
    experts; `row` bytes travel for each token, one way."""

    numbers: Numbers
    experts: int
    row: int

    def token_bytes(self, tokens: int, size: int) -> int:
        """What leaves a rank if experts get equally many of its tokens: to the experts and back,
        and the same for the gradients."""
        return 4 * tokens * self.row * (size - 1) // size


def place_experts(
    config: RunConfig, spec: ModelSpec, precision: str, optimizer: str
) -> list[ExpertShare]:
    """What every rank holds; where nothing fits into the memory that is given, what is fastest.
    ConfigError where the model has no experts, or too few."""
    model, _ = build(model_maker(config, spec))
    size, cluster = world_size(config), resolved(config)["cluster"]
    place = functools.partial(
        expert_ranges,
        model,
        size,
        number_bytes=PRECISIONS[precision].parameters.itemsize
        * _copies(config, precision, optimizer),
        speeds=known_speeds(rank_speeds(cluster, size)),
    )
    try:
        placed = place(memory_bytes=memory_limits(cluster["hosts"]))
    except ConfigError:
        placed = place()
    layers = layers_of_experts(model)
    row = sum(one.moe.experts_per_token * one.router.in_features for one in layers)
    row *= PRECISIONS[precision].parameters.itemsize
    found = []
    for part in placed:
        mine, _ = build(model_maker(config, spec))
        for layer in layers_of_experts(mine):
            layer.keep(part)
        own = (p for layer in layers_of_experts(mine) for p in layer.experts.parameters())
        found.append(ExpertShare(numbers_of(mine), sum(p.numel() for p in own), row))
    return found


def staleness_of(config: RunConfig) -> int:
    """Steps by which gradients are delayed."""
    return 0 if config.staleness.bound == "auto" else config.staleness.bound


def more_copies(config: RunConfig) -> int:
    """Copies of the weights that a stage has beside its own: of 1f1b that is not emptied between
    steps."""
    keys = config.algorithm.stages(world_size(config))
    is_open = keys is not None and keys.schedule == "1f1b" and staleness_of(config) > 0
    return PipelineWithoutFlush.more_copies if is_open else 0


def cut_line(config: RunConfig, spec: ModelSpec) -> str | None:
    """Which rank of a run has which layers; None where ranks hold no stages, or where that shows
    only with the model's values. ConfigError where the model cannot be cut."""
    if (keys := config.algorithm.stages(world_size(config))) is None:
        return None
    try:
        model = build_on_meta(model_maker(config, spec))
    except CannotTrace:
        return None
    layers = cut_of(config, model, config.precision, config.optimizer.name)
    plans = ranks(config)
    hosts = [""] * len(plans)
    if len({plan.host for plan in plans}) > 1:
        hosts = [f" ({plan.host})" for plan in plans]
    assumed = "; " + MEASURED_LATER if measures_speeds(config) else ""
    return cut_text(layers, hosts, keys.replicas) + assumed


MEASURED_LATER = "speed=auto counts as equal here; a run measures a layer on every rank first"


def measures_speeds(config: RunConfig) -> bool:
    """Whether the ranks measure how fast they are before the model is cut."""
    keys = config.algorithm.stages(world_size(config))
    is_auto = any(host.speed == "auto" for host in config.cluster.hosts or [])
    return is_auto and keys is not None and keys.layers is None


def cut_into_stages(
    config: RunConfig, spec: ModelSpec, precision: str, optimizer: str
) -> list[StageShare]:
    """What every rank of a pipeline holds; where no cut fits into the memory that is given, of the
    fastest cut. ConfigError where the model cannot be cut."""
    make = model_maker(config, spec)
    model, _ = build(make)
    try:
        layers = cut_of(config, model, precision, optimizer)
    except ConfigError:
        layers = cut_of(config, model, precision, optimizer, is_limited=False)
    assert isinstance(model, StagedModel), "it has been cut"
    last = len(layers) - 1
    kinds = [StageKind(len(part), rank == 0, rank == last) for rank, part in enumerate(layers)]
    numbers = {kind: numbers_of(build_stage(make, kind)) for kind in set(kinds)}
    return [
        StageShare(part, kind, numbers[kind], model.shape.width)
        for part, kind in zip(layers, kinds, strict=True)
    ]


def numbers_of(model: nn.Module) -> Numbers:
    """Of a model or a stage."""
    trained = tuple(tuple(p.shape) for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    return trained, frozen + sum(buffer.numel() for buffer in model.buffers())


def build_stage(make: Callable[[], nn.Module], kind: StageKind) -> nn.Module:
    """A stage of a model; its layers are as good as any others."""
    model, _ = build(make)
    assert isinstance(model, StagedModel), "it has been cut"
    model.keep_stage(range(kind.layers), kind.has_embedding, kind.has_head)
    return model


def held_micro_batches(keys: StagesConfig, stages: int, micro_batches: int) -> list[int]:
    """Micro-batches whose activations every stage has in memory at one time."""
    if keys.schedule is None:
        return [1] * stages
    step = step_of(keys, micro_batches, [1.0] * stages, [1.0] * stages)
    return [step.held(stage) for stage in range(stages)]


def step_of(
    keys: StagesConfig,
    micro_batches: int,
    forward_s: Sequence[float],
    backward_s: Sequence[float],
    hop_s: float = 0.0,
) -> Simulation:
    """A step of stages that take so long for a micro-batch; without a schedule, of one micro-batch,
    of which a step has `micro_batches` one after the other."""
    stages = len(forward_s)
    schedule = SCHEDULES[keys.schedule or "1f1b"]
    count = micro_batches if keys.schedule is not None else 1
    actions = [schedule(stage, stages, count) for stage in range(stages)]
    return simulate(actions, forward_s, backward_s, hop_s)
