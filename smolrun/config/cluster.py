"""The machines of a run: either so many ranks on this one, or a list of hosts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator
from pydantic.config import JsonDict

from smolrun.config.base import (
    Auto,
    Count,
    Device,
    Name,
    NotNegative,
    Ports,
    Positive,
    Section,
    TorchBuild,
)

THIS_MACHINE = "local"
TWO_PORTS: JsonDict = {"allowed": "two ports such as 40000-40100, or null"}


class EmulateConfig(Section):
    """A machine slower than the one it runs on."""

    compute: Annotated[float, Field(gt=0, le=1)] = Field(
        default=1.0, description="Fraction of this machine's speed: 0.25 = four times slower"
    )
    bandwidth_mbps: Positive | None = Field(
        default=None, description="Speed of its links in Mbit/s; null = as it is"
    )
    latency_ms: NotNegative = Field(default=0.0, description="Added one-way latency")
    straggler_chance: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.0, description="Chance that a step takes straggler_factor times as long"
    )
    straggler_factor: Annotated[float, Field(ge=1)] = Field(
        default=4.0, description="How much longer a step of a straggler takes"
    )


class RestartConfig(Section):
    """Restart after a lost host."""

    max: Count = Field(default=3, description="How many times the run may be started again")
    wait_s: NotNegative = Field(
        default=10.0, description="Seconds to wait for the host to come back"
    )
    min_hosts: Count = Field(default=1, description="Smallest number of hosts to continue with")


class HostConfig(Section):
    """One machine. Keys left out follow the cluster's own keys of the same name."""

    name: Name = Field(description="Its name in logs and tables")
    ssh: Name | None = Field(
        default=None, description="SSH destination: user@address or an alias; null = this machine"
    )
    nearby: bool = Field(
        default=False,
        description="A machine of the local network that joins by `smolrun task=join`, without SSH",
    )
    address: Name | Annotated[list[Name], Field(min_length=1)] | None = Field(
        default=None,
        json_schema_extra={"allowed": "an address, a list of addresses (best first), or null"},
        description="Its address for the other hosts, or several, best first; null = its ssh "
        "address",
    )
    ranks: Count = Field(default=1, description="Processes to start there, usually one per device")
    memory_gb: Positive | None = Field(
        default=None,
        description="Memory the run may use; null = all but 5 GB, of a small host three quarters, "
        "and no more than its device recommends",
    )
    speed: Positive | Auto = Field(
        default=1.0,
        description="Of each of its ranks, relative to others: 0.5 gets half of the work; auto = "
        "measured all along, for all hosts",
    )
    os: Literal["auto", "linux", "darwin", "windows"] = Field(
        default="auto", description="Its system, as task=doctor found it; auto = ask it"
    )
    device: Device = Field(default="auto", description="Where it computes")
    python: Name | None = Field(
        default=None, description="Absolute path of its Python; null = the one we set up"
    )
    torch: TorchBuild = Field(default="auto", description="Which build of torch to install there")
    workdir: Name | None = Field(
        default=None, description="Folder for code and data there; null = a cache folder"
    )
    env: dict[Name, str] = Field(
        default={},
        description="Environment variables of its processes; a password in a URL is in no file",
    )
    ports: Ports | None = Field(
        default=None,
        json_schema_extra=TWO_PORTS,
        description="Ports to listen on, as 40000-40100; null = any free one",
    )
    emulate: EmulateConfig | None = Field(
        default=None, description="Emulate a slower machine with slower links"
    )

    @property
    def is_here(self) -> bool:
        """Whether it is the machine of the driver."""
        return self.ssh is None and not self.nearby


