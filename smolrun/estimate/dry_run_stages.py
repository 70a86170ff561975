"""The lines of a dry run about stages: the micro-batches they hold, hops, idle time."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Iterator, Sequence

from smolrun.config import world_size
from smolrun.estimate.dry_run import Estimate
from smolrun.estimate.speeds import (
    links_gbps,
    measure_speed,
    size_text,
    times_on_links,
)
from smolrun.estimate.stages import MEASURED_LATER, measures_speeds, more_copies, step_of
from smolrun.parts.placement import known_speeds, least_of_stages, rank_speeds
from smolrun.tracking.formatting import counted, duration


def stage_lines(made: Estimate) -> Iterator[str]:
    """What is different where ranks hold stages: the cut, hops, idle time."""
    keys, setting = made.keys, made.setting
    assert keys is not None, "ranks hold stages"
    held = made.held(setting)
    order = f"algorithm.schedule={keys.schedule}" if keys.schedule else "one after the other"
    if measures_speeds(made.config):
        yield f"cut: {MEASURED_LATER}"
    yield f"micro-batches: {order}; a rank holds the activations of {_listed(held)}"
    yield f"network: {_hops(made)}"
    yield f"time: {_stage_time(made)}"


def _listed(numbers: Sequence[int]) -> str:
    if len(set(numbers)) == 1:
        return f"{numbers[0]} at one time"
    return f"{', '.join(map(str, numbers))} at one time (rank 0, 1, ...)"


def _hops(made: Estimate) -> str:
    keys = made.keys
    assert keys is not None, "ranks hold stages"
    if world_size(made.config) == 1:
        return "nothing, there is one rank"
    hop = size_text(made.hop_bytes(made.setting))
    line = f"{hop} from stage to stage for a micro-batch, as much back; "
    if keys.replicas > 1:
        sums = size_text(max(made.replica_bytes(number) for number in range(keys.count)))
        line += f"sums over {keys.replicas} replicas: {sums} per step at most; in all "
    line += f"{size_text(max(map(made.stage_wire, range(keys.count))))} per step at most"
    if len(made.places) == 1:
        return f"{line}, inside this machine"
    return f"{line}; a hop takes {times_on_links(made.config, functools.partial(_hop_s, made))}"


def _hop_s(made: Estimate, gbps: float) -> float:
    """Seconds of a tensor between two stages; no time inside one machine."""
    if len(made.places) == 1:
        return 0.0
    emulated = [host.emulate for host in made.config.cluster.hosts or [] if host.emulate]
    latency_s = max((each.latency_ms for each in emulated), default=0.0) / 1000
    return latency_s + 8 * made.hop_bytes(made.setting) / (gbps * 1e9)


def _stage_time(made: Estimate) -> str:
    works = made.stage_works(made.setting)
    seconds, bubble = stage_step(made)
    if works is None or bubble is None:
        return "unknown"
    replicas = made.keys.replicas if made.keys else 1
    flops = sum(work.flops for work in works) * made.count(made.setting) * replicas
    idle = f"ranks wait for {bubble:.0%} of it (the bubble)"
    if seconds is None:
        hops = ", and longer where hops are slow" if len(made.places) > 1 else ""
        return f"unknown on these machines; {flops / 1e12:.2f} TFLOP per step; {idle}{hops}"
    steps = made.config.training.steps
    return (
        f"about {duration(seconds)} per step, {duration(seconds * steps)} for "
        f"{counted(steps, 'step')}; {idle} ({flops / 1e9:.1f} GFLOP per step of all ranks; "
        f"measured now: {measure_speed()[0] / 1e9:.0f} GFLOPS)"
    )


def stage_step(made: Estimate) -> tuple[float | None, float | None]:
    """Seconds of a step, None where no rank computes on the CPU of this machine, and the share of
    it in which ranks wait for other stages. Without seconds, hops take no time. None of a model
    that cannot be traced."""
    works = made.stage_works(made.setting)
    if works is None:
        return None, None
    keys, shares = made.keys, _cpu_shares(made)
    assert keys is not None, "ranks hold stages"
    speed, moved_per_s = measure_speed()
    given = known_speeds(rank_speeds(made.config.cluster.model_dump(), world_size(made.config)))
    rates = least_of_stages(shares or given, keys.count)
    gbps = links_gbps(made.config)[0]
    hop_s = _hop_s(made, gbps) if shares else 0.0
    forward = [work.forward_flops / speed + work.forward_moved / moved_per_s for work in works]
    whole = [work.flops / speed + work.moved / moved_per_s for work in works]
    backward = [all_ - first for all_, first in zip(whole, forward, strict=True)]
    count = made.count(made.setting)
    simulated = functools.partial(
        step_of,
        keys,
        forward_s=_over(forward, rates),
        backward_s=_over(backward, rates),
        hop_s=hop_s,
    )
    step = simulated(count)
    seconds, bubble = (1 if keys.schedule else count) * step.seconds, step.bubble
    if more_copies(made.config):  # never emptied: a step is what another one adds
        seconds = simulated(2 * count).seconds - seconds
        bubble = 1 - count * sum(_over(whole, rates)) / (len(works) * seconds)
    if shares is None:
        return None, bubble
    # An update of float32 reads and writes four or five tensors as large as the parameters.
    update = [20 * sum(map(math.prod, stage.numbers[0])) for stage in made.stages(made.setting)]
    return seconds + _sums_s(made, gbps) + max(_over(update, rates)) / moved_per_s, bubble


def _sums_s(made: Estimate, gbps: float) -> float:
    """Seconds to sum the gradients of a stage over replicas; the first stage has nothing left to
    compute meanwhile. No time inside one machine."""
    if len(made.places) == 1:
        return 0.0
    return 8 * max(map(made.replica_bytes, range(len(made.stages(made.setting))))) / (gbps * 1e9)


def _over(values: Sequence[float], rates: Sequence[float]) -> list[float]:
    return [value / rate for value, rate in zip(values, rates, strict=True)]


def _cpu_shares(made: Estimate) -> list[float] | None:
    """How fast every rank computes beside all cores of this machine, of other hosts by their
    `speed`; None where no rank computes on the CPU of this machine."""
    hosts = {host.name: host for host in made.config.cluster.hosts or []}
    found: dict[str, float] = {}
    for place in made.places:
        emulate = hosts[place.name].emulate if hosts else None
        if place.is_here and place.device == "cpu":
            cores = os.cpu_count() or 1
            found[place.name] = emulate.compute / cores if emulate else 1 / place.ranks
    if not found:
        return None
    speeds = {
        name: 1.0 if host.speed == "auto" else float(host.speed) for name, host in hosts.items()
    }
    name, share = next(iter(found.items()))
    return [
        found.get(place.name) or share * speeds[place.name] / speeds[name]
        for place in made.places
        for _ in range(place.ranks)
    ]
