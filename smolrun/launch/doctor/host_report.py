"""Probes one host for `task=doctor`, by scripts of on_host/, and derives findings.

    probe_host(machine, orders) -> HostReport      facts of the host, and findings

A script that fails becomes a finding; the others still run.
"""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from smolrun.errors import HostError
from smolrun.launch.delivery.versions import required_names
from smolrun.launch.doctor import findings
from smolrun.launch.doctor.findings import Finding, HostStatus, status
from smolrun.launch.remote.machine import Machine

_IMPORT_S = 180.0  # torch, on a Pi with a slow card


@dataclass(frozen=True)
class HostRequirements:
    """What a run would use on one host.

    `is_given`: the user named the Python. `smolrun`: the version it must have, None if we bring it.
    `setup`: the command that makes hosts ready. `measure`: how fast it computes, too.
    """

    pythons: Sequence[str]
    requirements: Sequence[str]
    is_given: bool
    smolrun: str | None
    device: str
    memory_gb: float | None
    setup: str
    env: dict[str, str] = field(default_factory=dict)
    path: str = ""
    measure: bool = False


@dataclass
class HostReport:
    """One host: `facts` by question, `findings` so far. `ssh` compares with the system's own."""

    name: str
    facts: dict[str, Any] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    @property
    def status(self) -> HostStatus:
        """What all findings together make of it."""
        return status(self.findings)

    @property
    def is_reachable(self) -> bool:
        """Whether it answered anything at all."""
        return "system" in self.facts


def probe_host(machine: ScriptRunner, orders: HostRequirements) -> HostReport:
    """All there is to know of one host; blocks for some seconds, while its torch is imported."""
    found = HostReport(machine.name)
    for what, request in _questions(machine, orders):
        began = time.time(), time.monotonic()
        timeout_s = _IMPORT_S + 30.0 if what == "environment" else 60.0
        try:
            answer = machine.call(what, request, timeout_s)
        except HostError as error:
            found.findings.append(Finding.of(error))
            continue
        if what == "clock":
            answer = _offset(answer, *began)
            # The shorter the route, the surer the answer.
            if found.facts.get(what, answer)["uncertain_s"] < answer["uncertain_s"]:
                continue
        found.facts[what] = answer
    found.findings += _findings(found.facts, orders, machine.os)
    return found


def _questions(machine: ScriptRunner, orders: HostRequirements) -> list[tuple[str, dict[str, Any]]]:
    environment = {
        "pythons": list(orders.pythons),
        "packages": ["smolrun", *required_names(orders.requirements)],
        "torch": True,
        "device": orders.device,
        "measure": orders.measure,
        "path": orders.path,
        "env": orders.env,
        "timeout_s": _IMPORT_S,
    }
    return [
        ("clock", {}),
        ("clock", {}),
        ("system", {"workdir": machine.workdir}),
        ("network", {}),
        ("power", {}),
        ("firewall", {}),
        ("environment", environment),
    ]


def _offset(answer: dict[str, Any], began_at: float, began: float) -> dict[str, Any]:
    """How far its clock is ahead of ours: it was read somewhere between question and answer."""
    half = (time.monotonic() - began) / 2
    return {"offset_s": answer["time_s"] - (began_at + half), "uncertain_s": half}


def _findings(facts: dict[str, Any], orders: HostRequirements, os: str) -> list[Finding]:
    found: list[Finding] = []
    if "system" in facts:
        found += findings.of_system(facts["system"], orders.memory_gb)
    if "environment" in facts:
        environment = facts["environment"]
        found += findings.of_environment(
            environment,
            needed=required_names(orders.requirements),
            smolrun=orders.smolrun,
            is_given=orders.is_given,
            setup=orders.setup,
        )
        gpus = facts.get("system", {}).get("gpus", [])
        found += findings.of_device(environment, gpus, orders.device, orders.setup)
    if "clock" in facts:
        found += findings.of_clock(**facts["clock"], os=os)
    if "power" in facts:
        found += findings.of_sleep(facts["power"]["sleep"], os)
        found += findings.of_throttle(facts["power"]["throttle"])
    return found


class LocalMachine:
    """Answers what a Machine answers, as far as questions go."""

    def __init__(self, name: str, workdir: Path) -> None:
        self.name = name
        self.os = platform.system().lower()
        self.python = sys.executable
        self.home = Path.home().as_posix()
        self.workdir = workdir.as_posix()

    def call(self, script: str, request: dict[str, Any], timeout_s: float = 60.0) -> dict[str, Any]:
        """What on_host/<script>.py answers here; its own deadlines hold."""
        try:
            main = import_module(f"smolrun.launch.on_host.{script}").main
            reply: dict[str, Any] = main(request)
        except (OSError, ValueError) as error:
            raise HostError(self.name, f"{script} failed: {error}") from error
        return reply

    def close(self) -> None:
        """Nothing to end."""


ScriptRunner = Machine | LocalMachine  # what answers the scripts of on_host/
