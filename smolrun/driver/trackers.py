"""The trackers of a training run: metrics.jsonl, console, summary, and what `tracker=` adds."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from smolrun.config import RunConfig, ranks, world_size
from smolrun.driver.resume import ResumePoint
from smolrun.errors import SmolrunError
from smolrun.events import Event, ShardFailed, ShardSaved
from smolrun.launch.driver import Subscriber
from smolrun.parts.placement import plan_batches
from smolrun.tracking.api_key import api_key_file
from smolrun.tracking.bottleneck import RunSetup, TimeReport
from smolrun.tracking.console import Console
from smolrun.tracking.jsonl import JsonLines, trained_tokens
from smolrun.tracking.run_folder import RunFolder
from smolrun.tracking.run_record import RunRecord
from smolrun.tracking.timeline import TimelineFile
from smolrun.tracking.trackers import Fanout, Tracker, make_trackers

# Keys that do not belong to the choice of a tracker.
OF_ALL_TRACKERS = ("timeline_steps", "loki", "prometheus", "prometheus_bind")


class RunTrackers(Subscriber):
    """Hands events to all trackers of a run; the summary is made of `record` and `times`."""

    def __init__(
        self, config: RunConfig, folder: RunFolder, console: Console, resume: ResumePoint | None
    ) -> None:
        """Opens metrics.jsonl; OSError if that is impossible."""
        self.record = RunRecord()
        if resume is not None:
            self.record = RunRecord(
                earlier_s=resume.time_s,
                tokens=trained_tokens(folder.metrics),
                steps=resume.updates,
                train_loss=resume.train_loss,
                eval_loss=resume.eval_loss,
                checkpoint=resume.checkpoint.name if resume.checkpoint else None,
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
        config, path = self._config, self._folder.path
        chosen = make_trackers(
            config.tracker.kind,
            config.tracker.model_dump(exclude={"kind", *OF_ALL_TRACKERS}),
            path,
            world_size=world_size(config),
            warn=lambda text: self._say(f"warning: {text}"),
            note=self._say,
        )
        timeline = TimelineFile(path / "timeline.json", [rank.host for rank in ranks(config)])
        scraped = scraped_metrics(config, self._folder, self._say)
        self._fanout = Fanout([*self._trackers, timeline, *chosen, *scraped], warn=self._say)

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


def scraped_metrics(
    config: RunConfig, folder: RunFolder, say: Callable[[str], None]
) -> list[Tracker]:
    """The server of `tracker.prometheus`, where it is set and can listen; `say` gets its URL."""
    port, bind = config.tracker.prometheus, config.tracker.prometheus_bind
    if port is None:
        return []
    from smolrun.tracking.prometheus import PrometheusServer

    hosts = [rank.host for rank in ranks(config)]
    try:
        server = PrometheusServer(folder.run_id, hosts, port, bind)
    except (OSError, OverflowError, SmolrunError) as error:
        where = f"{bind}:{port}"
        say(f"warning: tracker.prometheus cannot listen at {where}: {error}; the run continues")
        return []
    key = f"; a scrape needs the key in {api_key_file()}" if server.needs_key else ""
    say(f"metrics for Prometheus: {server.url}{key}")
    return [server]


@contextlib.contextmanager
def shipped_logs(
    config: RunConfig, folder: RunFolder, say: Callable[[str], None]
) -> Iterator[None]:
    """Send what is logged from here to the end of the block to `tracker.loki`, if that is set."""
    if config.tracker.loki is None:
        yield
        return
    from smolrun.tracking.loki import LokiShipper  # loads httpx

    with contextlib.closing(
        LokiShipper(folder, config.tracker.loki, lambda text: say(f"warning: {text}"))
    ):
        yield


def time_report(config: RunConfig, say: Callable[[str], None]) -> TimeReport:
    """The report of where the time goes; it suggests only keys that this run could set."""
    return TimeReport(run_setup(config), say)


def run_setup(config: RunConfig) -> RunSetup:
    """What the report of where the time goes depends on."""
    bound = config.staleness.bound
    algorithm = config.algorithm
    can_be_late = algorithm.can_delay_gradients and world_size(config) > 1
    hosts = config.cluster.hosts or []
    places = [(index, host) for index, host in enumerate(hosts) for _ in range(host.ranks)]
    # Where speeds are measured there is nothing to set.
    can_set_speed = bool(places) and all(host.speed != "auto" for host in hosts)
    size = world_size(config)
    return RunSetup(
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
        stage_micro_batches=_stage_micro_batches(config),
        stage_advice=algorithm.stage_advice(size, config.training.global_batch_size),
    )


def _stage_micro_batches(config: RunConfig) -> int | None:
    """How many micro-batches follow each other through stages of a model before these are empty
    again, of all pipelines together; None where ranks hold no stages, or these never are."""
    keys, training = config.algorithm.stages(world_size(config)), config.training
    if keys is None or (keys.schedule == "1f1b" and config.staleness.bound not in ("auto", 0)):
        return None
    size = None if training.micro_batch_size == "auto" else training.micro_batch_size
    shares = [1.0] * keys.replicas
    plan = plan_batches(training.global_batch_size, shares, 0, size, keys.micro_batches)
    return keys.replicas * len(plan.sizes) if keys.schedule is not None else 1


def can_quantize(config: RunConfig) -> bool:
    """Whether gradients are sent unquantized, and could be quantized."""
    is_whole = config.quantization.kind == "none"
    return config.algorithm.quantizes_gradients and world_size(config) > 1 and is_whole
