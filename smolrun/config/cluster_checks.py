"""Rules about the machines of a run, as checks.py has them for everything else.

Only what can be known without asking a machine: each yields problem lines, and starts nothing.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

from smolrun.config.cluster import ClusterConfig
from smolrun.config.plan import addresses
from smolrun.config.settings import Mesh, TcpMeshConfig, TorchMeshConfig
from smolrun.config.suggest import problem

_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)
_HIGHEST_PORT = 65535


def hosts_are_distinct(*, cluster: ClusterConfig) -> Iterator[str]:
    """Two hosts of one name could not be distinguished in logs, and one machine is one host."""
    hosts = cluster.hosts or []
    for name, count in Counter(host.name for host in hosts).items():
        if count > 1:
            what = f"{count} hosts have this name"
            yield problem("cluster.hosts", name, what, allowed="names that differ")
    reached = Counter(host.ssh for host in hosts if host.ssh is not None)
    placed = Counter(
        address for host in hosts if host.ssh is not None for address in addresses(host)
    )
    for what, counts in (("ssh", reached), ("address", placed)):
        for value, count in counts.items():
            if count > 1:
                named = ", ".join(
                    host.name for host in hosts if value in (host.ssh, *addresses(host))
                )
                yield problem(
                    "cluster.hosts",
                    value,
                    f"{count} hosts have this {what} ({named})",
                    allowed="one host per machine; `ranks: 2` starts two processes on it",
                )
    if cluster.hosts is not None and cluster.ranks != "auto":
        what = "has no meaning beside cluster.hosts"
        yield problem("cluster.ranks", cluster.ranks, what, allowed="auto, and `ranks` per host")


def hosts_can_meet(*, cluster: ClusterConfig) -> Iterator[str]:
    """Beside machines elsewhere, this one needs an address that they can reach."""
    hosts = cluster.hosts or []
    if not any(host.ssh is not None for host in hosts):
        return  # machines that join tell this one its address
    for index, host in enumerate(hosts):
        if host.is_here and (host.address is None or _is_loopback(addresses(host)[0])):
            yield problem(
                f"cluster.hosts[{index}].address",
                host.address,
                f"{host.name} is this machine, and the other hosts must reach it",
                allowed="its address in their network",
            )


def ssh_is_a_target(*, cluster: ClusterConfig) -> Iterator[str]:
    """What begins with a dash would be read as an option by programs that are given it."""
    for index, host in enumerate(cluster.hosts or []):
        for key, value in (("name", host.name), ("ssh", host.ssh or "")):
            if value.startswith("-") or any(c.isspace() or not c.isprintable() for c in value):
                yield problem(
                    f"cluster.hosts[{index}].{key}",
                    value,
                    "begins with a dash, or has a space in it",
                    allowed="a name, or user@address for ssh",
                )


def keys_mean_something(*, cluster: ClusterConfig) -> Iterator[str]:
    """Ranks of this machine run in the Python and the folder that the driver is in."""
    for index, host in enumerate(cluster.hosts or []):
        for key, value in (("python", host.python), ("workdir", host.workdir), ("env", host.env)):
            if host.ssh is None and value:
                what = f"{host.name} is this machine, which runs its ranks as it runs you"
                if host.nearby:
                    what = f"{host.name} joins, and runs its ranks as it runs its own smolrun"
                allowed = "none of it, or its `ssh:` to be reached as another machine"
                yield problem(f"cluster.hosts[{index}].{key}", value, what, allowed=allowed)


def env_is_sound(*, cluster: ClusterConfig) -> Iterator[str]:
    """Names that every shell can set, and values of one line."""
    for index, host in enumerate(cluster.hosts or []):
        for name, value in host.env.items():
            if not _ENV_NAME.fullmatch(name) or any(c in value for c in "\n\r\0"):
                yield problem(
                    f"cluster.hosts[{index}].env.{name}",
                    value,
                    "cannot be set as an environment variable",
                    allowed="a name of letters, digits and _, and a value of one line",
                )


def ports_suffice(*, cluster: ClusterConfig) -> Iterator[str]:
    """Every rank of a host listens on a port of its own."""
    ranges = [("cluster.ports", cluster.ports, 1)]
    for index, host in enumerate(cluster.hosts or []):
        where = "cluster.ports" if host.ports is None else f"cluster.hosts[{index}].ports"
        ranges.append((where, host.ports or cluster.ports, host.ranks))
    for where, ports, needed in dict.fromkeys(ranges):
        if ports is None:
            continue
        first, last = (int(number) for number in ports.split("-"))
        if not (1024 <= first <= last <= _HIGHEST_PORT and last - first + 1 >= needed):
            allowed = f"at least {needed} of the ports 1024-{_HIGHEST_PORT}, as 40000-40100"
            yield problem(where, ports, "cannot be listened on", allowed=allowed)


def named_hosts_exist(*, cluster: ClusterConfig, driver: str | None) -> Iterator[str]:
    """`driver` is one of the hosts, and it is another machine."""
    reached = [host.name for host in cluster.hosts or [] if host.ssh is not None]
    if driver is not None and driver not in reached:
        allowed = ", ".join(reached) if reached else "null: this cluster has no other machine"
        yield problem("driver", driver, f"no host of cluster={cluster.name}", allowed=allowed)


def restart_can_be(*, cluster: ClusterConfig, world_size: int) -> Iterator[str]:
    """Fewer hosts than there are can be enough, more cannot."""
    count = len(cluster.hosts or [None])
    if cluster.restart is not None and cluster.restart.min_hosts > count:
        yield problem(
            "cluster.restart.min_hosts",
            cluster.restart.min_hosts,
            f"there are {count} hosts, with {world_size} ranks",
            allowed=f"1 to {count}",
        )


def links_are_safe(*, cluster: ClusterConfig, mesh: Mesh) -> Iterator[str]:
    """A link without encryption stays on one machine, unless configured."""
    others = [host.name for host in cluster.hosts or [] if not host.is_here]
    is_torch, chosen = isinstance(mesh, TorchMeshConfig), mesh.security
    if others and (chosen == "loopback_plain" or (is_torch and chosen == "auto")):
        what = f"{', '.join(others)} would be reached over a network without encryption"
        allowed = "auto or tls; insecure, if you must"
        if is_torch:
            allowed = "insecure, in a network that you trust; mesh=tcp encrypts"
        yield problem("mesh.security", chosen, what, allowed=allowed)


def torch_mesh_can_be(*, cluster: ClusterConfig, mesh: Mesh) -> Iterator[str]:
    """Sockets of gloo and nccl are torch's own."""
    if isinstance(mesh, TcpMeshConfig):
        return
    ports = {f"cluster.hosts[{i}].ports": host.ports for i, host in enumerate(cluster.hosts or [])}
    for key, value in {"cluster.ports": cluster.ports, **ports}.items():
        if value is not None:
            what = "mesh=torch listens on ports that torch chooses"
            yield problem(key, value, what, allowed="null, or mesh=tcp")
    for index, host in enumerate(cluster.hosts or []):
        emulate = host.emulate
        if emulate is not None and (emulate.bandwidth_mbps is not None or emulate.latency_ms):
            key = f"cluster.hosts[{index}].emulate"
            what = "mesh=torch cannot slow links down"
            yield problem(key, host.name, what, allowed="compute and stragglers alone, or mesh=tcp")


