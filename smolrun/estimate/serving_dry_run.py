"""training.dry_run=true for a server: which rank would hold which layers, its memory, and about how
fast one stream would be, before anything is started."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import rich.box
import rich.table
import torch

from smolrun.config import RunConfig, ranks
from smolrun.config.cluster import HostConfig
from smolrun.config.plan import THIS_MACHINE
from smolrun.estimate.serving_plan import (
    DoesNotFit,
    ServingPlan,
    ServingRank,
    first_that_fits,
    weights_line,
)
from smolrun.launch.machine_memory import gb, machine_memory
from smolrun.launch.supervisor_events import EXIT_BAD_CONFIG, EXIT_DONE
from smolrun.models.shape import DecoderShape, ModelBytes
from smolrun.sanitize import echo, one_line
from smolrun.serving.messages import ServingDtype
from smolrun.serving.stage_runner import layer_seconds
from smolrun.tracking.console import Screen

_SHOWN_WIDTH = 100


def report(
    config: RunConfig,
    name: str,
    shape: DecoderShape,
    models: Mapping[ServingDtype, ModelBytes],
    group_size: int,
) -> int:
    """Print the plan of the first type of weights that fits; the exit code is that of a bad
    configuration where none does."""
    first, longest = next(iter(models)), shape.max_sequence_length
    layer_s = layer_seconds(shape, first, group_size, torch.device("cpu"))
    places = _ranks(config, models[first], layer_s)
    try:
        number, made = first_that_fits(config, list(models.values()), longest, places)
    except (DoesNotFit, ValueError) as error:
        least, smallest = list(models.items())[-1]
        echo(one_line(f"{name}: {gb(smallest.weights)} of weights as {least}"))
        echo(f"does not fit: {error}" if isinstance(error, DoesNotFit) else f"{error}")
        return EXIT_BAD_CONFIG
    sizes = list(models.values())[number]
    echo(one_line(f"{name}: {weights_line(models, number)}"))
    screen = Screen(highlight=False, markup=False, emoji=False)
    if not screen.is_terminal:
        screen.width = _SHOWN_WIDTH
    screen.print(_table(made, sizes, places))
    for left in made.left_out:
        echo(
            f"{left.host} left out: {left.with_it:.2g} tokens/s with it, {left.without:.2g} without"
        )
    if unknown := [place.host for place in places if place.free_bytes == math.inf]:
        names = ", ".join(dict.fromkeys(unknown))
        echo(f"memory unknown: {names}; set memory_gb: in the cluster file")
    echo(
        f"fits: {made.slots} requests at once of up to {made.capacity:,} tokens; one stream about "
        f"{made.tokens_per_s:.2g} tokens/s, by a layer on this machine"
        + (" and the speed: of the hosts" if len(places) > 1 else "")
    )
    return EXIT_DONE


def _ranks(config: RunConfig, sizes: ModelBytes, layer_s: float) -> list[ServingRank]:
    """What the cluster file and this machine, which takes `layer_s`, say of each rank."""
    hosts = {host.name: host for host in config.cluster.hosts or []}
    places = []
    for rank in ranks(config):
        memory_gb = config.cluster.memory_gb
        host = hosts.get(rank.host) or HostConfig(name=THIS_MACHINE, memory_gb=memory_gb)
        here = machine_memory().room if host.is_here else math.inf
        memory = host.memory_gb * 2**30 if host.memory_gb else here
        speed = host.speed if isinstance(host.speed, float | int) else 1.0
        if host.emulate and host.is_here:
            speed = host.emulate.compute
        places.append(
            ServingRank(
                host=rank.host,
                layer_s=layer_s / speed,
                head_s=layer_s * sizes.head / sizes.layer / speed,
                free_bytes=memory / rank.local_world_size,
            )
        )
    return places


def _table(made: ServingPlan, sizes: ModelBytes, places: Sequence[ServingRank]) -> rich.table.Table:
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for name in ("rank", "host", "layers", "weights", "cache", "available"):
        table.add_column(name, justify="left" if name == "host" else "right", no_wrap=True)
    for rank, place in enumerate(places):
        layers = made.layers[rank]
        table.add_row(
            str(rank),
            one_line(place.host),
            f"{layers.start} to {layers.stop - 1}" if layers else "none",
            gb(made.weight_bytes(sizes, rank)),
            gb(made.cache_bytes(sizes, rank)),
            "unknown" if place.free_bytes == math.inf else gb(place.free_bytes),
        )
    if len(made.stages) > 1:
        ranks = range(len(places))
        weights = sum(made.weight_bytes(sizes, rank) for rank in ranks)
        cache = sum(made.cache_bytes(sizes, rank) for rank in ranks)
        table.add_row("all", "", "", gb(weights), gb(cache), "")
    return table
