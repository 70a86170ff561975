"""Which rank of a server holds which layers: sizes of a decoder, and the plan for the ranks there.

Arithmetic on what the driver knows of the model and what the ranks measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from smolrun.config import RunConfig
from smolrun.errors import SmolrunError
from smolrun.launch.machine_memory import gb
from smolrun.models.shape import ModelBytes
from smolrun.parts.placement import checked_layers, cut
from smolrun.serving.messages import ServingDtype

HOP_S = 0.001  # a message between stages in a home network
_MOST_SLOTS = 8
_LONGEST_CONTEXT = 4096  # unless serving.context asks for more
_LEAST_CONTEXT = 256
# Hidden states, logits and torch's own buffers beside weights and cache.
_SPARE_BYTES = 200e6
_WORTH = 1.1  # a host is left out if the others are faster by this factor without it
# The slowest stage of an earlier cut may take so much longer than the best one's: measurements of a
# second differ by as much from start to start, and other layers would have to be sent.
_KEPT = 1.3


@dataclass(frozen=True)
class ServingRank:
    """What a rank has: seconds of a layer and of the head for one token, and bytes that are free
    for it alone."""

    host: str
    layer_s: float
    head_s: float
    free_bytes: float


@dataclass(frozen=True)
class LeftOut:
    """A host without layers: tokens per second of one stream with it, and without."""

    host: str
    with_it: float
    without: float


@dataclass(frozen=True)
class ServingPlan:
    """`layers[rank]`, empty for a rank that waits; every stage keeps `slots` sequences of up to
    `capacity` tokens; `tokens_per_s` of one stream."""

    layers: list[range]
    slots: int
    capacity: int
    tokens_per_s: float
    left_out: list[LeftOut] = field(default_factory=list)

    @property
    def stages(self) -> list[int]:
        """The ranks that hold layers."""
        return [rank for rank, layers in enumerate(self.layers) if layers]

    def weight_bytes(self, model: ModelBytes, rank: int) -> int:
        """Of a rank's weights."""
        layers = self.layers[rank]
        if not layers:
            return 0
        is_first, is_last = layers.start == 0, layers.stop == model.layers
        ends = (model.embedding if is_first else 0) + (model.head if is_last else 0)
        shared = model.shared if is_first and is_last else 0
        return len(layers) * model.layer + ends - shared

    def cache_bytes(self, model: ModelBytes, rank: int) -> int:
        """Of the keys and values on a rank."""
        return len(self.layers[rank]) * self.slots * self.capacity * model.cache_per_token


class DoesNotFit(SmolrunError):
    """The model is larger than the memory of the ranks."""


def plan(
    model: ModelBytes,
    ranks: Sequence[ServingRank],
    *,
    mode: Literal["auto", "local", "pipeline", "replicas"],
    hosts: Literal["auto", "all"] = "auto",
    layers: Sequence[Sequence[int]] | None = None,
    slots: int | None = None,
    context: int,
    is_context_fixed: bool = False,
    earlier: Sequence[range] | None = None,
    can_be_smaller: bool = False,
) -> ServingPlan:
    """The layers of every rank. None for `slots`: as many as fit, and a shorter context where even
    one does not fit, unless it is fixed. `earlier` layers are kept where they are about as fast as
    the best. DoesNotFit, which suggests smaller weights where there are any; ValueError for wrong
    `layers`."""
    if layers is not None:
        given = checked_layers(layers, model.layers, len(ranks))
    for tried_slots, capacity in _sizes(slots, context, is_context_fixed):
        placing = _Placing(model, ranks, tried_slots, capacity)
        if layers is not None:
            found = placing.of(given) if placing.fits(given) else None
        else:
            found = placing.best(mode, hosts)
            if found is not None and earlier is not None:
                found = placing.kept(earlier, found)
        if found is not None:
            return found
    smallest = _sizes(slots, context, is_context_fixed)[-1]
    raise DoesNotFit(_too_large(model, ranks, *smallest, mode, can_be_smaller))


