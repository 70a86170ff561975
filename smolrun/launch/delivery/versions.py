"""Do the libraries of the hosts fit together? One look at each, and one rule over all.

Source of the strictness: smolrun itself speaks the wire and writes the checkpoints, so it must be
equal; torch and transformers may differ, but then replicas may differ by rounding.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, requires, version
from platform import python_version
from typing import TYPE_CHECKING, Any

from smolrun.errors import HostError
from smolrun.launch.delivery.code import Deploy

if TYPE_CHECKING:
    from smolrun.launch.remote.machine import Machine

LIBRARIES = ("smolrun", "torch", "transformers")
_OLDEST_PYTHON = (3, 11)
_ANSWER_S = 60.0  # the first start of a Python from a cold card; nothing is imported

# Library -> version; None where it is not installed.
Versions = Mapping[str, str | None]


@dataclass(frozen=True)
class VersionReport:
    """What is wrong (host -> what, what to do), what may matter, and what is only a note."""

    errors: dict[str, tuple[str, str]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def own_versions() -> dict[str, str | None]:
    """Of the driver; imports nothing heavy."""
    return {"python": python_version(), **{name: _version(name) for name in LIBRARIES}}


def pythons(machine: Machine, deploy: Deploy) -> list[str]:
    """Which interpreters a worker may run by, the first that is there counts."""
    if machine.spec.python:
        return [machine.spec.python]
    name = environment_name(own_dependencies(), machine.spec.torch)
    ours = env_python(machine.workdir, name, machine.os)
    # The other ways come without task=setup: what the host has must do.
    return [ours] if deploy == "wheel" else [ours, machine.python]


def ask_versions(
    machine: Machine, deploy: Deploy, lib: str, *, cluster: str
) -> tuple[str, dict[str, str | None]]:
    """The worker's Python on this host (absolute) and its versions, our code being at `lib`.

    HostError where there is none, or it cannot run.
    """
    candidates = pythons(machine, deploy)
    answer = ask_environment(machine, candidates, LIBRARIES, path=lib)
    if answer.get("is_missing") and machine.spec.python:
        what = f"there is no Python {machine.spec.python}"
        raise HostError(machine.name, what, "correct python: in the cluster file")
    if answer.get("is_missing"):
        what = "there is no environment for smolrun there yet"
        raise HostError(machine.name, what, f"smolrun task=setup cluster={cluster}")
    if "error" in answer:
        what = f"its Python does not run: {answer['error']}"
        raise HostError(machine.name, what, f"smolrun task=doctor cluster={cluster}")
    return answer["executable"], {"python": answer["python"], **answer["packages"]}


def ask_environment(
    machine: Machine, pythons: Sequence[str], packages: Sequence[str], *, path: str = ""
) -> dict[str, Any]:
    """The answer of on_host/environment.py: versions of `packages`, without an import of torch.

    `path` comes before the installed packages.
    """
    request = {
        "pythons": pythons,
        "packages": packages,
        "path": path,
        "env": {},
        "torch": False,
        "device": "cpu",
        "measure": False,
        "timeout_s": _ANSWER_S,
    }
    return machine.call("environment", request, timeout_s=_ANSWER_S + 30.0)


def required_names(requirements: Iterable[str]) -> list[str]:
    """The bare names of requirement lines."""
    return [match[1] for line in requirements if (match := _NAME.match(line.strip()))]


def check_versions(
    driver: Versions, hosts: Mapping[str, Versions], *, cluster: str
) -> VersionReport:
    """Compares every host with the driver. A smolrun that differs, a Python that is too old and a
    library that is missing are errors; another minor version of a library is a warning."""
    checked = VersionReport()
    for host, found in hosts.items():
        if error := _error(driver, found, cluster):
            checked.errors[host] = error
            continue
        for name in ("torch", "transformers"):
            if _minor(found[name]) != _minor(driver[name]):
                checked.warnings.append(
                    f"{host} has {name} {found[name]}, the driver {driver[name]}: results may "
                    "differ by rounding"
                )
        if _minor(found["python"]) != _minor(driver["python"]):
            checked.notes.append(
                f"{host} runs Python {found['python']}, the driver {driver['python']}"
            )
    return checked


def _error(driver: Versions, found: Versions, cluster: str) -> tuple[str, str] | None:
    """What is wrong with a host's versions, and what to do."""
    set_up = f"smolrun task=setup cluster={cluster}"
    python = found["python"] or "0"
    numbers = [int(part) for part in python.split(".")[:2] if part.isdecimal() and len(part) < 5]
    if tuple(numbers) < _OLDEST_PYTHON:
        oldest = ".".join(map(str, _OLDEST_PYTHON))
        return f"its Python is {python}, smolrun needs {oldest}", set_up
    missing = [name for name in LIBRARIES if not found[name]]
    if missing:
        return f"its Python has no {' and no '.join(missing)}", set_up
    if found["smolrun"] != driver["smolrun"]:
        return (
            f"it has smolrun {found['smolrun']}, the driver {driver['smolrun']}",
            "install the same there, or let cluster.deploy=wheel bring it",
        )
    return None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _minor(number: str | None) -> list[str]:
    return (number or "").split(".")[:2]


# The Python that task=setup installs on hosts: torch has wheels of it for every system we know.
PYTHON = "3.12"
_EXTRA = re.compile(r"\bextra\s*==")
# Used only on the machine where one types: matplotlib draws comparisons, pip fetches data.
_ONLY_HERE = re.compile(r"(matplotlib|pip)\b")
_NAME = re.compile(r"([A-Za-z0-9._-]+)(?:\[[^\]]*\])?")


def own_dependencies() -> list[str]:
    """The requirement lines of the installed smolrun that hosts need, without those of its
    extras."""
    lines = requires("smolrun") or []
    return [line for line in lines if not (_EXTRA.search(line) or _ONLY_HERE.match(line))]


def environment_name(dependencies: Iterable[str], torch: str = "auto") -> str:
    """The name of the environment with these requirement lines and this torch build.

    The order of the lines, and of the bounds in a line, means nothing. Which Python it has is the
    host's matter: any that smolrun takes is fine.
    """
    lines = sorted({_plain(line) for line in dependencies})
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    return f"{torch}-{digest[:12]}"


def env_python(workdir: str, name: str, os: str) -> str:
    """Its interpreter, on a host of that system (linux, darwin, windows)."""
    program = "Scripts/python.exe" if os == "windows" else "bin/python"
    return f"{workdir}/envs/{name}/{program}"


def _plain(line: str) -> str:
    """A requirement line as every build tool would have to write it: bounds sorted, no spaces."""
    text, _, marker = line.partition(";")
    text = "".join(text.split())
    name = match[0] if (match := _NAME.match(text)) else ""
    bounds = ",".join(sorted(text[len(name) :].strip("()").split(",")))
    return f"{name.lower()}{bounds}" + (f";{' '.join(marker.split())}" if marker else "")