class ClusterConfig(Section):
    """Group `cluster`: where the ranks of a run live."""

    name: Name = Field(
        default="custom",
        description="What tables call this set of machines; always the choice that was typed",
    )
    ranks: Auto | Count = Field(
        default="auto",
        description="Ranks on this machine when no hosts are listed; auto = 2, for single 1",
    )
    nearby: bool = Field(
        default=False,
        description="Without `hosts`: this machine, and `ranks` - 1 machines that join by `smolrun "
        "task=join`, one rank each",
    )
    hosts: list[HostConfig] | None = Field(
        default=None, min_length=1, description="The machines; null = this one alone"
    )
    server: Name | None = Field(
        default=None, description="Host that keeps the parameters, for algorithms with a server"
    )
    ssh_config: Name | None = Field(
        default=None,
        description="An OpenSSH client file to read; null = your usual one. Its ProxyCommand is "
        "run on this machine",
    )
    start_timeout_s: Positive = Field(
        default=120.0, description="Seconds for every rank to import, connect and be ready"
    )
    connect_timeout_s: Positive = Field(
        default=15.0, description="Seconds for SSH connection and login of a host"
    )
    join_timeout_s: Positive = Field(
        default=3600.0, description="Seconds to wait for machines that join (nearby)"
    )
    deploy: Literal["none", "rsync", "wheel"] = Field(
        default="wheel",
        description="How our code and yours reach the hosts: wheel = by hash, beside what "
        "task=setup installed; rsync = changed files of one tree; none = they have it",
    )
    restart: RestartConfig | None = Field(
        default=None, description="Start again after a lost host; null = end the run"
    )
    ports: Ports | None = Field(
        default=None,
        json_schema_extra=TWO_PORTS,
        description="Ports every rank may listen on, as 40000-40100; null = any",
    )
    python: Name | None = Field(default=None, description="Absolute path of Python on the hosts")
    torch: TorchBuild = Field(
        default="auto", description="Which build of torch to install on the hosts"
    )
    workdir: Name | None = Field(default=None, description="Folder for code and data on the hosts")
    device: Device = Field(default="auto", description="Where ranks compute; a key of a host wins")
    memory_gb: Positive | None = Field(
        default=None,
        description="Memory the run may use on each host; a key of a host wins; null = as there",
    )
    priority: Literal["low", "normal"] = Field(
        default="low",
        description="Of ranks on the driver's own machine: low = other programs come first; what "
        "measures (task=bench, doctor) runs at normal",
    )
    emulate: EmulateConfig | None = Field(
        default=None, description="Keys of `emulate` for all hosts; a key of a host wins"
    )
    threads: Auto | Count = Field(
        default="auto", description="Torch threads per rank; auto = cores / ranks of the host"
    )

    @model_validator(mode="before")
    @classmethod
    def _hosts_as_they_run(cls, data: Any) -> Any:
        """Ranks go host after host, and the server is rank 0; `memory_gb` is that of every host
        without its own."""
        data = _with_nearby(data)
        if not isinstance(data, Mapping) or not isinstance(data.get("hosts"), list):
            return data

        def is_other(host: Any) -> bool:
            return not isinstance(host, Mapping) or host.get("name") != data.get("server")

        memory = {"memory_gb": data["memory_gb"]} if data.get("memory_gb") is not None else {}
        hosts = [
            {**memory, **host} if isinstance(host, Mapping) else host
            for host in sorted(data["hosts"], key=is_other)
        ]
        return {**data, "hosts": hosts}

    @model_validator(mode="after")
    def _emulate_on_hosts(self) -> Self:
        """The hosts get the keys that they leave out, so that the configuration of a run has each
        at one place; what no host takes stays here, for a check to report."""
        if self.emulate is None:
            return self
        of_all = self.emulate.model_dump(exclude_unset=True)
        hosts, taken = [], set()
        for host in self.hosts or []:
            own = host.emulate.model_dump(exclude_unset=True) if host.emulate else {}
            taken |= of_all.keys() - own.keys()
            merged = EmulateConfig(**{**of_all, **own})
            hosts.append(host.model_copy(update={"emulate": merged}))
        left = {key: value for key, value in of_all.items() if key not in taken}
        emulate = EmulateConfig(**left) if left else None
        return self.model_copy(update={"hosts": hosts or None, "emulate": emulate})


def _with_nearby(data: Any) -> Any:
    """Where `nearby` asks for machines that join: a host for each. They get their names when they
    have joined."""
    if not isinstance(data, Mapping) or data.get("nearby") is not True or data.get("hosts"):
        return data
    ranks = data.get("ranks")
    if type(ranks) is not int or ranks < 1:
        return data
    joining = [{"name": f"nearby{number}", "nearby": True} for number in range(1, ranks)]
    return {**data, "ranks": "auto", "hosts": [{"name": THIS_MACHINE}, *joining]}