def first_that_fits(
    config: RunConfig,
    models: Sequence[ModelBytes],
    longest: int,
    found: Sequence[ServingRank],
    earlier: Sequence[range] | None = None,
) -> tuple[int, ServingPlan]:
    """Which of a model's types of weights is the first that fits, and its plan, as of `plan_for`.

    `found` was measured with the first type; times are taken to go with bytes. DoesNotFit of the
    last one."""
    first = models[0]
    for number, model in enumerate(models):
        layer, head = model.layer / first.layer, model.head / first.head
        ranks = [
            replace(rank, layer_s=rank.layer_s * layer, head_s=rank.head_s * head) for rank in found
        ]
        try:
            return number, plan_for(config, model, longest, ranks, earlier)
        except DoesNotFit:
            if number == len(models) - 1:
                raise
    raise AssertionError("there is one type of weights at least")


def weights_line(models: Mapping[ServingDtype, ModelBytes], number: int) -> str:
    """Which type of weights is taken, and which ones before it do not fit."""
    sizes = [f"{gb(model.weights)} of weights as {kind}" for kind, model in models.items()]
    if not number:
        return sizes[0]
    return f"{sizes[number]}, as {' and '.join(sizes[:number])} would not fit"


def plan_for(
    config: RunConfig,
    model: ModelBytes,
    longest: int,
    found: Sequence[ServingRank],
    earlier: Sequence[range] | None = None,
) -> ServingPlan:
    """The plan that the configuration asks for, of a model that reads `longest` tokens; `earlier`
    as of `plan`. DoesNotFit; ValueError about serving.layers."""
    serving = config.serving
    context = _LONGEST_CONTEXT if serving.context == "auto" else serving.context
    return plan(
        model,
        found,
        mode=serving.mode,
        hosts=serving.hosts,
        layers=serving.layers,
        slots=None if serving.slots == "auto" else serving.slots,
        context=min(context, longest),
        is_context_fixed=serving.context != "auto",
        earlier=earlier,
        can_be_smaller=serving.weights not in ("auto", "int4"),
    )


