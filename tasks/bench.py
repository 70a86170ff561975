"""task=bench: measure ourselves beside a named peer, in turn; a table and JSON lines.

`drive` is the driver's half, `work` what every rank does once the mesh stands.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Any, TextIO

import rich.box
from rich.markup import escape
from rich.table import Table

from smolrun.config import RunConfig, world_size
from smolrun.config.settings import StepBenchConfig
from smolrun.driver.fleet import open_fleet
from smolrun.driver.outputs import make_folder, nothing_started
from smolrun.driver.preflight import check_before_start, refuse_emulated
from smolrun.driver.prepare import prepare_data
from smolrun.driver.run_on_ranks import run_on_ranks
from smolrun.errors import ConfigError
from smolrun.events import BenchRow, Event
from smolrun.launch.driver import Subscriber
from smolrun.launch.supervisor import Limits
from smolrun.launch.supervisor_events import EXIT_DONE, RunOutcome
from smolrun.sanitize import echo, one_line
from smolrun.tracking.console import Screen

if TYPE_CHECKING:
    from smolrun.data.prepared import Prepared
    from smolrun.launch.channel import WorkerChannel
    from smolrun.launch.control import StartMessage
    from smolrun.mesh.mesh import Mesh
    from smolrun.tracking.run_folder import RunFolder


def drive(config: RunConfig) -> int:
    """Run the bench once per world size; rows go to bench.jsonl in the run folder."""
    bench = config.bench
    needs_data = bench.name == "step"
    if isinstance(bench, StepBenchConfig):
        _check_peers(config, bench)
    refuse_emulated(config, "a peer that is measured here would not be emulated; allowed: others")
    for size in bench.world_sizes:
        _smaller(config, size)
    prepared = prepare_data(config, lambda *_: None) if needs_data else None
    check_before_start(config)
    with nothing_started():
        folder = make_folder(config, f"bench-{bench.name}")
        out = (folder.path / "bench.jsonl").open("w", encoding="utf-8")
    with out as file:
        rows = _RowFile(file)
        for size in bench.world_sizes:
            outcome = _measure(_smaller(config, size), folder, prepared, rows)
            if outcome.exit_code != EXIT_DONE:
                echo(f"smolrun: {outcome.reason}", error=True)
                return outcome.exit_code
    Screen().print(_table(rows.rows))
    echo(f"the rows: {folder.path / 'bench.jsonl'}")
    return EXIT_DONE


def _check_peers(config: RunConfig, bench: StepBenchConfig) -> None:
    """ConfigError where a peer does not do what smolrun would."""
    if config.precision != "float32" or config.staleness.bound not in ("auto", 0):
        raise ConfigError(
            "bench = step: the peer trains in float32 and waits for every gradient; "
            "allowed: precision=float32 staleness=strict"
        )
    is_pipeline = config.algorithm.name == "mp_pipeline"
    if any((peer == "pipelining") != is_pipeline for peer in bench.peers):
        raise ConfigError(
            f"bench.peers = {', '.join(bench.peers)}: not with algorithm={config.algorithm.name}; "
            "allowed: bench.peers=[pipelining] with algorithm=mp_pipeline, and only with that"
        )


class _RowFile(Subscriber):
    """Writes the measured rows to bench.jsonl and the terminal."""

    def __init__(self, file: TextIO) -> None:
        self.rows: list[dict[str, Any]] = []
        self._file = file

    def on_event(self, event: Event) -> None:
        """Add a row."""
        if isinstance(event, BenchRow):
            self.rows.append(event.row)
            self._file.write(json.dumps(event.row) + "\n")
            self._file.flush()
            echo(one_line(_line(event.row)))


def _smaller(config: RunConfig, size: int) -> RunConfig:
    """The configuration with so many ranks: on this machine, or on the first hosts of the list."""
    cluster = config.cluster
    if cluster.hosts is None:
        update: dict[str, Any] = {"ranks": size}
    else:
        ranks = [host for host in cluster.hosts for _ in range(host.ranks)][:size]
        names = Counter(host.name for host in ranks)
        hosts = {host.name: host for host in ranks}
        update = {
            "hosts": [
                host.model_copy(update={"ranks": names[name]}) for name, host in hosts.items()
            ]
        }
    smaller = config.model_copy(update={"cluster": cluster.model_copy(update=update)})
    if world_size(smaller) != size:
        raise ConfigError(
            f"bench.world_sizes = {size}: cluster={cluster.name} has {world_size(config)} ranks; "
            f"allowed: 2 to {world_size(config)}"
        )
    return smaller


def _measure(
    config: RunConfig,
    folder: RunFolder,
    prepared: Prepared | None,
    rows: _RowFile,
) -> RunOutcome:
    """One world size, from connecting to its last row."""
    fleet = open_fleet(config)
    limits = Limits(start_s=config.cluster.start_timeout_s, finish_s=config.mesh.timeout_s)
    try:
        return run_on_ranks(
            config, folder, fleet, [rows], limits=limits, say=print, prepared=prepared
        )
    finally:
        fleet.close()


def work(start: StartMessage, mesh: Mesh, channel: WorkerChannel) -> dict[str, Any]:
    """Measure on this rank; rank 0's clock counts."""
    from smolrun.benchmarks.collectives import join_gloo, leave_gloo
    from smolrun.collectives.api import new_group
    from smolrun.worker.bench import end_together, rows

    collectives = new_group(mesh)
    join_gloo(collectives, start.addresses[0], mesh.timeout_s)
    try:
        for row in rows(start, mesh, collectives):
            if mesh.rank == 0:
                channel.emit(BenchRow(row))
        end_together(collectives)
    finally:
        leave_gloo()
    return {}


