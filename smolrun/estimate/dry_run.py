"""training.dry_run=true: what a run would need on every host, before anything is loaded.

The model is built without memory and run once on fake tensors (estimate/trace.py), the rest is
arithmetic (estimate/memory.py); dry_run_text.py puts it into words.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from smolrun.config import RunConfig, has_dedicated_server, ranks, resolved, validate, world_size
from smolrun.config.sharding import RankSizes, StagesConfig
from smolrun.errors import ConfigError
from smolrun.estimate.memory import (
    Need,
    Rank,
    Remedy,
    Setting,
    best_switches,
    checkpoint_bytes,
    fitting_micro_batch,
    item_bytes,
    need,
    sent_bytes,
    smallest_change,
)
from smolrun.estimate.process import USUAL_PROCESS, Process, end_probe, start_probe
from smolrun.estimate.stages import (
    ExpertShare,
    StageKind,
    StageShare,
    build,
    build_stage,
    cut_into_stages,
    held_micro_batches,
    model_maker,
    more_copies,
    numbers_of,
    place_experts,
)
from smolrun.estimate.trace import CannotTrace, Trace, build_on_meta, trace
from smolrun.launch.machine_memory import machine_memory
from smolrun.models.base import ModelSpec
from smolrun.models.initialise import check_trainable
from smolrun.parts.placement import (
    BatchPlan,
    known_speeds,
    memory_shares,
    plan_batches,
    rank_speeds,
    replica_weights,
)
from smolrun.parts.precision import PRECISIONS
from smolrun.parts.quantization import NO_QUANTIZATION, Quantization
from smolrun.parts.stage_links import RECEIVES_AHEAD
from smolrun.parts.unshard_on_access import layers_of

GB = 2**30
# Measured runs needed up to so much more than was promised (tests/tasks/test_dry_run_measured.py).
MARGIN = 1.15


@dataclass(frozen=True)
class Place:
    """One host. `room` is None where it is unknown."""

    name: str
    ranks: int
    device: str
    room: int | None
    is_here: bool
    share: float  # of what is cut among the ranks, for each of its ranks
    first_rank: int = 0


@dataclass
class Estimate:
    """All that is known of a run before it starts."""

    config: RunConfig
    spec: ModelSpec
    places: list[Place]
    process: Process
    shapes: tuple[tuple[int, ...], ...]
    frozen: int
    setting: Setting
    micro_batches: int
    can_recompute: bool
    largest_layer: int
    cannot_trace: str = ""
    notes: list[str] = field(default_factory=list)
    _traces: dict[tuple[str, bool, int, StageKind | None], Trace | None] = field(
        default_factory=dict
    )
    _stages: dict[tuple[str, str], list[StageShare]] = field(default_factory=dict, init=False)
    _experts: dict[tuple[str, str], list[ExpertShare]] = field(default_factory=dict, init=False)

    def rank(self, place: Place, local_rank: int = 0, setting: Setting | None = None) -> Rank:
        """One rank of a host, in numbers; with stages it depends on the setting."""
        stage = self.stage(place.first_rank + local_rank, setting or self.setting)
        share = self.expert_share(place.first_rank + local_rank, setting or self.setting)
        held = share if stage is None else stage
        shapes, frozen = (self.shapes, self.frozen) if held is None else held.numbers
        bound = self.config.staleness.bound
        algorithm = self.config.algorithm
        sizes = RankSizes(
            # Only rank 0 differs from all others.
            rank=0 if place is self.places[0] and local_rank == 0 else 1,
            world_size=world_size(self.config),
            share=place.share,
            item_bytes=item_bytes(self.config.precision),
            largest_parameter=max(math.prod(shape) for shape in self.shapes),
            largest_layer=self.largest_layer,
        )
        return Rank(
            shapes=shapes,
            frozen=frozen,
            world_size=world_size(self.config),
            process_bytes=self.process.size,
            slots=1 + algorithm.pending_gradients(0 if bound == "auto" else bound),
            is_on_device=place.device != "cpu",
            is_staged=self.has_replicas if stage else self._is_staged(place),
            is_stage=held is not None,
            experts=share.experts if share else 0,
            token_bytes=share.token_bytes(self.tokens, world_size(self.config)) if share else 0,
            weight_copies=0 if stage is None or stage.kind.has_head else more_copies(self.config),
            has_momentum=getattr(self.config.optimizer, "momentum", 1.0) > 0,
            copies_for_norms=self.config.training.log_norms == "all",
            saves=self.config.checkpoint.every > 0,
            sharding=algorithm.sharding(sizes),
            quantization=self.quantization if stage is None else NO_QUANTIZATION,
        )

    def _is_staged(self, place: Place) -> bool:
        """Gradients are copied to be sent."""
        return place.device != "cpu" and world_size(self.config) > 1

    @property
    def quantization(self) -> Quantization:
        """In which form tensors travel."""
        return Quantization(**self.config.quantization.model_dump())

    @property
    def keys(self) -> StagesConfig | None:
        """How the algorithm cuts the model into stages; None where it does not."""
        return self.config.algorithm.stages(world_size(self.config))

    @property
    def has_replicas(self) -> bool:
        """Of a pipeline."""
        return self.keys is not None and self.keys.replicas > 1

    def stage(self, number: int, setting: Setting) -> StageShare | None:
        """What a rank holds where ranks hold stages; else None."""
        stages = self.stages(setting)
        return stages[number % len(stages)] if stages else None

    def stages(self, setting: Setting) -> list[StageShare]:
        """What every rank of a pipeline holds, cut as the run would cut it; empty where ranks hold
        no stages. Where no cut fits into the memory that is given, the fastest one. ConfigError
        where the model cannot be cut."""
        key = (setting.precision, setting.optimizer)
        if key not in self._stages and self.keys is not None:
            self._stages[key] = cut_into_stages(self.config, self.spec, *key)
        return self._stages.get(key, [])

    def expert_share(self, number: int, setting: Setting) -> ExpertShare | None:
        """What a rank holds where ranks hold experts, as the run places them; else None."""
        key = (setting.precision, setting.optimizer)
        if key not in self._experts and self.config.algorithm.places_experts:
            self._experts[key] = place_experts(self.config, self.spec, *key)
        return self._experts[key][number] if self._experts else None

    @property
    def tokens(self) -> int:
        """Of a rank in a step."""
        samples = self.setting.micro_batch_size * self.micro_batches
        return samples * (self.spec.sequence_length or 1)

    def count(self, setting: Setting) -> int:
        """Micro-batches of a step, of one pipeline."""
        most = -(-self.samples // setting.micro_batch_size)
        return max(self.micro_batches, most) if self.keys is not None else self.micro_batches

    @property
    def samples(self) -> int:
        """Of a step, of the largest share."""
        return sum(largest_plan(self.config).sizes)

    def held(self, setting: Setting) -> list[int]:
        """Micro-batches whose activations each stage holds at one time."""
        assert self.keys is not None, "there are no stages"
        return held_micro_batches(self.keys, self.keys.count, self.count(setting))

    def stage_works(self, setting: Setting) -> list[Trace] | None:
        """One micro-batch of every stage; None where they cannot be traced."""
        works = [self.trace(setting, stage.kind) for stage in self.stages(setting)]
        known = [work for work in works if work is not None]
        return known if len(known) == len(works) else None

    def hop_bytes(self, setting: Setting) -> int:
        """What travels from a stage to the next for a micro-batch, and back."""
        tokens = setting.micro_batch_size * (self.spec.sequence_length or 1)
        dtype = self.quantization.working_dtype(PRECISIONS[setting.precision].parameters)
        numbers = tokens * self.stages(setting)[0].width
        return self.quantization.quantizer().wire_bytes(numbers, dtype)

    def need(self, place: Place, setting: Setting, local_rank: int = 0) -> Need:
        """One rank of a host."""
        rank = self.rank(place, local_rank, setting)
        if not (stages := self.stages(setting)):
            return need(rank, setting, self.trace(setting))
        number = (place.first_rank + local_rank) % len(stages)
        return need(rank, setting, self._stage_need(setting, number))

    def _stage_need(self, setting: Setting, number: int) -> Trace | None:
        """Of a stage, with all micro-batches that it holds."""
        stages = self.stages(setting)
        work = self.trace(setting, stages[number].kind)
        if work is None:
            return None
        received = RECEIVES_AHEAD * self.hop_bytes(setting) if len(stages) > 1 else 0
        if number == 0:  # and the last stage's gradient of a tied embedding
            received += self.tied_bytes(setting)
        return work.with_others(self.held(setting)[number] - 1, received)

    def total(self, place: Place, setting: Setting) -> int:
        """All ranks of a host; pages of libraries are there once."""
        needs = [self.need(place, setting, number).total for number in range(place.ranks)]
        return sum(needs) - (place.ranks - 1) * self.process.shared

    def lacking(self, setting: Setting) -> int:
        """Bytes that the tightest host may have too few, with a margin; negative where there is
        room to spare."""
        known = [place for place in self.places if place.room is not None]
        return max(
            (int(MARGIN * self.total(p, setting)) - (p.room or 0) for p in known), default=-1
        )

    def trace(self, setting: Setting, kind: StageKind | None = None) -> Trace | None:
        """Of one micro-batch, of the whole model or of a stage; None where the model cannot be
        traced, `cannot_trace` says why."""
        key = (setting.precision, setting.recompute, setting.micro_batch_size, kind)
        if key not in self._traces:
            self._traces[key] = None if self.cannot_trace else self._trace(setting, kind)
        return self._traces[key]

    def _trace(self, setting: Setting, kind: StageKind | None) -> Trace | None:
        make = model_maker(self.config, self.spec)
        try:
            return trace(
                build_on_meta(make) if kind is None else build_stage(make, kind),
                self.spec,
                setting.micro_batch_size,
                precision=PRECISIONS[setting.precision],
                recompute=setting.recompute,
            )
        except CannotTrace as error:
            self.cannot_trace = str(error)
            return None

    @property
    def _is_cut(self) -> bool:
        return self.rank(self.places[0]).sharding.stage > 0

    def smallest_change(self) -> Remedy | None:
        """What makes it fit everywhere with the least harm; None if nothing does."""
        lacking = functools.cache(self.lacking)
        found = smallest_change(
            self.setting, lacking, 0, can_recompute=self.can_recompute, is_cut=self._is_cut
        )
        if found is None:
            return None
        return fitting_micro_batch(found, self.setting.micro_batch_size, lacking, 0)

    def best_switches(self, count: int = 2) -> list[Remedy]:
        """The single keys that save most on the first host."""
        total = functools.partial(self.total, self.places[0])
        return best_switches(
            self.setting,
            total,
            can_recompute=self.can_recompute,
            is_cut=self._is_cut,
            count=count,
        )

    def fewer_ranks(self) -> tuple[str, Estimate] | None:
        """The same run with fewer ranks on a machine, with what to write for it: half as many, and
        again, until it fits or there is one. None where that is not possible."""
        found = None
        count = max(place.ranks for place in self.places) // 2
        while count and (found is None or found[1].lacking(found[1].setting) > 0):
            cluster = self.config.cluster
            words = f"cluster.ranks={count}"
            update: dict[str, Any] = {"ranks": count}
            if cluster.hosts is not None:
                words = f"`ranks: {count}` for each host of the cluster file"
                hosts = [
                    host.model_copy(update={"ranks": min(host.ranks, count)})
                    for host in cluster.hosts
                ]
                update = {"hosts": hosts}
            other = self.changed(cluster=cluster.model_copy(update=update))
            if other is None:
                break
            found = words, other
            count //= 2
        return found

    def changed(self, **sections: Any) -> Estimate | None:
        """The same run with other sections of its configuration; None where they do not go
        together."""
        config = self.config.model_copy(update=sections)
        try:
            validate(resolved(config))
        except ConfigError:
            return None
        plan = largest_plan(config)
        setting = replace(self.setting, micro_batch_size=max(plan.sizes))
        room = {place.name: place.room for place in self.places}
        places = [replace(place, room=room[place.name]) for place in _places(config)]
        made = replace(
            self, config=config, setting=setting, micro_batches=len(plan.sizes), places=places
        )
        try:
            made.stages(setting)
        except ConfigError:
            return None
        return made

    def checkpoint(self) -> int:
        """Bytes of one checkpoint."""
        whole = replace(self.rank(self.places[0]), shapes=self.shapes, frozen=self.frozen)
        return checkpoint_bytes(whole, self.setting)

    def stage_wire(self, number: int) -> int:
        """Bytes that a stage sends in a step, and receives: hidden states, their gradients, the
        gradient or the values of a tied embedding, and the sums over replicas."""
        setting = self.setting
        stage = self.stages(setting)[number]
        neighbours = (not stage.kind.has_embedding) + (not stage.kind.has_head)
        tied = self.tied_bytes(setting) if neighbours == 1 else 0
        moved = neighbours * self.hop_bytes(setting) * self.samples
        return moved // setting.micro_batch_size + tied + self.replica_bytes(number)

    def replica_bytes(self, number: int) -> int:
        """Of these, for the sum of a stage's gradients over replicas, an all_reduce in a ring. A
        tied embedding is summed by its owners, the first stages."""
        assert self.keys is not None, "ranks hold stages"
        stages, replicas = self.stages(self.setting), self.keys.replicas
        held = item_bytes(self.setting.precision) * sum(map(math.prod, stages[number].numbers[0]))
        held -= self.tied_bytes(self.setting) if number == len(stages) - 1 else 0
        return 2 * held * (replicas - 1) // replicas

    def tied_bytes(self, setting: Setting) -> int:
        """Of the matrix that both the first and the last stage hold."""
        stages = [shape for one in self.stages(setting) for shape in one.numbers[0]]
        twice = sum(map(math.prod, stages)) - sum(map(math.prod, self.shapes))
        return item_bytes(setting.precision) * twice

    def wire(self, local_rank: int = 0) -> int:
        """Bytes that a rank sends in a step."""
        return sent_bytes(self.rank(self.places[0], local_rank), self.setting, self.micro_batches)


def largest_plan(config: RunConfig) -> BatchPlan:
    """The plan of the rank with the largest share, as the run begins."""
    micro = config.training.micro_batch_size
    weights = known_speeds(rank_speeds(config.cluster.model_dump(), world_size(config)))
    has_server = has_dedicated_server(config)
    parts = config.algorithm.batch_parts(world_size(config) - has_server)
    stages = config.algorithm.stages(world_size(config))
    if stages is not None:
        weights = replica_weights(weights, stages.count)  # stages of a pipeline read the same
    elif parts is not None:
        weights = [1.0] * parts
    elif has_server:
        weights[0] = 0.0
    return plan_batches(
        config.training.global_batch_size,
        weights,
        weights.index(max(weights)),
        None if micro == "auto" else micro,
        1 if stages is None else stages.micro_batches,
    )


def estimate(
    config: RunConfig,
    spec: ModelSpec,
    *,
    notes: Sequence[str] = (),
    measure_process: bool = True,
) -> Estimate:
    """What the run would need, for data with the sizes `spec`. ConfigError where the model cannot
    be what the keys say. `notes` are assumptions about `spec`. `measure_process` starts
    a process like an empty rank's, which takes seconds."""
    probe = start_probe() if measure_process else None
    try:
        shapes, frozen, can_recompute, largest_layer, reason = _sizes(config, spec)
        plan = largest_plan(config)
        setting = Setting(
            config.precision, config.training.recompute, max(plan.sizes), config.optimizer.name
        )
        made = Estimate(
            config,
            spec,
            _places(config),
            Process(USUAL_PROCESS, 0),
            shapes,
            frozen,
            setting,
            len(plan.sizes),
            can_recompute,
            largest_layer,
            cannot_trace=reason,
            notes=list(notes),
        )
        for place in made.places:
            made.need(place, setting)
    finally:
        process = end_probe(probe)
    made.process = process or made.process
    made.notes += [] if process else ["the size of an empty process could not be measured"]
    return made


