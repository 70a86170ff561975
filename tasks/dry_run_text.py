"""A dry run in words: a table per kind of host, the wire, the time, the disk, and a last line that
says whether it fits."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import rich.box
import rich.console
import rich.table
import torch

from smolrun.config import RunConfig, world_size
from smolrun.foreign_text import indented, one_line
from smolrun.launch.moves import Outcome
from smolrun.launch.out_of_memory import gb
from smolrun.tasks.dry_run import MARGIN, Estimate, Place, estimate
from smolrun.tasks.roles import only_serves
from smolrun.tasks.sharding import at_stage
from smolrun.tasks.workers import OUTPUTS
from smolrun.tracking.words import counted

_MATRIX = 512  # large enough for a core to be as fast as it gets
_BLOCK = 8 * 2**20  # numbers; larger than caches
_MEASURE_S = 0.2
_LINKS_GBPS = (1, 10)
_SHOWN_WIDTH = 100


def report(config: RunConfig) -> int:
    """Print what the run would need; always 0, as nothing went wrong."""
    console = rich.console.Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = _SHOWN_WIDTH
    made = estimate(config)
    console.print(one_line(_title(made)), soft_wrap=True)
    console.print(_table(made, is_plain=not console.is_terminal))
    for line in [*_lines(made), verdict(made)]:
        console.print(indented(line), soft_wrap=True)
    return 0


def verdict(made: Estimate) -> str:
    """The last line."""
    too_small: list[str] = []
    narrow: list[str] = []
    for place in made.places:
        total = made.total(place, made.setting)
        if place.room is not None and MARGIN * total > place.room:
            where = too_small if total > place.room else narrow
            where.append(f"{place.name} needs {gb(total)} of {gb(place.room)}")
    if too_small:
        return f"does not fit: {', '.join(too_small + narrow)}"
    if narrow:
        return f"fits narrowly, if at all: {', '.join(narrow)}, give or take {MARGIN - 1:.0%}"
    unknown = [place.name for place in made.places if place.room is None]
    if unknown:
        return f"fits, as far as is known: the memory of {', '.join(unknown)} is not (memory_gb)"
    return "fits"


def with_remedies(config: RunConfig, outcome: Outcome) -> Outcome:
    """The outcome of a run that ran out of memory, with what would save most."""
    if not outcome.out_of_memory:
        return outcome
    try:
        made = estimate(config)
        now = made.total(made.places[0], made.setting)
        best = " or ".join(
            f"{remedy.keys[0]} (saves about {gb(now - remedy.total)})"
            for remedy in made.best_switches()
        )
    except Exception as error:  # a run that has failed must still say why
        best = f"a smaller training.micro_batch_size (no estimate: {error})"
    if not best:
        best = "fewer ranks on that host, or a smaller model"
    return replace(outcome, reason=f"{outcome.reason}; try {best}")


def _title(made: Estimate) -> str:
    config, parameters = made.config, made.rank(made.places[0]).trained
    length = made.spec.sequence_length
    sample = f"sequences of {length} tokens" if length else "samples"
    return (
        f"dry run: model={config.model.name}, {parameters:,} parameters, "
        f"algorithm={config.algorithm.name} on {counted(world_size(config), 'rank')}, "
        f"precision={config.precision}, optimizer={config.optimizer.name}; a step is "
        f"{counted(made.micro_batches, 'micro-batch')} of {made.setting.micro_batch_size} "
        f"{sample} on each rank{' that trains' if only_serves(config) else ''}"
    )


def _table(made: Estimate, *, is_plain: bool) -> rich.table.Table:
    """A column for every kind of host."""
    table = rich.table.Table(box=rich.box.ASCII2 if is_plain else rich.box.SIMPLE_HEAD)
    table.add_column("memory of one rank (GB of 2^30 bytes)")
    kinds = _kinds(made)
    needs = [made.need(places[0], made.setting) for places in kinds]
    for places in kinds:
        table.add_column("\n".join(place.name for place in places), justify="right")
    for part in needs[0].parts:
        values = [need.parts[part] for need in needs]
        if any(values):
            table.add_row(_PARTS[part], *(_cell(value) for value in values))
    table.add_section()
    table.add_row("one rank", *(_cell(need.total) for need in needs))
    if any(places[0].ranks > 1 for places in kinds):
        table.add_row("ranks there", *(str(places[0].ranks) for places in kinds))
        totals = [_cell(made.total(places[0], made.setting)) for places in kinds]
        table.add_row("all of them, libraries shared", *totals)
    table.add_row("there is room for", *(_room(places[0]) for places in kinds))
    return table


_PARTS = {
    "process": "Python and libraries",
    "parameters": "parameters",
    "gradients": "gradients (buckets)",
    "late gradients": "gradients of late steps",
    "residuals": "what rounding took away",
    "passing": "whole buckets and layers, in passing",
    "pushes": "room for the gradients of workers",
    "average": "average of the weights",
    "staging": "copies of gradients for the network",
    "optimizer": "optimizer",
    "activations": "activations, logits and loss",
    "update": "temporary, in an update",
    "checkpoint": "copy for a checkpoint",
    "slack": "lost between blocks",
}


def _kinds(made: Estimate) -> list[list[Place]]:
    """Hosts that need and have the same, together."""
    kinds: dict[tuple[object, ...], list[Place]] = {}
    for place in made.places:
        alike = (place.ranks, place.device, place.room, place.is_here, made.rank(place).sharding)
        kinds.setdefault(alike, []).append(place)
    return list(kinds.values())


def _cell(size: int) -> str:
    return f"{size / 2**30:.3f}" if size < 2**30 else f"{size / 2**30:.2f}"


def _room(place: Place) -> str:
    return "unknown" if place.room is None else _cell(place.room)


def _lines(made: Estimate) -> Iterator[str]:
    if made.cannot_trace:
        yield f"note: activations are not counted: {made.cannot_trace}"
    for note in made.notes:
        yield f"note: {note}"
    yield f"network: {_network(made)}"
    yield f"time: {_time(made)}"
    yield f"disk: {_disk(made)}"
    yield f"assumed: {_assumed(made)}"
    if made.lacking(made.setting) > 0:
        yield from _remedies(made)


def _assumed(made: Estimate) -> str:
    parts = ["data files are read through the page cache"]
    if not all(place.is_here for place in made.places):
        parts.append("an empty process is as large on every host as here")
    if any(place.device == "cuda" for place in made.places):
        parts.append("all of a rank counts against the memory of its GPU, where that is known")
    return "; ".join(parts)


def _network(made: Estimate) -> str:
    sent = made.wire()
    if not sent:
        return "nothing, there is one rank"
    line = f"each rank sends and receives {_size(sent)} per step"
    if made.rank(made.places[0]).sharding.seats:
        line = f"the server sends and receives {_size(sent)} per step, others {_size(made.wire(1))}"
    if len(made.places) == 1:
        return f"{line}, inside this machine"
    times = ", ".join(f"{8 * sent / (g * 1e9):.2f} s at {g} Gbit/s" for g in _LINKS_GBPS)
    return f"{line}: {times} (the links have not been measured)"


def _size(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def _time(made: Estimate) -> str:
    work = made.trace(made.setting)
    if work is None:
        return "unknown"
    flops = work.flops * made.micro_batches
    here = [place for place in made.places if place.is_here and place.device == "cpu"]
    if not here:
        return f"unknown on these machines; {flops / 1e12:.2f} TFLOP per step and rank"
    speed, moved_per_s = measure_speed()
    share = 1 / max(place.ranks for place in here)
    parameters = made.rank(here[0]).trained
    # An update of float32 reads and writes four or five tensors as large as the parameters.
    moved = work.moved * made.micro_batches + 20 * parameters
    seconds = flops / (speed * share) + moved / (moved_per_s * share)
    return (
        f"about {seconds:.2f} s of computing per step on this machine, "
        f"{seconds * made.config.training.steps / 60:.1f} min for "
        f"{counted(made.config.training.steps, 'step')} "
        f"({flops / 1e9:.1f} GFLOP per step and rank; measured now: {speed / 1e9:.0f} GFLOPS)"
    )


def measure_speed() -> tuple[float, float]:
    """Operations per second of matrix products, and bytes per second of sums, on all cores."""
    matrix, block = torch.ones(_MATRIX, _MATRIX), torch.ones(_BLOCK)
    best_product = best_sum = float("inf")
    end = time.perf_counter() + _MEASURE_S
    while (began := time.perf_counter()) < end:
        matrix @ matrix
        best_product = min(best_product, time.perf_counter() - began)
    end = time.perf_counter() + _MEASURE_S
    while (began := time.perf_counter()) < end:
        block.add_(1.0)
        best_sum = min(best_sum, time.perf_counter() - began)
    return 2 * _MATRIX**3 / best_product, 2 * block.nbytes / best_sum


def _disk(made: Estimate) -> str:
    size, checkpoint = made.checkpoint(), made.config.checkpoint
    if not checkpoint.every:
        return f"no checkpoints (checkpoint=none); one would be {_size(size)}"
    # Those that are kept, the best, and the one that is being written.
    count = checkpoint.keep + checkpoint.keep_best + 1
    free = shutil.disk_usage(_existing(OUTPUTS)).free
    verdict = "" if count * size < free else ", which is NOT ENOUGH"
    return (
        f"{_size(size)} a checkpoint, up to {count} at a time: {_size(count * size)} of "
        f"{_size(free)} free in {OUTPUTS}{verdict}"
    )


def _existing(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def _remedies(made: Estimate) -> Iterator[str]:
    yield f"what would make it fit, with {MARGIN - 1:.0%} to spare:"
    remedies = made.best_switches(count=4)
    best = made.smallest_change()
    place = made.places[0]
    if best is not None and best.keys not in [remedy.keys for remedy in remedies]:
        remedies.append(best)
    for remedy in remedies:
        fits = made.lacking(remedy.setting) <= 0
        total = gb(made.total(place, remedy.setting))
        answer = "fits" if fits else "not enough"
        yield f"  {' '.join(remedy.keys)}: {total} on {place.name}, {answer}"
    if best is None:
        yield "  no combination of these keys is enough: more hosts, or a smaller model"
    yield from _sharded(made, place)


def _sharded(made: Estimate, place: Place) -> Iterator[str]:
    """What cutting more among the ranks would save."""
    now = made.rank(place).sharding.stage
    if world_size(made.config) == 1:
        return
    for stage in range(now + 1, 4):
        other = replace(made, config=at_stage(made.config, stage))
        if made.setting.optimizer == "adafactor" or (stage == 3 and other.rank(place).slots > 1):
            continue  # the configuration would be refused
        answer = "fits" if other.lacking(made.setting) <= 0 else "not enough"
        total = gb(other.total(place, made.setting))
        yield f"  algorithm=fsdp algorithm.stage={stage}: {total} on {place.name}, {answer}"
