"""doctor.write=true: what was found goes into the cluster file, which stays the user's own.

Only what is missing or wrong is written. The file before is kept beside it as NAME.yaml.bak.
"""

from __future__ import annotations

import difflib
import ipaddress
import json
import platform
import re
from collections.abc import Callable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from smolrun.config import RunConfig, redacted
from smolrun.config.cluster import HostConfig as HostConfig
from smolrun.driver.cluster_file import changed, host_names
from smolrun.driver.doctor_hosts import HostReports
from smolrun.driver.doctor_text import device
from smolrun.errors import ConfigError
from smolrun.files import atomic_write
from smolrun.launch.doctor.host_report import HostReport
from smolrun.launch.doctor.links import best_addresses
from smolrun.launch.machine_memory import default_limit
from smolrun.launch.on_host.prelude import user
from smolrun.sanitize import without_credentials
from smolrun.tracking.run_folder import OUTPUTS

_FOLDER = Path("conf") / "cluster"
_GB = 2**30
_ADDRESS = re.compile(r"[0-9a-fA-F.:]{7,}")
_NOISE = 0.1


def write(reports: HostReports, say: Callable[[str], None]) -> None:
    """Changes the cluster file and shows what changed; ConfigError where there is none."""
    if reports.config.cluster.hosts is None:
        say("doctor.write=true: this cluster lists no hosts, there is nothing to write")
        return
    name = reports.config.cluster.name
    file, text = find(name, list(reports.hosts))
    new = changed(text, news(reports))
    if new == text:
        say(f"{file}: nothing to change")
        return
    for line in difflib.unified_diff(
        text.splitlines(), new.splitlines(), str(file), f"{file} (new)", lineterm="", n=0
    ):
        say(line)
    _write(file, new)
    say(f"{file} is written")


def find(name: str, hosts: list[str]) -> tuple[Path, str]:
    """The user's file of that choice and its text; a shipped one is to be copied to there."""
    own = _FOLDER / f"{name}.yaml"
    shipped = files("smolrun.conf").joinpath("cluster", f"{name}.yaml")
    for file in (own, shipped):
        if file.is_file():
            text = file.read_text(encoding="utf-8")
            if host_names(text) == hosts:
                return own, text
    raise ConfigError(
        f"doctor.write=true: {own} does not list the hosts of this run ({', '.join(hosts)}); run "
        "it in the folder that has it"
    )


def write_report(document: Mapping[str, Any], config: RunConfig) -> Path:
    """outputs/doctor-report.md: what the doctor found and the cluster, for a public issue.

    Without credentials of URLs, values of `env:`, names of users and of computers, and addresses
    of the internet."""
    cluster = redacted(config)["cluster"]
    names = {user() or "", Path.home().name, platform.node()}
    for host in cluster["hosts"] or []:
        host["env"] = dict.fromkeys(host["env"], "***")
        names.add((host["ssh"] or "").rpartition("@")[0])
    for host in document["hosts"]:
        names |= {str(host.get("system", {}).get(key) or "") for key in ("user", "hostname")}
    text = json.dumps({**document, "config": cluster}, indent=1, default=str)
    text = _ADDRESS.sub(_private, without_credentials(text))
    for name in sorted(names - {""}, key=len, reverse=True):
        text = re.sub(rf"(?<![\w.-]){re.escape(name)}(?![\w-])", "***", text)
    file = OUTPUTS / "doctor-report.md"
    _write(file, f"smolrun task=doctor\n\n```json\n{text}\n```\n")
    return file


def _private(found: re.Match[str]) -> str:
    try:
        return "***" if ipaddress.ip_address(found[0]).is_global else found[0]
    except ValueError:  # a number, a time, a hash
        return found[0]


def news(reports: HostReports) -> dict[str, dict[str, Any]]:
    """Host -> key -> value, for what the file does not say or says wrongly."""
    speeds = _speeds(reports)
    found = {}
    for name, one in reports.by_host.items():
        if one.is_reachable:
            best = best_addresses(reports.places, name, reports.reach) if reports.reach else []
            keys = _of_host(reports.hosts[name], one, speeds.get(name), best)
            found[name] = {key: value for key, value in keys.items() if value is not None}
    return {name: keys for name, keys in found.items() if keys}


def _of_host(
    host: HostConfig, one: HostReport, speed: float | None, best: list[str]
) -> dict[str, Any]:
    system, environment = one.facts["system"], one.facts.get("environment", {})
    total = system["memory_total"]
    keys: dict[str, Any] = {"os": system["os"] if host.os == "auto" else None}
    if host.device == "auto" and "cuda" in environment:
        keys["device"] = device(environment)
    if total is not None and (host.memory_gb is None or host.memory_gb * _GB > total * 1.1):
        keys["memory_gb"] = int(default_limit(total) / _GB * 10) / 10
    # auto is measured in the run, which is more accurate than any trial.
    if speed is not None and host.speed != "auto" and _differ(speed, host.speed):
        keys["speed"] = speed
    keys["address"] = _address(host, best)
    return keys


def _address(host: HostConfig, best: list[str]) -> str | list[str] | None:
    """The best address first, and then what the user wrote."""
    if not best:
        return None
    if host.address is None:
        return best[0]
    before = [host.address] if isinstance(host.address, str) else list(host.address)
    wanted = [best[0], *(address for address in before if address != best[0])]
    # A name stands for whatever address it has; it is not replaced by one that it may stand for.
    if wanted == before or not _is_number(before[0]):
        return None
    return wanted[0] if len(wanted) == 1 else wanted


def _is_number(address: str) -> bool:
    return ":" in address or address.replace(".", "").isdigit()


def _differ(measured: float, written: float) -> bool:
    """By more than two trials on one machine do."""
    return abs(measured - written) > _NOISE * written


def _speeds(reports: HostReports) -> dict[str, float]:
    """Of each rank, relative to the fastest, by products and memory together (their geometric
    mean). Empty where some host could not be measured: shares need all of them."""
    scores = {}
    for name, one in reports.by_host.items():
        score = one.facts.get("environment", {}).get("score")
        if score is None:
            return {}
        whole = (score["flops"] * score["memory_bytes_per_s"]) ** 0.5
        scores[name] = whole / reports.hosts[name].ranks
    fastest = max(scores.values(), default=1.0)
    return {name: round(score / fastest, 2) for name, score in scores.items()}


def _write(file: Path, text: str) -> None:
    """Keep the old file as FILE.bak and replace it; ConfigError where the disk refuses."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.is_file():
            file.with_name(f"{file.name}.bak").write_bytes(file.read_bytes())
        atomic_write(file, text.encode())
    except OSError as error:
        raise ConfigError(f"cannot write {file.absolute()}: {error}") from error