def _sizes(slots: int | None, context: int, is_fixed: bool) -> list[tuple[int, int]]:
    """Slots and capacity to try, largest first."""
    counts = [slots] if slots else [_MOST_SLOTS, 4, 2, 1]
    sizes = [(count, context) for count in counts]
    while not is_fixed and (context := context // 2) >= _LEAST_CONTEXT:
        sizes.append((counts[-1], context))
    return sizes


@dataclass(frozen=True)
class _Placing:
    """Layers on ranks, for a cache of a certain size."""

    model: ModelBytes
    ranks: Sequence[ServingRank]
    slots: int
    capacity: int

    def best(self, mode: str, hosts: str) -> ServingPlan | None:
        """Local if that fits and is allowed, else over the ranks, without hosts that slow it down
        if that is allowed."""
        everyone = list(range(len(self.ranks)))
        alone = [made for rank in everyone if (made := self.over([rank])) is not None]
        if mode != "pipeline" and alone:
            return max(alone, key=lambda made: made.tokens_per_s)
        if mode in ("local", "replicas"):
            return None
        if hosts == "all":
            return self.over(everyone)
        return self._without_slow_hosts(everyone)

    def _without_slow_hosts(self, used: list[int]) -> ServingPlan | None:
        """All ranks, less the hosts without which it is faster; those that cannot all hold a layer
        are tried as if they might."""
        found, left_out = self.over(used), []
        while True:
            rivals = []
            for host in dict.fromkeys(self.ranks[rank].host for rank in used):
                rest = [rank for rank in used if self.ranks[rank].host != host]
                # One stage alone would be no pipeline; it was looked at before.
                if len(rest) > 1 and (other := self.over(rest)) is not None:
                    rivals.append((other.tokens_per_s, host, rest, other))
            if not rivals:
                break
            rate, host, rest, other = max(rivals, key=lambda rival: rival[0])
            before = found.tokens_per_s if found is not None else 0.0
            if rate < _WORTH * before:
                break
            left_out.append(LeftOut(host, before, rate))
            found, used = other, rest
        if found is None:
            return None
        return replace(found, left_out=left_out)

    def kept(self, earlier: Sequence[range], best: ServingPlan) -> ServingPlan:
        """The best plan, or `earlier` layers on the same ranks if they are about as fast."""
        layers = list(earlier)
        is_whole = [layer for part in layers for layer in part] == list(range(self.model.layers))
        if not is_whole or list(map(bool, layers)) != list(map(bool, best.layers)):
            return best
        if not self.fits(layers) or self._slowest_s(layers) > _KEPT * self._slowest_s(best.layers):
            return best
        return replace(self.of(layers), left_out=best.left_out)

    def _slowest_s(self, layers: Sequence[range]) -> float:
        """Of the stages, for one token."""
        taken = [len(part) * rank.layer_s for part, rank in zip(layers, self.ranks, strict=True)]
        last = max(rank for rank, part in enumerate(layers) if part)
        taken[last] += self.ranks[last].head_s
        return max(taken)

    def over(self, used: Sequence[int]) -> ServingPlan | None:
        """The best cut over these ranks, each with a layer; None if that does not fit."""
        model, first = self.model, self.ranks[used[0]]
        if len(used) > model.layers:
            used = used[: model.layers]
        costs = [first.layer_s] * model.layers
        costs[-1] += first.head_s
        sizes = [float(model.layer + self._cache_bytes(1))] * model.layers
        sizes[0] += model.embedding
        sizes[-1] += model.head
        stages = cut(
            costs,
            [first.layer_s / self.ranks[rank].layer_s for rank in used],
            sizes=sizes,
            limits=[self.ranks[rank].free_bytes - _SPARE_BYTES for rank in used],
            shared_size=model.shared,
        )
        if stages is None:
            return None
        layers = [range(0)] * len(self.ranks)
        for rank, part in zip(used, stages.layers, strict=True):
            layers[rank] = part
        return self.of(layers)

    def of(self, layers: list[range]) -> ServingPlan:
        """The plan of given layers."""
        used = [rank for rank, part in enumerate(layers) if part]
        seconds = sum(len(layers[rank]) * self.ranks[rank].layer_s for rank in used)
        seconds += self.ranks[used[-1]].head_s
        # Rank 0 schedules: tokens come from there and go back to it.
        seconds += 0.0 if used == [0] else HOP_S * (len(used) + (used[0] != 0))
        return ServingPlan(layers, self.slots, self.capacity, 1 / seconds)

    def fits(self, layers: list[range]) -> bool:
        """Whether given layers fit on their ranks."""
        made = self.of(layers)
        return all(
            made.weight_bytes(self.model, index) + made.cache_bytes(self.model, index)
            <= rank.free_bytes - _SPARE_BYTES
            for index, rank in enumerate(self.ranks)
            if layers[index]
        )

    def _cache_bytes(self, num_layers: int) -> int:
        return num_layers * self.slots * self.capacity * self.model.cache_per_token


def _too_large(
    model: ModelBytes,
    ranks: Sequence[ServingRank],
    slots: int,
    capacity: int,
    mode: str,
    can_be_smaller: bool,
) -> str:
    """What is missing, as a sentence."""
    cache = model.layers * slots * capacity * model.cache_per_token
    needed = (
        f"{gb(model.weights)} of weights, {gb(cache)} of cache ({slots} x {capacity} tokens) and "
        f"{gb(_SPARE_BYTES)} a rank to compute in"
    )
    tries = ["serving.weights=int4"] if can_be_smaller else []
    tries += ["a smaller serving.context or serving.slots"] if cache > model.weights / 10 else []
    tries += ["a smaller model"]
    if len(ranks) == 1 or mode in ("local", "replicas"):
        free = gb(ranks[0].free_bytes)
        tries.insert(0, "more hosts (cluster=NAME)")
    else:
        free = ", ".join(f"{rank.host} {gb(rank.free_bytes)}" for rank in ranks)
        tries.insert(0, "one more host")
    return f"it needs {needed}, available: {free}; try {', or '.join(tries)}"
