"""A dry run in words: a table per kind of host, the wire, the time, the disk, and a last line that
says whether it fits."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import rich.box
import rich.table
import yaml

from smolrun.algorithms.layer_cut import layers_text
from smolrun.config import RunConfig, has_dedicated_server, world_size
from smolrun.config.algorithms import FSDPConfig
from smolrun.estimate.dry_run import MARGIN, Estimate, Place
from smolrun.estimate.dry_run_stages import stage_lines, stage_step
from smolrun.estimate.memory import Setting
from smolrun.estimate.speeds import (
    links_gbps,
    measure_speed,
    rate_text,
    size_text,
    times_on_links,
)
from smolrun.launch.machine_memory import gb
from smolrun.launch.supervisor_events import EXIT_BAD_CONFIG, EXIT_DONE
from smolrun.sanitize import indented, one_line
from smolrun.tracking.console import Screen
from smolrun.tracking.formatting import counted, duration
from smolrun.tracking.run_folder import OUTPUTS

_NEARLY_ALL = 9  # times as long as computing
_LONG_S = 3600.0  # of network: worth advice
_CLEARLY_LESS = 0.8
_SHOWN_WIDTH = 100


def report(made: Estimate) -> int:
    """Print what the run would need; the exit code is that of a bad configuration where it does not
    fit."""
    console = Screen(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = _SHOWN_WIDTH
    console.print(one_line(_title(made)), soft_wrap=True)
    console.print(_table(made, is_plain=not console.is_terminal))
    fits, last_line = verdict(made)
    for line in [*_lines(made), last_line]:
        console.print(indented(line), soft_wrap=True)
    return EXIT_DONE if fits else EXIT_BAD_CONFIG


def verdict(made: Estimate) -> tuple[bool, str]:
    """Whether it fits, perhaps narrowly, and the last line: memory, disk, and the time it takes."""
    fits, text = memory_verdict(made)
    count, size, free = _checkpoints(made)
    if fits and count * size > free:
        needed = f"{counted(count, 'checkpoint')} of {size_text(size)}"
        return False, f"does not fit on the disk: {needed}, {size_text(free)} free in {OUTPUTS}"
    return fits, text + (_how_long(made) if fits else "")


def memory_verdict(made: Estimate) -> tuple[bool, str]:
    """Whether the memory of every host is enough, perhaps narrowly, as far as is known."""
    too_small: list[str] = []
    narrow: list[str] = []
    for place in made.places:
        total = made.total(place, made.setting)
        if place.room is not None and MARGIN * total > place.room:
            where = too_small if total > place.room else narrow
            where.append(f"{place.name} needs {gb(total)} of {gb(place.room)}")
    if too_small:
        return False, f"does not fit: {', '.join(too_small + narrow)}"
    if narrow:
        text = f"fits narrowly, if at all: {', '.join(narrow)}, give or take {MARGIN - 1:.0%}"
        return True, text
    unknown = [place.name for place in made.places if place.room is None]
    if unknown:
        names = ", ".join(unknown)
        return True, f"fits, as far as is known: the memory of {names} is not (memory_gb)"
    return True, "fits"


def _how_long(made: Estimate) -> str:
    """The time of the whole run, in the words that follow `fits`. Computing and sending overlap, so
    a step takes the longer of the two."""
    steps = made.config.training.steps
    number = counted(steps, "step")
    if made.keys is not None:
        seconds, _ = stage_step(made)
        return f"; {number} take at least {duration(steps * seconds)}" if seconds else ""
    compute, network = _compute_s(made), _network_s(made) or 0.0
    if network <= (compute or 0.0):
        return f"; {number} take at least {duration(steps * compute)}" if compute else ""
    link = rate_text(links_gbps(made.config)[0])
    if compute is None:
        text = f"the network alone takes {duration(steps * network)} for {number} at {link}"
    else:
        share = "nearly all" if network > _NEARLY_ALL * compute else "mostly"
        text = f"{number} take at least {duration(steps * network)}, {share} network at {link}"
    if steps * network < _LONG_S:
        return f"; {text}"
    quicker = [f"{words} ({duration(steps * s)})" for words, s in _less_network(made, network)]
    if made.rank(made.places[0]).sharding.stage < 2:  # bytes of a step, however large its batch
        quicker.append("a larger training.global_batch_size in fewer steps")
    return f", but {text}; quicker: {', '.join(quicker) or 'faster links, or fewer hosts'}"


def run_s(made: Estimate) -> float | None:
    """Seconds that all steps take at least; None where that is not known."""
    compute = stage_step(made)[0] if made.keys is not None else _compute_s(made)
    if compute is None:
        return None
    return made.config.training.steps * max(compute, _network_s(made) or 0.0)


def _less_network(made: Estimate, now_s: float) -> Iterator[tuple[str, float]]:
    """Keys with which it fits too and sends clearly less, and the seconds of a step then."""
    training, quantization = made.config.training, made.config.quantization
    others: dict[str, Estimate | None] = {}
    size, most = made.setting.micro_batch_size, made.micro_batches * made.setting.micro_batch_size
    while (size := 2 * size) <= most:
        other = made.changed(training=training.model_copy(update={"micro_batch_size": size}))
        if not _fits(other):
            break
        others = {f"training.micro_batch_size={size}": other}  # the largest that fits
    for stage in range(made.rank(made.places[0]).sharding.stage):  # from the least that travels
        algorithm = made.config.algorithm.with_stage(stage)
        other = made.changed(algorithm=algorithm) if algorithm is not None else None
        if _fits(other):
            others[f"algorithm.stage={stage}"] = other
            break
    if quantization.kind == "none":
        int8 = quantization.model_copy(update={"kind": "int8"})
        others["quantization=int8"] = made.changed(quantization=int8)
    for words, other in others.items():
        if other is not None and _fits(other):
            needed_s = _network_s(other) or 0.0
            if needed_s < _CLEARLY_LESS * now_s:
                yield words, needed_s


def _fits(made: Estimate | None) -> bool:
    return made is not None and made.lacking(made.setting) <= 0


def _title(made: Estimate) -> str:
    config, parameters = made.config, sum(math.prod(shape) for shape in made.shapes)
    length = made.spec.sequence_length
    sample = f"sequences of {length} tokens" if length else "samples"
    return (
        f"dry run: model={config.model.name}, {parameters:,} parameters, "
        f"algorithm={config.algorithm.name} on {counted(world_size(config), 'rank')}, "
        f"precision={config.precision}, optimizer={config.optimizer.name}; a step is "
        f"{counted(made.micro_batches, 'micro-batch')} of {made.setting.micro_batch_size} "
        f"{sample} {_where(made)}"
    )


def _where(made: Estimate) -> str:
    if made.has_replicas:
        return "through each of the pipelines"
    if made.keys is not None:
        return "through all ranks"
    return f"on each rank{' that trains' if has_dedicated_server(made.config) else ''}"


def _table(made: Estimate, *, is_plain: bool) -> rich.table.Table:
    """A column for every kind of host, or for every stage."""
    table = rich.table.Table(box=rich.box.ASCII2 if is_plain else rich.box.SIMPLE_HEAD)
    table.add_column("memory of one rank (GB of 2^30 bytes)", min_width=13)
    columns = _columns(made)
    needs = [made.need(place, made.setting, number) for _, place, number in columns]
    for names, _, _ in columns:
        table.add_column(names, justify="right", min_width=7, overflow="fold")
    for part in needs[0].parts:
        values = [need.parts[part] for need in needs]
        if any(values):
            table.add_row(_PARTS[part], *(_cell(value) for value in values))
    table.add_section()
    table.add_row("one rank", *(_cell(need.total) for need in needs))

    def of_hosts(value: Callable[[Place], str]) -> list[str]:
        return ["" if number else value(place) for _, place, number in columns]

    if any(place.ranks > 1 for _, place, _ in columns):
        table.add_row("ranks there", *of_hosts(lambda place: str(place.ranks)))
        totals = of_hosts(lambda place: _cell(made.total(place, made.setting)))
        table.add_row("all of them, libraries shared", *totals)
    table.add_row("available", *of_hosts(_room))
    return table


_PARTS = {
    "process": "Python and libraries",
    "parameters": "parameters",
    "gradients": "gradients (buckets)",
    "late gradients": "gradients of late steps",
    "residuals": "quantization residuals",
    "passing": "unsharded buckets and layers",
    "pushes": "receive buffers of the server",
    "average": "EMA of the weights",
    "staging": "copies of gradients for the network",
    "optimizer": "optimizer",
    "activations": "activations, logits and loss",
    "update": "temporary, in a step",
    "checkpoint": "copy for a checkpoint",
    "slack": "fragmentation",
}


def _columns(made: Estimate) -> list[tuple[str, Place, int]]:
    """A title, a host, and which of its ranks."""
    if not made.stages(made.setting):
        return [("\n".join(p.name for p in alike), alike[0], 0) for alike in _kinds(made)]
    return [
        (_stage_title(made, place, number), place, number)
        for place in made.places
        for number in range(place.ranks)
    ]


def _stage_title(made: Estimate, place: Place, number: int) -> str:
    rank = place.first_rank + number
    stage = made.stage(rank, made.setting)
    assert stage is not None, "ranks hold stages"
    return f"rank {rank}\n{place.name}\n{layers_text(stage.layers)}"


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
    if made.keys is not None:
        yield from stage_lines(made)
    else:
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
    if made.config.model.loss is not None:
        parts.append("model.loss needs as much memory as cross entropy")
    return "; ".join(parts)


def _network(made: Estimate) -> str:
    sent = made.wire()
    if not sent:
        return "nothing, there is one rank"
    line = f"each rank sends and receives {size_text(sent)} per step"
    if made.rank(made.places[0]).sharding.push_buffers:
        others = size_text(made.wire(1))
        line = f"the server sends and receives {size_text(sent)} per step, others {others}"
    if len(made.places) == 1:
        return f"{line}, inside this machine"
    return f"{line}: {times_on_links(made.config, lambda gbps: 8 * sent / (gbps * 1e9))}"


def _network_s(made: Estimate) -> float | None:
    """Seconds a step's bytes need; None inside one machine."""
    if len(made.places) == 1:
        return None
    return 8 * made.wire() / (links_gbps(made.config)[0] * 1e9)


