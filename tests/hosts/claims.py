"""Which labs there are on this box: a number for a new one, and an end to those left by the dead.

A lab belongs to the process that made it. Its number is a file; whoever starts a lab first removes
the labs whose process is gone, and no other.
"""

from __future__ import annotations

import ipaddress
import json
import os
import re
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.hosts.network import LabError, Network, command

CLAIMS = Path("/run/smolrun-lab")
FORWARDING = Path("/proc/sys/net/ipv4/ip_forward")
MOST_LABS = 1024


@contextmanager
def _locked() -> Iterator[None]:
    import fcntl  # not on Windows, where tests still import this module to skip

    CLAIMS.mkdir(exist_ok=True)
    with (CLAIMS / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def claim() -> Network:
    """A network that nobody on this box uses, ours from now on; what the dead left is removed."""
    with _locked():
        for file in CLAIMS.glob("*.json"):
            if not is_alive(json.loads(file.read_text())):
                _remove(Network(int(file.stem)))
        taken = _subnets_in_use()
        for number in range(MOST_LABS):
            network = Network(number)
            subnet = ipaddress.ip_network(network.subnet)
            if not _file(network).exists() and not any(subnet.overlaps(one) for one in taken):
                _write(network, internet=False)
                return network
    raise LabError(f"no network is free among {MOST_LABS}; see {CLAIMS}")


def release(network: Network) -> None:
    """Remove all that the lab has on this box, processes too."""
    with _locked():
        _remove(network)


def let_out(network: Network) -> None:
    """Its hosts reach whatever the box reaches. The box forwards packets while such a lab lives."""
    with _locked():
        if FORWARDING.read_text().strip() == "0":
            (CLAIMS / "forwards").touch()  # we switch it on, so we switch it off
            FORWARDING.write_text("1")
        _write(network, internet=True)
    source = f"ip saddr {network.subnet}"
    hook = "type nat hook postrouting priority srcnat;"
    chain = f'chain out {{ {hook} {source} oifname != "{network.name}" masquerade; }}'
    command("nft", "-f", "-", data=f"table ip {network.name} {{ {chain}; }}\n")


def processes_in(namespace: str) -> list[int]:
    """Pids of all processes of a network namespace."""
    done = command("ip", "netns", "pids", namespace)
    return [int(pid) for pid in done.split()]


def _file(network: Network) -> Path:
    return CLAIMS / f"{network.number}.json"


def _write(network: Network, *, internet: bool) -> None:
    pid = os.getpid()
    record = {"pid": pid, "started": started(pid), "internet": internet}
    _file(network).write_text(json.dumps(record))


def is_alive(record: dict[str, int | None]) -> bool:
    """Whether the process that made a claim is still there."""
    return started(record["pid"]) == record["started"]


def started(pid: int) -> int | None:
    """When a process began, in ticks since the start of the box: pids come again, this does not."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return int(text.rpartition(")")[2].split()[19])


def _subnets_in_use() -> list[ipaddress.IPv4Network]:
    routes = command("ip", "-4", "route", "show", "table", "all")
    # Of each line the target. "default" is no number and covers all.
    found = re.findall(r"^(?:\w+ )??(\d[\d.]+(?:/\d+)?) ", routes, re.MULTILINE)
    return [ipaddress.IPv4Network(target, strict=False) for target in found]


def _remove(network: Network) -> None:
    present = [line.split()[0] for line in command("ip", "netns", "list").splitlines()]
    ours = [name for name in present if name.startswith(f"{network.name}-")]
    for name in ours:
        _end_processes(name)
    for name in ours:
        command("ip", "netns", "delete", name)
    if Path(f"/sys/class/net/{network.name}").exists():  # it may have gone with the bridge's end
        try:
            command("ip", "link", "delete", network.name)
        except LabError:
            assert not Path(f"/sys/class/net/{network.name}").exists()
    try:
        was_out = json.loads(_file(network).read_text())["internet"]
    except (OSError, ValueError):
        was_out = False
    if was_out:
        _shut_in(network)
    _file(network).unlink(missing_ok=True)


def _end_processes(namespace: str, timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while pids := processes_in(namespace):
        if time.monotonic() > deadline:
            raise LabError(f"processes {pids} of {namespace} do not end")
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        time.sleep(0.01)


def _shut_in(network: Network) -> None:
    command("nft", "-f", "-", data=f"table ip {network.name}\ndelete table ip {network.name}\n")
    records = [json.loads(file.read_text()) for file in CLAIMS.glob("*.json")]
    if sum(record["internet"] for record in records) == 1 and (CLAIMS / "forwards").exists():
        FORWARDING.write_text("0")
        (CLAIMS / "forwards").unlink()
