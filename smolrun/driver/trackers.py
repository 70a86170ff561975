"""The trackers of a training run: metrics.jsonl, console, summary, and what `tracker=` adds."""

from __future__ import annotations

from collections.abc import Callable

from smolrun.config import RunConfig, ranks, world_size
from smolrun.driver.resume import Earlier
from smolrun.events import Event, ShardFailed, ShardSaved
from smolrun.launch.driver import Subscriber
from smolrun.tracking.bottleneck import RunSetup, TimeReport
from smolrun.tracking.console import Console
from smolrun.tracking.jsonl import JsonLines
from smolrun.tracking.run_folder import RunFolder
from smolrun.tracking.run_record import RunRecord
from smolrun.tracking.timeline import TimelineFile
from smolrun.tracking.trackers import Fanout, Tracker, make_trackers

_HOUSE_KEYS = {"kind", "timeline_steps"}


class RunTrackers(Subscriber):
    """Hands events to all trackers of a run; the summary is made of `record` and `times`."""

    def __init__(
        self, config: RunConfig, folder: RunFolder, console: Console, earlier: Earlier | None
    ) -> None:
        """Opens metrics.jsonl; OSError if that is impossible."""
        self.record = RunRecord()
        if earlier is not None:
            self.record = RunRecord(
                earlier_s=earlier.time_s,
                steps=earlier.updates,
                train_loss=earlier.train_loss,
                eval_loss=earlier.eval_loss,
                checkpoint=earlier.checkpoint.name if earlier.checkpoint else None,
            )
        self.times = time_report(config, console.say)
        self._config = config
        self._folder = folder
        self._say = console.say
        self._trackers: list[Tracker] = [
            JsonLines(folder.metrics),
            console,
            self.record,
            self.times,
        ]

    def open(self) -> None:
        """Open the other trackers; the run's folder must have its config.yaml by now."""
        more = more_readers(self._config, self._folder, self._say)
        self._fanout = Fanout([*self._trackers, *more], warn=self._say)

    def emit(self, event: Event) -> None:
        """Hand an event to all trackers; never raises."""
        self._fanout.record(event)

    def on_event(self, event: Event) -> None:
        """As `emit`, but for the reports that only become a checkpoint together."""
        if not isinstance(event, ShardSaved | ShardFailed):
            self.emit(event)

    def close(self) -> None:
        """Close all trackers; never raises."""
        self._fanout.close()


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


def time_report(config: RunConfig, say: Callable[[str], None]) -> TimeReport:
    """Who says where the time goes; it only advises what this run could set."""
    bound = config.staleness.bound
    algorithm = config.algorithm
    can_be_late = algorithm.can_delay_gradients and world_size(config) > 1
    hosts = config.cluster.hosts or []
    places = [(index, host) for index, host in enumerate(hosts) for _ in range(host.ranks)]
    # Where speeds are measured there is nothing to set.
    can_set_speed = bool(places) and all(host.speed != "auto" for host in hosts)
    size = world_size(config)
    setup = RunSetup(
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
    return TimeReport(setup, say)


def can_quantize(config: RunConfig) -> bool:
    """Whether gradients travel, as they are, and could travel in fewer bits."""
    is_whole = config.quantization.kind == "none"
    return config.algorithm.quantizes_gradients and world_size(config) > 1 and is_whole