def _time(made: Estimate) -> str:
    work = made.trace(made.setting)
    if work is None:
        return "unknown"
    flops, seconds = work.flops * made.micro_batches, _compute_s(made)
    if seconds is None:
        return f"unknown on these machines; {flops / 1e12:.2f} TFLOP per step and rank"
    steps = made.config.training.steps
    return (
        f"about {duration(seconds)} of computing per step on this machine, "
        f"{duration(seconds * steps)} for {counted(steps, 'step')} "
        f"({flops / 1e9:.1f} GFLOP per step and rank; "
        f"measured now: {measure_speed()[0] / 1e9:.0f} GFLOPS)"
    )


def _compute_s(made: Estimate) -> float | None:
    """Seconds of computing in a step; None where no rank computes on the CPU of this machine."""
    work = made.trace(made.setting)
    here = [place for place in made.places if place.is_here and place.device == "cpu"]
    if work is None or not here:
        return None
    speed, moved_per_s = measure_speed()
    share = 1 / max(place.ranks for place in here)
    # An update of float32 reads and writes four or five tensors as large as the parameters.
    moved = work.moved * made.micro_batches + 20 * made.rank(here[0]).trained
    return work.flops * made.micro_batches / (speed * share) + moved / (moved_per_s * share)


def _checkpoints(made: Estimate) -> tuple[int, int, int]:
    """How many there are at most at one time, bytes of one, bytes that are free."""
    checkpoint, steps = made.config.checkpoint, made.config.training.steps
    saved = math.ceil(steps / checkpoint.every) if checkpoint.every else 0
    # Those that are kept, the best, and the one that is being written.
    count = min(saved, checkpoint.keep + checkpoint.keep_best + 1)
    return count, made.checkpoint(), shutil.disk_usage(_existing(OUTPUTS)).free


