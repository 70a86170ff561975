"""task=init: asks for the machines of a home cluster and writes conf/cluster/home.yaml.

Answers may come from a pipe as well. Ends without a trace where they end early. Before it writes,
it looks whether the hosts answer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from smolrun.config import RunConfig
from smolrun.driver.cluster_file import written
from smolrun.errors import ConfigError, HostError
from smolrun.files import atomic_write
from smolrun.launch.run_on_all import run_on_all
from smolrun.launch.supervisor_events import EXIT_DONE, EXIT_STOPPED
from smolrun.sanitize import echo

T = TypeVar("T")

_TRY_S = 5.0  # a machine that sleeps may take longer, and is asked about

FILE = Path("conf") / "cluster" / "home.yaml"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", re.ASCII)
_ADDRESS = re.compile(r"[A-Za-z0-9\[][A-Za-z0-9._:%\]-]{0,252}", re.ASCII)
_SSH = re.compile(rf"(?:[A-Za-z0-9_][A-Za-z0-9._-]*@)?{_ADDRESS.pattern}", re.ASCII)
_KEYS = {
    "name": "what logs and tables call the machine",
    "ssh": "how this machine reaches it: user@address, or a Host of your ~/.ssh/config",
    "address": "its address for the other machines, on the fastest network they share",
    "ranks": "processes to start there, usually one per GPU, or one",
    "memory_gb": "what a run may use of its memory",
}


def drive(config: RunConfig) -> int:
    """Asks and writes; exit code 0, or 130 where the answers end before the last question."""
    try:
        if FILE.exists() and not _yes(f"{FILE} is there already; write a new one?"):
            echo("nothing was changed")
            return EXIT_DONE
        hosts = _hosts()
        ranks = None if hosts else _ask("processes to start on this machine (Enter = auto)", _count)
        missing = _try([host for host in hosts if "ssh" in host])
        silent = f"{', '.join(missing)} did not answer"
        if missing and not _yes(f"{silent}; write the file all the same?"):
            echo("nothing was written")
            return EXIT_STOPPED
    except (EOFError, KeyboardInterrupt):
        echo("\nstopped; nothing was written")
        return EXIT_STOPPED
    _write(text(hosts, ranks))
    echo(f"{FILE} is written; change it with any editor")
    others = [host["name"] for host in hosts if "ssh" in host]
    if others:
        echo(
            "next, once:  smolrun task=trust cluster=home    (look at their SSH keys)\n"
            "             smolrun task=setup cluster=home    (Python and torch on them)\n"
            "             smolrun task=doctor cluster=home   (is all well?)\n"
            "then:        smolrun cluster=home"
        )
    else:
        echo("next: smolrun cluster=home")
    return EXIT_DONE


def text(hosts: list[dict[str, Any]], ranks: int | None) -> str:
    """The yaml file of these hosts, or, without any, of so many ranks here (None = auto)."""
    if not hosts:
        amount = "auto" if ranks is None else ranks
        return (
            "# This machine at home\n"
            "name: home\n"
            f"ranks: {amount}    # processes on this machine; auto = 2, or 1 for algorithm=single\n"
        )
    used = [key for key in _KEYS if any(key in host for host in hosts)]
    lines = ["# The machines at home", "name: home", "hosts:"]
    lines += [f"  # {key + ':':<11}{_KEYS[key]}" for key in used]
    for host in hosts:
        pairs = ", ".join(f"{key}: {written(host[key])}" for key in _KEYS if key in host)
        lines.append(f"  - {{{pairs}}}")
    lines.append("# More keys of a machine (device, python, torch...): docs/configuration.md")
    return "\n".join(lines) + "\n"


def _hosts() -> list[dict[str, Any]]:
    """The answers, one dictionary per machine; empty for this machine alone."""
    echo(
        "Which machines shall work together? Name them one by one, the fastest first, this one too"
        " if it\nis to help. Just Enter ends the list; an empty list means this machine alone."
    )
    hosts = list(_each_host())
    for host in hosts if any("ssh" in host for host in hosts) else ():
        while "ssh" not in host and host.get("address") is None:
            host["address"] = _ask(f"address of {host['name']} for the other machines", _here)
    return hosts


def _try(hosts: list[dict[str, Any]]) -> list[str]:
    """Looks for the SSH server of each host, all at once, without a login; says what was found and
    returns the names of those that do not answer."""
    if not hosts:
        return []
    from smolrun.launch.remote.machine import HostSpec
    from smolrun.launch.ssh.connect import scan

    def why_not(spec: HostSpec) -> str:
        try:
            last = scan(spec)[-1]
        except HostError as error:
            return error.what
        return last.why if last.state == "unreachable" else ""

    specs = {host["name"]: HostSpec(host["name"], host["ssh"], timeout_s=_TRY_S) for host in hosts}
    found = run_on_all(specs, why_not, "init")
    for name, why in found.items():
        echo(f"{name}: {why or 'its SSH server answers'}")
    return [name for name, why in found.items() if why]


def _each_host() -> Iterator[dict[str, Any]]:
    names: list[str] = []

    def is_new(answer: str) -> str:
        if answer in names:
            raise ValueError(f"there is a machine called {answer} already")
        return _matches(_NAME, "letters, digits, dot, dash and underscore")(answer)

    while name := _ask(f"name of machine {len(names) + 1} (Enter = no more)", is_new):
        names.append(name)
        host: dict[str, Any] = {"name": name}
        host["ssh"] = _ask(
            "  its SSH address, user@address or an alias (Enter = it is this machine)",
            _matches(_SSH, "an address such as mini.local, pi@192.168.1.11 or an alias"),
        )
        if host["ssh"]:
            host["address"] = _ask("  its address for the other machines (Enter = the same)", _here)
        host["ranks"] = _ask("  processes to start there (Enter = 1)", _count)
        host["memory_gb"] = _ask("  memory it may use, in GB (Enter = all but 5)", _gigabytes)
        yield {key: value for key, value in host.items() if value is not None}


def _ask(question: str, read: Callable[[str], T]) -> T | None:
    """The answer, None for just Enter. What `read` refuses by ValueError is asked again."""
    while True:
        answer = input(f"{question}: ").strip()
        if not answer:
            return None
        try:
            return read(answer)
        except ValueError as error:
            echo(f"  {answer!r} does not do: {error}")


def _yes(question: str) -> bool:
    return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")


def _matches(pattern: re.Pattern[str], allowed: str) -> Callable[[str], str]:
    def read(answer: str) -> str:
        if not pattern.fullmatch(answer):
            raise ValueError(f"allowed: {allowed}")
        return answer

    return read


_here = _matches(_ADDRESS, "an address such as 192.168.1.11 or mini.local")


def _count(answer: str) -> int:
    if not answer.isascii() or not answer.isdigit() or not 1 <= int(answer[:5]) <= 1024:
        raise ValueError("allowed: a whole number from 1 to 1024")
    return int(answer)


def _gigabytes(answer: str) -> float:
    try:
        number = float(answer)
    except ValueError:
        number = 0.0
    if not 0 < number < 1e6:
        raise ValueError("allowed: a number such as 16 or 7.5")
    return int(number) if number == int(number) else number


def _write(content: str) -> None:
    """Whole or not at all; ConfigError where the disk refuses."""
    try:
        FILE.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(FILE, content.encode())
    except OSError as error:
        raise ConfigError(f"cannot write {FILE.absolute()}: {error}") from error