def joining_is_possible(
    *, cluster: ClusterConfig, detach: bool, driver: str | None
) -> Iterator[str]:
    """Somebody has to see the pairing code, which is in no file."""
    hosts = cluster.hosts or []
    for index, host in enumerate(hosts):
        if host.nearby and host.ssh is not None:
            where = f"cluster.hosts[{index}].ssh"
            what = f"{host.name} is reached over SSH, or it joins (nearby: true)"
            yield problem(where, host.ssh, what, allowed="one of the two")
    if not any(host.nearby for host in hosts):
        return
    what = "machines that join need a pairing code, which is shown in a terminal and in no log"
    if detach:
        yield problem("detach", detach, what, allowed="false; `tmux` keeps a terminal open")
    if driver is not None:
        yield problem("driver", driver, what, allowed="null")


def emulation_can_be(*, cluster: ClusterConfig) -> Iterator[str]:
    """Emulation measures the CPU time of one thread of one rank."""
    left = cluster.emulate.model_dump(exclude_unset=True) if cluster.emulate else {}
    for key, value in left.items():  # what cluster.hosts have taken is there
        what = "every host has its own" if cluster.hosts else "there are no cluster.hosts"
        yield problem(f"cluster.emulate.{key}", value, what, allowed="null; keys of the hosts")
    for index, host in enumerate(cluster.hosts or []):
        where = f"cluster.hosts[{index}]"
        if host.emulate is None:
            continue
        if host.ranks != 1:
            what = f"{host.name} emulates a slower machine, with one rank"
            yield problem(f"{where}.ranks", host.ranks, what, allowed="1; more hosts for more")
        device = cluster.device if host.device == "auto" else host.device
        if device not in ("auto", "cpu"):
            what = f"{host.name} emulates a slower machine, which works on the CPU only"
            yield problem(f"{where}.device", device, what, allowed="cpu")
        if cluster.threads not in ("auto", 1):
            what = f"{host.name} emulates a slower machine, with one thread"
            yield problem("cluster.threads", cluster.threads, what, allowed="auto or 1")


def _is_loopback(address: str) -> bool:
    return address in ("localhost", "::1") or address.startswith("127.")


CLUSTER_CHECKS = (
    hosts_are_distinct,
    hosts_can_meet,
    ssh_is_a_target,
    env_is_sound,
    keys_mean_something,
    ports_suffice,
    named_hosts_exist,
    restart_can_be,
    links_are_safe,
    joining_is_possible,
    torch_mesh_can_be,
    emulation_can_be,
)
