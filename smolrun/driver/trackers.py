"""Who reads the events of a training run, beside metrics.jsonl and the console."""

from __future__ import annotations

from collections.abc import Callable

from smolrun.config import RunConfig, ranks, world_size
from smolrun.tracking.choose import make_trackers
from smolrun.tracking.run_folder import RunFolder
from smolrun.tracking.time_report import TimeTeller
from smolrun.tracking.timeline import TimelineFile
from smolrun.tracking.tracker import Tracker
from smolrun.tracking.verdict import Setup

_HOUSE_KEYS = {"kind", "timeline_steps"}


def more_readers(config: RunConfig, folder: RunFolder, say: Callable[[str], None]) -> list[Tracker]:
    """The timeline, and what `tracker=` asks for; the folder must have its config and metrics."""
    hosts = [rank.host for rank in ranks(config)]
    chosen = make_trackers(
        config.tracker.kind,
        config.tracker.model_dump(exclude=_HOUSE_KEYS),
        folder.path,
        world_size=world_size(config),
        warn=lambda text: say(f"warning: {text}"),
        note=say,
    )
    return [TimelineFile(folder.path / "timeline.json", hosts), *chosen]


def time_teller(config: RunConfig, say: Callable[[str], None]) -> TimeTeller:
    """Who says where the time goes; it only advises what this run could set."""
    bound = config.staleness.bound
    algorithm = config.algorithm
    can_be_late = algorithm.can_delay_gradients and world_size(config) > 1
    hosts = config.cluster.hosts or []
    places = [(index, host) for index, host in enumerate(hosts) for _ in range(host.ranks)]
    # Where speeds are measured there is nothing to set.
    can_set_speed = bool(places) and all(host.speed != "auto" for host in hosts)
    size = world_size(config)
    setup = Setup(
        hosts=[rank.host for rank in ranks(config)],
        speed_keys=[f"cluster.hosts.{index}.speed" for index, _ in places]
        if can_set_speed
        else [None] * size,
        speeds=[1.0 if host.speed == "auto" else host.speed for _, host in places] or [1.0] * size,
        global_batch_size=config.training.global_batch_size,
        staleness=(0 if bound == "auto" else bound) if can_be_late else None,
        can_quantize=can_quantize(config),
        can_use_bf16=config.precision == "float32",
        is_lockstep=not algorithm.is_asynchronous,
    )
    return TimeTeller(setup, say)


def can_quantize(config: RunConfig) -> bool:
    """Whether gradients travel, as they are, and could travel in fewer bits."""
    is_whole = config.quantization.kind == "none"
    return config.algorithm.quantizes_gradients and world_size(config) > 1 and is_whole
