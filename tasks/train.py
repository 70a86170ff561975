"""task=train: prepare the data, start one worker per rank, and report how the run ended.

`drive` runs on the driver, `work` on every rank once the mesh is connected."""

from __future__ import annotations

import contextlib
import functools
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from smolrun.config import RunConfig
    from smolrun.launch.channel import WorkerChannel
    from smolrun.launch.control import StartMessage
    from smolrun.mesh.mesh import Mesh


def drive(config: RunConfig) -> int:
    """Train as configured; returns the exit code. ConfigError, DataError, HostError: nothing was
    started."""
    from smolrun.config import world_size  # not above: workers do without the driver
    from smolrun.driver.fleet import is_elsewhere
    from smolrun.driver.preflight import check_before_start, check_weights
    from smolrun.driver.prepare import spec_of, with_pinned_model
    from smolrun.driver.restart import Restarts, reachable_hosts
    from smolrun.driver.resume import find_weights
    from smolrun.driver.trackers import shipped_logs
    from smolrun.driver.training_run import TrainingRun
    from smolrun.launch.wake import keep_awake
    from smolrun.sanitize import echo
    from smolrun.tracking.console import Console

    began = time.monotonic()
    check_before_start(config)
    if config.training.dry_run:
        from smolrun.estimate.dry_run import estimate  # loads torch
        from smolrun.estimate.dry_run_text import report

        spec = spec_of(config)
        weights = None if config.checkpoint.resume else find_weights(config, None, echo)
        if weights is not None:
            check_weights(config, spec, weights)
        return report(estimate(config, spec, notes=spec.notes))
    config = with_pinned_model(config)
    console = Console(
        steps=config.training.steps,
        world_size=world_size(config),
        batch_size=config.training.global_batch_size,
        names_slowest=config.algorithm.is_lockstep,
    )
    with contextlib.ExitStack() as closing:
        closing.callback(console.close)
        if is_elsewhere(config):  # this machine renews the leases of the workers
            closing.enter_context(keep_awake())
        restarts = Restarts(config, console.say, functools.partial(reachable_hosts, config))
        first = TrainingRun(config, console, closing)
        closing.enter_context(shipped_logs(config, first.folder, console.say))
        run, outcome = restarts.train(
            first,
            lambda start: TrainingRun(start.config, console, closing, start.resume),
        )
        console.close()
        wall_s = time.monotonic() - began
        run.finish(outcome, wall_s, restarts.rows, first.earlier_wall_s)
    return outcome.exit_code


def work(start: StartMessage, mesh: Mesh, channel: WorkerChannel) -> dict[str, Any]:
    """Train on this rank; returns its summary."""
    from smolrun.data.prepared import Prepared
    from smolrun.launch.streams import StreamClient
    from smolrun.parts.placement import rank_speeds
    from smolrun.worker.memory_limit import limit_memory
    from smolrun.worker.train import pick_device, train

    prepared = Prepared.from_json(start.prepared or {})
    device = pick_device(start.device)
    limit_memory(start, device, channel.emit)
    return train(
        start.config,
        prepared,
        mesh,
        device=device,
        speeds=rank_speeds(start.config["cluster"], start.world_size),
        emit=channel.emit,
        should_stop=channel.stop_requested.is_set,
        saving=start.saving,
        rows=StreamClient(channel) if prepared.stream is not None else None,
    )
