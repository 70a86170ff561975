"""The hosts of task=doctor: how each is reached, what a run needs there, and its report."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smolrun.config import RunConfig, ranks
from smolrun.config.cluster import HostConfig as HostConfig
from smolrun.driver.fleet import Fleet, host_specs
from smolrun.errors import HostError, LoginFailed
from smolrun.launch.delivery.versions import own_dependencies
from smolrun.launch.doctor import findings, links, reachability
from smolrun.launch.doctor.findings import Finding
from smolrun.launch.doctor.host_report import (
    HostReport,
    HostRequirements,
    LocalMachine,
    ScriptRunner,
    probe_host,
)
from smolrun.launch.doctor.reachability import probe_reachability
from smolrun.launch.run_on_all import run_on_all

if TYPE_CHECKING:
    from smolrun.launch.remote.machine import HostSpec, Machine

_THIS_MACHINE = "local"


@dataclass
class HostReports:
    """All hosts of a cluster. `runners` are those that answered; `machines` those over SSH."""

    config: RunConfig
    hosts: dict[str, HostConfig]
    specs: dict[str, HostSpec]
    machines: dict[str, Machine] = field(default_factory=dict)
    runners: dict[str, ScriptRunner] = field(default_factory=dict)
    by_host: dict[str, HostReport] = field(default_factory=dict)
    places: dict[str, links.HostAddresses] = field(default_factory=dict)
    routes: list[links.Route] = field(default_factory=list)
    reach: dict[str, dict[str, Any]] = field(default_factory=dict)
    links: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def of(cls, config: RunConfig) -> HostReports:
        """Those of a cluster; this machine alone where it lists none."""
        hosts = {
            host.name: host for host in config.cluster.hosts or [HostConfig(name=_THIS_MACHINE)]
        }
        return cls(config, hosts, {spec.name: spec for spec in host_specs(config)})

    @property
    def reachable(self) -> list[str]:
        """Those that answered."""
        return [name for name in self.hosts if self.by_host[name].is_reachable]

    def probe_host(self) -> None:
        """Asks all at the same time."""
        self.by_host = run_on_all({name: name for name in self.hosts}, self._probe_host, "doctor")
        torches = {
            name: one.facts.get("environment", {}).get("packages", {}).get("torch")
            for name, one in self.by_host.items()
        }
        self._add(findings.of_versions(torches))

    def _probe_host(self, name: str) -> HostReport:
        try:
            machine = self._reached(name)
        except HostError as error:
            # A comparison with the system's own ssh only says something about a failed login.
            more = self._compared(name) if isinstance(error, LoginFailed) else None
            return HostReport(name, {}, [Finding.of(error), *filter(None, [more])])
        self.runners[name] = machine
        return probe_host(machine, self._orders(name))

    def _reached(self, name: str) -> ScriptRunner:
        if name not in self.specs:
            return LocalMachine(name, Path.cwd())
        from smolrun.launch.ssh.connect import open_machine

        machine = self.machines[name] = open_machine(self.specs[name])
        return machine

    def _compared(self, name: str) -> Finding | None:
        from smolrun.launch.doctor.system_ssh import compared

        return compared(self.specs[name])

    def _orders(self, name: str) -> HostRequirements:
        host, cluster = self.hosts[name], self.config.cluster
        machine = self.machines.get(name)
        if machine is None:
            pythons, is_given = [self.runners[name].python], True
        else:
            from smolrun.launch.delivery.versions import pythons as of

            pythons, is_given = of(machine, cluster.deploy), machine.spec.python is not None
        return HostRequirements(
            pythons=pythons,
            requirements=own_dependencies(),
            is_given=is_given,
            smolrun=version("smolrun") if cluster.deploy == "none" and machine else None,
            device=cluster.device if host.device == "auto" else host.device,
            memory_gb=host.memory_gb,
            setup=f"smolrun task=setup cluster={cluster.name}",
            env=dict(host.env) if machine else {},
            measure=self.config.doctor.write,
        )

    def probe_routes(self) -> None:
        """Who reaches whom, and over which of their networks."""
        plans = {plan.host: plan for plan in ranks(with_hosts(self.config, self.reachable))}
        fleet = Fleet(self.config, self.machines)
        for name in self.reachable:
            facts = self.by_host[name].facts
            rows = facts.get("network", {}).get("interfaces", [])
            try:
                addresses = fleet.addresses(plans[name])
            except HostError as error:
                self._add({name: [Finding.of(error)]})
                addresses = []
            interfaces = tuple(links.NetworkInterface.from_json(one) for one in rows)
            self.places[name] = links.HostAddresses(name, tuple(addresses), interfaces)
        asked = {name: self.runners[name] for name in self.reachable}
        ports = {name: plans[name].ports for name in asked}
        self.reach = probe_reachability(asked, self.places, ports)
        self.routes = links.routes(self.places, self.reach)
        firewalls = {name: self._firewall(name, ports[name]) for name in asked}
        self._add(reachability.unreachable_findings(self.places, self.routes, firewalls))
        self._add(
            reachability.network_findings(
                links.faster_networks(self.places, self.routes, self.reach)
            )
        )

    def _firewall(self, name: str, ports: tuple[int, int] | None) -> reachability.HostFirewall:
        facts, machine = self.by_host[name].facts, self.runners[name]
        python = facts.get("environment", {}).get("executable") or "PYTHON"
        return reachability.HostFirewall(facts.get("firewall", {}), machine.os, python, ports)

    def _add(self, more: dict[str, list[Finding]]) -> None:
        for name, found in more.items():
            self.by_host[name].findings += found

    def fit_for_mesh(self) -> list[str]:
        """The hosts that a mesh can be made of."""
        fit = [n for n in self.hosts if self.by_host[n].status.state != "cannot run"]
        return fit if len(fit) > 1 or self.config.cluster.hosts is None else []

    def close(self) -> None:
        """Ends all connections."""
        for machine in self.runners.values():
            with contextlib.suppress(Exception):
                machine.close()


def with_hosts(config: RunConfig, names: Sequence[str]) -> RunConfig:
    """The same run on these hosts, one rank on each; on this machine alone: two."""
    cluster = config.cluster
    if cluster.hosts is None:
        changed: dict[str, Any] = {"ranks": 2}
    else:
        chosen = [host for host in cluster.hosts if host.name in names]
        changed = {"hosts": [host.model_copy(update={"ranks": 1}) for host in chosen]}
    return config.model_copy(update={"cluster": cluster.model_copy(update=changed)})