def _disk(made: Estimate) -> str:
    count, size, free = _checkpoints(made)
    if not count:
        return f"no checkpoints (checkpoint=none); one would be {size_text(size)}"
    enough = "" if count * size < free else ", which is NOT ENOUGH"
    return (
        f"{size_text(size)} a checkpoint, up to {count} at a time: {size_text(count * size)} of "
        f"{size_text(free)} free in {OUTPUTS}{enough}"
    )


def _existing(path: Path) -> Path:
    path = path.absolute()
    return next(each for each in (path, *path.parents) if each.exists())


def _remedies(made: Estimate) -> Iterator[str]:
    yield f"what would make it fit, with {MARGIN - 1:.0%} to spare:"
    remedies = made.best_switches(count=4)
    best = made.smallest_change()
    place = made.places[0]
    if best is not None and best.keys not in [remedy.keys for remedy in remedies]:
        remedies.append(best)
    for remedy in remedies:
        yield _remedy(" ".join(remedy.keys), made, place, remedy.setting)
    others = [*_lighter(made), *_with_fewer_ranks(made), *_sharded(made, place)]
    yield from others
    if best is None and not any(line.endswith(", fits") for line in others):
        yield "  no combination of these keys is enough: more hosts, or a smaller model"


def _remedy(words: str, made: Estimate, place: Place, setting: Setting) -> str:
    answer = "fits" if made.lacking(setting) <= 0 else "not enough"
    return f"  {words}: {gb(made.total(place, setting))} on {place.name}, {answer}"


