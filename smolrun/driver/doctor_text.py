"""What task=doctor found, as a table with its reasons below, or as one JSON document."""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from smolrun.driver.doctor_hosts import HostReports
from smolrun.launch.doctor.host_report import HostReport
from smolrun.launch.doctor.links import NetworkInterface
from smolrun.sanitize import one_line
from smolrun.tracking.console import Screen

_GB = 1e9
_UNKNOWN = "-"
_COLOURS = {"fine": "green", "usable": "yellow", "cannot run": "red"}
_PLAIN: dict[str, Any] = {"title_justify": "left", "box": box.SIMPLE_HEAD, "pad_edge": False}
_WIDTH = 100  # for a pipe, which has no width


def report(reports: HostReports) -> None:
    """Prints it all."""
    console = Screen(highlight=False)
    if not console.is_terminal:
        console = Screen(highlight=False, width=_WIDTH)
    console.print(_hosts(reports))
    if reports.links:
        console.print(_links(reports))
    for name, one in reports.by_host.items():
        status = one.status
        colour = _COLOURS[status.state]
        console.print(f"[bold]{_shown(name)}[/]: [{colour}]{_shown(status.sentence)}[/]")
        for line in details(one):
            console.print(f"  {_shown(line)}", soft_wrap=True)
        for finding in status.findings:
            mark = {"error": "x", "warning": "!", "info": "."}[finding.severity]
            console.print(f"  {mark} {_shown(finding.what)}", soft_wrap=True)
            if finding.hint:
                console.print(f"      -> {_shown(finding.hint)}", soft_wrap=True)


def _shown(text: str) -> str:
    """What a host said, as the text of a cell or of a line."""
    return escape(one_line(text))


def _hosts(reports: HostReports) -> Table:
    table = Table(title=f"cluster={reports.config.cluster.name}", **_PLAIN)
    titles = "host, system, cores, memory free, disk free, Python, torch, device, status"
    for title in titles.split(", "):
        table.add_column(title, overflow="fold")
    for name, one in reports.by_host.items():
        state = one.status.state
        cells = [_shown(cell) for cell in row(one)]
        table.add_row(_shown(name), *cells, f"[{_COLOURS[state]}]{state}[/]")
    return table


def row(one: HostReport) -> list[str]:
    """A host's cells between its name and its status."""
    system, environment = one.facts.get("system"), one.facts.get("environment", {})
    if system is None:
        return [_UNKNOWN] * 7
    total, free = system["memory_total"], system["memory_available"]
    packages = environment.get("packages", {})
    return [
        f"{short(system['system'])} {system['arch']}",
        str(system["usable_cores"] or _UNKNOWN),
        f"{_gigabytes(free)} of {_gigabytes(total)}",
        _gigabytes(system["folder"]["free"]),
        str(environment.get("python") or _UNKNOWN),
        str(packages.get("torch") or _UNKNOWN),
        device(environment),
    ]


def short(system: str) -> str:
    """The name of a system without its code name: Debian 12."""
    return re.sub(r" GNU/Linux|\s*\(.*?\)", "", system)


def device(environment: Mapping[str, Any]) -> str:
    """The best that its torch can use."""
    if "cuda" not in environment:
        return _UNKNOWN
    return "cuda" if environment["cuda"] else "mps" if environment["mps"] else "cpu"


def details(one: HostReport) -> list[str]:
    """What has no place in the table."""
    facts = one.facts
    lines = []
    if (system := facts.get("system")) is not None:
        what = [f"user {system['user']}", system["model"], system["cpu"]]
        what += [gpu["name"] for gpu in system["gpus"]]
        lines.append(", ".join(part for part in what if part))
    if (clock := facts.get("clock")) is not None:
        lines.append(f"clock {clock['offset_s']:+.2f} s, give or take {clock['uncertain_s']:.2f} s")
    if (score := facts.get("environment", {}).get("score")) is not None:
        lines.append(
            f"{score['device']}: {score['flops'] / 1e9:,.0f} GFLOP/s, "
            f"memory {score['memory_bytes_per_s'] / _GB:,.0f} GB/s"
        )
    for one_interface in facts.get("network", {}).get("interfaces", []):
        if one_interface["kind"] != "loopback":
            interface = NetworkInterface.from_json(one_interface)
            lines.append(f"{interface}: {', '.join(interface.addresses)}")
    return lines


def _links(reports: HostReports) -> Table:
    security = "through the mesh, with its encryption" if reports.machines else "on this machine"
    table = Table(title=f"links, measured {security}", **_PLAIN)
    for name in ("from", "to", "round trip", "bandwidth", "over"):
        table.add_column(name, overflow="fold", justify="left")
    for one in link_rows(reports):
        table.add_row(
            _shown(one["from"]),
            _shown(one["to"]),
            f"{one['rtt_s'] * 1e3:.2f} ms",
            f"{one['bytes_per_s'] * 8 / 1e6:,.1f} Mbit/s",
            _shown(one["over"] or _UNKNOWN),
        )
    return table


def link_rows(reports: HostReports) -> list[dict[str, Any]]:
    """What was measured, with the interface of the sender on the route that it has."""
    routes = {(route.source, route.to): route for route in reports.routes}
    rows = []
    for one in reports.links:
        # A link is dialled in one direction and used in both.
        route = routes.get((one["from"], one["to"]))
        back = routes.get((one["to"], one["from"]))
        place = reports.places.get(one["from"])
        local = (
            route.local if route is not None and route.is_open else back.address if back else None
        )
        interface = place.interface(local) if place is not None else None
        rows.append({**one, "over": str(interface) if interface is not None else None})
    return rows


def document(reports: HostReports, exit_code: int) -> dict[str, Any]:
    """Everything, as plain values."""
    hosts = [
        {
            "name": name,
            "ssh": reports.hosts[name].ssh,
            "addresses": list(reports.places[name].addresses) if name in reports.places else [],
            "status": one.status.to_json(),
            **one.facts,
        }
        for name, one in reports.by_host.items()
    ]
    return {
        "cluster": reports.config.cluster.name,
        "driver": {"python": platform.python_version(), "smolrun": version("smolrun")},
        "hosts": hosts,
        "routes": [asdict(route) for route in reports.routes],
        "links": link_rows(reports),
        "exit_code": exit_code,
    }


def _gigabytes(number: int | None) -> str:
    return _UNKNOWN if number is None else f"{number / _GB:.1f} GB"
