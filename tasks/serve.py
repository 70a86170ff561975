"""task=serve: a model behind OpenAI's HTTP API, on this machine or cut over several.

`drive` runs on the driver, `work` on every rank once the mesh is connected."""

from __future__ import annotations

import contextlib
import sys
import time
from typing import TYPE_CHECKING, Any

from smolrun.launch.machine_memory import gb
from smolrun.launch.supervisor_events import EXIT_FAILED, RunOutcome
from smolrun.sanitize import echo, indented, one_line
from smolrun.tracking.formatting import duration

if TYPE_CHECKING:
    from smolrun.config import RunConfig
    from smolrun.driver.lan import LanNames
    from smolrun.driver.serving import ServingRun
    from smolrun.launch.channel import WorkerChannel
    from smolrun.launch.control import StartMessage
    from smolrun.mesh.mesh import Mesh
    from smolrun.serving.messages import Ready, StageStats
    from smolrun.tracking.console import Console
    from smolrun.tracking.run_folder import RunFolder


def drive(config: RunConfig) -> int:
    """Serve as configured; returns the exit code. ConfigError, HostError: nothing was started."""
    from smolrun.driver import service  # not above: workers do without the driver
    from smolrun.driver.detach import begin_driving
    from smolrun.driver.outputs import make_folder, nothing_started
    from smolrun.driver.preflight import check_before_start
    from smolrun.driver.serving import ServingRun, dry_run
    from smolrun.driver.trackers import shipped_logs
    from smolrun.launch.rank_log import DriverLog
    from smolrun.tracking.console import Console

    check_before_start(config)
    console = Console(steps=1, world_size=1)
    if config.training.dry_run:
        return dry_run(config, console.preparing)
    if config.serving.service:
        return service.drive(config)
    with contextlib.ExitStack() as closing:
        closing.callback(console.close)
        run = closing.enter_context(ServingRun(config, console.say, console.preparing))
        with nothing_started():
            # outputs/latest stays with what was trained, which model.run=latest means.
            folder = make_folder(config, f"serve-{run.source.name}")
            console.log = DriverLog(folder.driver_records).write
            console.say(f"{run.source.name} is loaded, then served at {run.url}")
            begin_driving(folder, steps=0, unit="tokens", uses=run.cached_files())
        closing.enter_context(shipped_logs(config, folder, console.say))
        served = _Served(run, folder, console)
        outcome = run.serve(folder, on_ready=served.begin)
        served.end(outcome)
    return outcome.exit_code


class _Served:
    """What the terminal and summary.json say of a server."""

    def __init__(self, run: ServingRun, folder: RunFolder, console: Console) -> None:
        self._run = run
        self._folder = folder
        self._console = console
        self._began = time.monotonic()
        self._stages: dict[int, StageStats] = {}  # by rank

    def begin(self, ready: Ready) -> None:
        """An engine answers requests from now on: the first one, another replica, or a pipeline
        again."""
        run, say = self._run, self._console.say
        is_first, old = not self._stages, self._stages
        new = {stage.rank: stage for stage in ready.stages}
        self._stages = {**old, **new} if run.has_replicas else new
        self._console.close()
        self._write_summary({"status": "serving"})
        if is_first:
            self._say_how(ready)
        elif not run.has_replicas:
            say("answers continue")
        for stage in ready.stages if run.has_replicas else ():
            step = f", with step {ready.version}" if ready.version else ""
            say(f"rank {stage.rank} on {stage.host} answers requests{step}")

    def _say_how(self, ready: Ready) -> None:
        from smolrun.driver.serving_model import example

        run, say = self._run, self._console.say
        say(
            f"{run.source.name} is served at {run.url}: {ready.max_running} requests at once, "
            f"context {ready.max_sequence_length:,} tokens, {gb(run.spec.sizes.weights)} of weights"
        )
        say(example(run.source, run.url, needs_key=run.is_open))
        if run.lan is not None:
            self._show_link(run.lan)
        say(f"to stop it: Ctrl-C, or smolrun task=stop stop.run={self._folder.run_id}")

    def _show_link(self, names: LanNames) -> None:
        """How a phone opens the page; the link with the key on a terminal alone."""
        from smolrun.driver.lan import show_link
        from smolrun.tracking.api_key import link

        for line in names.notes(int(self._run.url.rpartition(":")[2])):
            self._console.say(line)
        if sys.stdout.isatty():
            show_link(link(self._run.url))
        else:
            name = self._folder.run_id
            self._console.say(
                f"a terminal shows its QR code: smolrun task=attach attach.run={name}"
            )

    def end(self, outcome: RunOutcome) -> None:
        """The last lines, and how it ended for those who look at the run later."""
        wall_s = time.monotonic() - self._began
        how = {"status": outcome.status, "exit_code": outcome.exit_code, "wall_s": wall_s}
        why = {
            "reason": outcome.reason or None,
            "failed_rank": outcome.failed_rank,
            "failed_host": outcome.failed_host,
        }
        with contextlib.suppress(OSError):
            self._folder.write_summary({**how, **why, **self._facts()})
        if outcome.exit_code == EXIT_FAILED:
            self._console.log(f"error: {outcome.reason}")
            echo(indented(f"smolrun: {outcome.reason}"), error=True)
            for line in outcome.log_tail:
                echo(f"  | {one_line(line)}", error=True)
        self._console.say(f"{outcome.status}, served for {duration(wall_s)}")
        self._console.say(f"run folder: {self._folder.path}")

    def _write_summary(self, state: dict[str, Any]) -> None:
        try:
            self._folder.write_summary({**state, **self._facts()})
        except OSError as error:  # a server does not need its disk
            self._console.say(f"warning: summary.json cannot be written: {error}")

    def _facts(self) -> dict[str, Any]:
        stages = [
            {
                "rank": stage.rank,
                "host": stage.host,
                "layers": [stage.first_layer, stage.last_layer],
                "weight_bytes": stage.weight_bytes,
                "cache_bytes": stage.cache_bytes,
            }
            for _, stage in sorted(self._stages.items())
        ]
        run = self._run
        memory = {"model_bytes": run.spec.sizes.weights, "stages": stages}
        return {
            "url": run.url,
            "model": run.source.name,
            "bind": run.bind,
            "emulated": run.emulated,
            **memory,
        }


def work(start: StartMessage, mesh: Mesh, channel: WorkerChannel) -> dict[str, Any]:
    """Hold the model, or a stage of it, on this rank. Returns its summary."""
    if start.links == "none":
        from smolrun.worker.replica import serve_replica

        return serve_replica(start, mesh, channel)
    from smolrun.worker.serve import serve

    return serve(start, mesh, channel)