def _lighter(made: Estimate) -> Iterator[str]:
    """What keys of the algorithm itself would save."""
    for words, algorithm in made.config.algorithm.lighter().items():
        if (other := made.changed(algorithm=algorithm)) is not None:
            yield _remedy(words, other, other.places[0], other.setting)


def _with_fewer_ranks(made: Estimate) -> Iterator[str]:
    """What fewer ranks on a machine would save, where needed with further keys."""
    found = made.fewer_ranks()
    if found is None:
        return
    words, other = found
    setting = other.setting
    if other.lacking(setting) > 0 and (best := other.smallest_change()) is not None:
        words, setting = f"{words} {' '.join(best.keys)}", best.setting
    yield _remedy(words, other, other.places[0], setting)


def _sharded(made: Estimate, place: Place) -> Iterator[str]:
    """What cutting more among the ranks would save."""
    now = made.rank(place).sharding.stage
    if world_size(made.config) == 1:
        return
    for stage in range(now + 1, 4):
        other = replace(made, config=_at_stage(made.config, stage))
        if made.setting.optimizer == "adafactor" or (stage == 3 and other.rank(place).slots > 1):
            continue  # the configuration would be refused
        yield _remedy(f"algorithm=fsdp algorithm.stage={stage}", other, place, made.setting)


def _at_stage(config: RunConfig, stage: int) -> RunConfig:
    """The same run with algorithm=fsdp algorithm.stage=..., unchecked."""
    file = files("smolrun.conf") / "algorithm" / "fsdp.yaml"
    section = yaml.safe_load(file.read_text(encoding="utf-8"))
    algorithm = FSDPConfig(**{**section, "stage": stage})
    return config.model_copy(update={"algorithm": algorithm})