def _sizes(
    config: RunConfig, spec: ModelSpec
) -> tuple[tuple[tuple[int, ...], ...], int, bool, int, str]:
    """Shapes of trained parameters, numbers in all else, whether blocks can be recomputed, numbers
    in the largest layer, and why the model cannot be run without values where that is so."""
    model, reason = build(model_maker(config, spec))
    check_trainable(model)
    layers = (sum(p.numel() for p in layer) for layer in layers_of(model, 0))
    return *numbers_of(model), hasattr(model, "recompute"), max(layers), reason


def _places(config: RunConfig) -> list[Place]:
    """The hosts; only of this machine is known what is free, and which devices it has."""
    hosts = config.cluster.hosts
    here = machine_memory().room
    places: dict[str, Place] = {}
    weights = memory_shares(resolved(config)["cluster"]["hosts"]) or (1.0,) * world_size(config)
    for rank in ranks(config):
        host = next((host for host in hosts or [] if host.name == rank.host), None)
        is_here = host is None or host.is_here
        memory_gb = host.memory_gb if host is not None else config.cluster.memory_gb
        given = int(memory_gb * GB) if memory_gb else None
        device = _device(rank.device) if is_here else rank.device.replace("auto", "cpu")
        room = given if given is not None else (_free(device, here) if is_here else None)
        share = weights[rank.rank] / sum(weights)
        first = rank.rank - rank.local_rank
        places[rank.host] = Place(
            rank.host, rank.local_world_size, device, room, is_here, share, first
        )
    return list(places.values())


def _device(device: str) -> str:
    if device != "auto":
        return device
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _free(device: str, here: int) -> int:
    """What is free now, on the GPU where that is memory of its own."""
    if device == "cuda" and torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    return here