def _line(row: dict[str, Any]) -> str:
    what = (
        f"{row['bytes']:>11,} bytes"
        if "bytes" in row
        else f"{row.get('parameters', 0):,} parameters"
    )
    low, high = row["spread"]
    return (
        f"{row['op']} on {row['world_size']} ranks, {what}: {_time(row['ours_s'])}, "
        f"{row['peer']} {_time(row['peer_s'])}, ratio {row['ratio']:.2f} ({low:.2f} to {high:.2f})"
    )


def _table(rows: list[dict[str, Any]]) -> Table:
    rows = [row | {key: escape(one_line(row[key])) for key in ("op", "peer")} for row in rows]
    ops, peers = ([*dict.fromkeys(row[key] for row in rows)] for key in ("op", "peer"))
    table = Table(
        title=f"{', '.join(ops)}: smolrun beside {peers[0] if len(peers) == 1 else 'others'}; "
        "a ratio below 1: smolrun is faster",
        box=rich.box.SIMPLE_HEAD,
        padding=(0, 0, 0, 1),
        pad_edge=False,
    )
    # 80 columns are enough: two lines of heads, and no number is ever cut.
    for name in ("ranks", "what", "smolrun", "peer", "ratio", "min to\nmax", "CPU\nratio"):
        table.add_column(name, justify="right", no_wrap=name != "what", overflow="fold")
    for row in rows:
        size = (
            f"{row['bytes']:,} B" if "bytes" in row else f"{row.get('parameters', 0) / 1e6:.1f} M"
        )
        table.add_row(
            str(row["world_size"]),
            size if len(ops) == 1 else f"{row['op']}, {size}",
            _time(row["ours_s"]),
            f"{row['peer']} {_time(row['peer_s'])}",
            f"{row['ratio']:.2f}",
            "{:.2f} to {:.2f}".format(*row["spread"]),
            f"{row['cpu_ratio']:.2f}",
        )
    return table


def _time(seconds: float) -> str:
    if seconds >= 10:
        return f"{seconds:,.1f} s"
    return f"{seconds * 1e6:,.0f} us" if seconds < 0.01 else f"{seconds * 1e3:,.0f} ms"
