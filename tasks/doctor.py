"""task=doctor: probes every host and every link, and reports what works and how to fix the rest.

    hosts    what each is and has                       launch/doctor/host_report.py, on_host/
    routes   which host reaches which, without a mesh   launch/doctor/reachability.py
    links    round trip and bandwidth, over the mesh    `work`, on one rank per host

doctor.write=true writes what it found into the cluster file, doctor.format=json prints all of it,
doctor.report=true writes it for a bug report.
No process that it starts outlives it.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smolrun.config import RunConfig, ranks
from smolrun.driver.doctor_hosts import HostReports, with_hosts
from smolrun.driver.fleet import Fleet
from smolrun.driver.run_on_ranks import run_on_ranks
from smolrun.errors import HostError, HostErrors
from smolrun.launch.doctor.findings import Finding
from smolrun.launch.supervisor import Limits
from smolrun.launch.supervisor_events import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED
from smolrun.sanitize import echo
from smolrun.tracking.formatting import counted
from smolrun.tracking.run_folder import RunFolder

if TYPE_CHECKING:
    from smolrun.launch.channel import WorkerChannel
    from smolrun.launch.control import StartMessage
    from smolrun.mesh.mesh import Mesh

_LINKS_S = 300.0  # of a mesh with a link of 1 Mbit/s in it


def drive(config: RunConfig) -> int:
    """Exit code 0 if every host can run, 3 if one cannot, 130 if stopped."""
    reports = HostReports.of(config)
    try:
        _to_stderr(f"probing {counted(len(reports.hosts), 'host')}...")
        reports.probe_host()
        if len(reports.reachable) > 1:
            _to_stderr("testing which host reaches which...")
            reports.probe_routes()
        if names := reports.fit_for_mesh():
            _to_stderr("starting a worker on each, and measuring the links...")
            reports.links = _measured(reports, names)
        return _report(reports)
    except KeyboardInterrupt:
        _to_stderr("stopped")
        return EXIT_STOPPED
    finally:
        reports.close()


def _report(reports: HostReports) -> int:
    from smolrun.driver.doctor_text import document, report  # rich
    from smolrun.driver.doctor_write import write_report

    config = reports.config
    fails = any(one.status.state == "cannot run" for one in reports.by_host.values())
    exit_code = EXIT_FAILED if fails else EXIT_DONE
    if config.doctor.format == "json":
        echo(json.dumps(document(reports, exit_code), indent=2, default=str))
    else:
        report(reports)
    if config.doctor.report:
        file = write_report(document(reports, exit_code), config)
        _to_stderr(f"{file}: look at it, and paste it into the bug report")
    if config.doctor.write:
        from smolrun.driver.doctor_write import write

        write(reports, _to_stderr if config.doctor.format == "json" else print)
    return exit_code


def _measured(reports: HostReports, names: Sequence[str]) -> list[dict[str, Any]]:
    """What ranks on these hosts measured: {from, to, rtt_s, bytes_per_s}, hosts by name.

    A host that prevents it gets a finding.
    """
    config = with_hosts(reports.config, names)
    fleet = Fleet(
        config, {name: reports.machines[name] for name in names if name in reports.machines}
    )
    limits = Limits(start_s=config.cluster.start_timeout_s, finish_s=_LINKS_S)
    with tempfile.TemporaryDirectory(prefix="smolrun-doctor-") as place:
        folder = RunFolder.create(Path(place), "doctor", now=datetime.now())
        try:
            outcome = run_on_ranks(config, folder, fleet, limits=limits, say=_to_stderr)
        except (HostError, HostErrors) as error:
            _add_errors(reports, error)
            return []
    if outcome.exit_code != EXIT_DONE:
        host = outcome.failed_host or names[0]
        what = f"no mesh of {', '.join(names)}: {outcome.reason}"
        hint = f"its log ends with: {outcome.log_tail[-1]}" if outcome.log_tail else None
        reports.by_host[host].findings.append(Finding("error", what, hint))
        return []
    host_of = {rank.rank: rank.host for rank in ranks(config)}
    rows = [row for summary in outcome.summaries.values() for row in summary.get("links", ())]
    return [{**row, "from": host_of[row["from"]], "to": host_of[row["to"]]} for row in rows]


def _add_errors(reports: HostReports, error: HostError | HostErrors) -> None:
    for one in error.errors if isinstance(error, HostErrors) else [error]:
        if isinstance(one, HostError) and one.host in reports.by_host:
            reports.by_host[one.host].findings.append(Finding("error", one.what, one.hint))
        else:
            _to_stderr(f"smolrun: {one}")


def _to_stderr(line: str) -> None:
    echo(line, error=True)


def work(start: StartMessage, mesh: Mesh, channel: WorkerChannel) -> dict[str, Any]:
    """Measure the links on this rank; returns what it measured."""
    from smolrun.benchmarks.link_speeds import measure_links
    from smolrun.collectives.api import new_group

    return {"links": measure_links(new_group(mesh))}
