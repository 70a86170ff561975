"""The machines of a run, ready for its workers: this one, and those reached over SSH.

    fleet = open_fleet(config)            all are connected at once, or all that cannot be are named
    fleet.equip(run_id, ...)              our code, the data, the checkpoint to resume from
    plan_workers(config, folder, fleet)   the StartMessage of every rank
    Driver(plans, fleet.host_of, ...)
    fleet.clear(run_id); fleet.close()

Only wiring. Where every rank is on this machine all of it is trivial, and nothing of SSH is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import platformdirs

from smolrun.config import RankPlan, RunConfig, are_replicas, min_ranks_left, ranks
from smolrun.config.base import CustomTargetConfig
from smolrun.config.cluster import HostConfig as HostConfig
from smolrun.config.suggest import problem
from smolrun.data.prepared import Progress
from smolrun.driver.nearby import machine_of
from smolrun.errors import ConfigError, HostError, HostErrors, SmolrunError
from smolrun.launch.control import Saving
from smolrun.launch.hosts import WorkerHost, WorkerPlan
from smolrun.launch.local import LocalHost, is_secret
from smolrun.launch.on_host.prelude import usable_cores
from smolrun.mesh.addresses import resolve

if TYPE_CHECKING:
    from smolrun.data.prepared import Prepared
    from smolrun.launch.delivery.provision import ProvisionedHost, ProvisionRequest
    from smolrun.launch.delivery.shards import ShardFetcher
    from smolrun.launch.remote.machine import HostSpec, Machine

MEASURING = ("bench", "doctor")  # tasks whose ranks run at normal priority


class Fleet:
    """The hosts of one run. `machines` are those that are not this one, by name; `missing` those of
    them that did not answer, in a run that begins without them."""

    def __init__(
        self,
        config: RunConfig,
        machines: Mapping[str, Machine],
        missing: Mapping[str, SmolrunError] | None = None,
    ) -> None:
        self.machines = dict(machines)
        self.missing = dict(missing or {})
        self.order: ProvisionRequest | None = None  # what is brought to every host
        self._config = config
        self._prepared: Prepared | None = None
        self._resume: str | None = None
        self._is_closed = False
        self._ready: dict[str, ProvisionedHost] = {}

    def equip(
        self,
        run_id: str,
        prepared: Prepared | None,
        checkpoint: Path | None,
        *,
        progress: Progress,
        say: Callable[[str], None],
    ) -> None:
        """Have on every host what its ranks need; HostError or HostErrors if one cannot have it."""
        self._prepared = prepared
        self._resume = None if checkpoint is None else str(checkpoint)
        if not self.machines and not self.missing:
            return
        from smolrun.launch.delivery.code_archive import code_archive
        from smolrun.launch.delivery.files import FileHashes, PreparedFiles
        from smolrun.launch.delivery.provision import ProvisionRequest, provision
        from smolrun.launch.delivery.run_folder import CheckpointFiles

        hashes = FileHashes(platformdirs.user_cache_path("smolrun") / "hashes.json")
        weights = getattr(self._config.model, "pretrained", True)
        order = self.order = ProvisionRequest(
            run_id,
            self._config.cluster.name,
            self._config.cluster.deploy,
            code_archive(Path.cwd(), own_targets(self._config)),
            PreparedFiles(prepared, hashes, weights=weights) if prepared is not None else None,
            CheckpointFiles(checkpoint) if checkpoint is not None else None,
            own_targets(self._config),
        )
        if order.archive.own and any(one.installed for one in self.machines.values()):
            say("waiting until the users of joined machines allow your own files there")
        ready = provision(self.machines, order, progress)
        self._ready = ready.hosts
        for line in ready.warnings:
            say(f"warning: {line}")
        for line in ready.notes:
            say(line)

    def is_there(self, host: str) -> bool:
        """Whether workers can be started on a host now."""
        machine = self.machines.get(host)
        if machine is None:
            return host not in self.missing
        return machine.connection.lost is None and not machine.connection.is_silent

    def take_in(self, host: str, machine: Machine, ready: ProvisionedHost) -> None:
        """A host that was away is there again, and has what its ranks need."""
        self._ready[host] = ready
        self.machines[host] = machine
        self.missing.pop(host, None)
        if self._is_closed:  # meanwhile
            machine.close()

    def host_of(self, plan: WorkerPlan) -> WorkerHost:
        """Where a worker is started."""
        if plan.host not in self.machines:
            is_low = self._config.cluster.priority == "low" and self._config.task not in MEASURING
            return LocalHost(low_priority=is_low)
        from smolrun.launch.remote.machine import RemoteHost

        ready, machine = self._ready[plan.host], self.machines[plan.host]
        if machine.installed is not None:
            from smolrun.launch.nearby.joined import JoinedHost, JoinedMachine

            assert isinstance(machine, JoinedMachine), "others get our smolrun"
            return JoinedHost(machine, ready.cwd or None)
        return RemoteHost(machine, ready.argv, ready.env, ready.cwd)

    def addresses(self, rank: RankPlan) -> list[str]:
        """Where the others reach a rank, as numbers, best first: as the cluster says, or as we do.

        HostError where a name means nothing.
        """
        if rank.host in self.missing:
            return []  # not known yet
        machine = self.machines.get(rank.host)
        hosts = self._config.cluster.hosts or []
        is_given = any(host.name == rank.host and host.address is not None for host in hosts)
        if machine is None or is_given:
            return resolve(rank.host, rank.addresses)
        if not machine.addresses:
            raise unknown_address(rank.host)
        return machine.addresses

    def threads(self, rank: RankPlan) -> int:
        """Torch threads of one rank: the usable cores, shared by the ranks of the machine. Hosts
        without `ssh` are this one, however many there are."""
        if rank.threads != "auto":
            return rank.threads
        if machine := self.machines.get(rank.host):
            return max(1, machine.cores // rank.local_world_size)
        elsewhere = {host.name for host in self._config.cluster.hosts or [] if not host.is_here}
        here = sum(other.host not in elsewhere for other in ranks(self._config))
        return max(1, (usable_cores() or 1) // max(1, here))

    def prepared(self, host: str) -> Prepared | None:
        """The prepared data, as it lies on a host."""
        return self._ready[host].prepared if host in self._ready else self._prepared

    def saving(self, host: str, saving: Saving | None) -> Saving | None:
        """Where the ranks of a host write checkpoints, and find the one they resume from."""
        if saving is None or host not in self._ready:
            return saving
        ready = self._ready[host]
        # Older checkpoints live here: a host needs room for the save that is being written and the
        # one that is being fetched.
        return msgspec.structs.replace(
            saving, folder=f"{ready.run}/checkpoints", resume=ready.resume, keep=1, keep_best=False
        )

    def fetcher(self, checkpoints: Path, saving: Saving | None) -> ShardFetcher | None:
        """Who brings here what ranks elsewhere save; None if there are none, or nothing is."""
        if saving is None or not self._ready:
            return None
        from smolrun.launch.delivery.shards import ShardFetcher, ShardOrigin

        origins = {
            rank.rank: ShardOrigin(
                self.machines[rank.host], f"{self._ready[rank.host].run}/checkpoints"
            )
            for rank in ranks(self._config)
            if rank.host in self._ready
        }
        return ShardFetcher(origins, checkpoints, saving.token, open_again=open_again)

    def versions(self) -> dict[str, dict[str, str | None]]:
        """What each host that is not this one runs."""
        return {name: ready.versions for name, ready in self._ready.items()}

    def clear(self, run_id: str) -> list[str]:
        """Remove what the run has on the hosts; a sentence for each where that failed."""
        if not self._ready:
            return []
        from smolrun.launch.delivery.provision import clear_all

        return clear_all(self.machines, run_id, open_again)

    def close(self) -> None:
        """End all connections."""
        self._is_closed = True
        for machine in list(self.machines.values()):
            machine.close()


def open_fleet(config: RunConfig) -> Fleet:
    """Connect to every host that is not this machine; HostError or HostErrors if one is not there.

    An elastic run begins without some, as long as there are enough. Close it in the end."""
    specs = host_specs(config)
    if not is_elsewhere(config):
        return Fleet(config, {})
    missing: dict[str, SmolrunError] = {}
    is_elastic = min_ranks_left(config) is not None
    machines = _joined_machines(config, missing if is_elastic else None)
    if specs:
        from smolrun.launch.ssh.connect import open_machines

        machines |= open_machines(specs, missing=missing if is_elastic else None)
    fleet = Fleet(config, machines, missing)
    if missing and not _is_enough(config, missing):
        fleet.close()
        errors = list(missing.values())
        raise errors[0] if len(errors) == 1 else HostErrors(errors)
    return fleet


def _joined_machines(
    config: RunConfig, missing: dict[str, SmolrunError] | None
) -> dict[str, Machine]:
    """As `open_machines`, of those that join."""
    found: dict[str, Machine] = {}
    for host in config.cluster.hosts or []:
        if host.nearby:
            try:
                found[host.name] = machine_of(host.name)
            except HostError as error:
                if missing is None:
                    raise
                missing[host.name] = error
    return found


def open_host(config: RunConfig, name: str) -> Machine:
    """Connect to one host that is not this machine. HostError."""
    if any(host.nearby and host.name == name for host in config.cluster.hosts or []):
        return machine_of(name)
    from smolrun.launch.ssh.connect import open_machine

    (spec,) = [spec for spec in host_specs(config) if spec.name == name]
    return open_machine(spec)


def open_again(machine: Machine) -> Machine:
    """Another connection to a host whose connection was lost. HostError within seconds."""
    if machine.installed is not None:
        return machine_of(machine.name)
    from smolrun.launch.ssh import connect

    return connect.open_again(machine)


def _is_enough(config: RunConfig, missing: Collection[str]) -> bool:
    """Whether an elastic run can begin without these hosts."""
    there = [rank.rank for rank in ranks(config) if rank.host not in missing]
    return (0 in there or are_replicas(config)) and len(there) >= (min_ranks_left(config) or 0)


def host_specs(config: RunConfig) -> list[HostSpec]:
    """What the launcher must know of each host that is not this machine. ConfigError where a
    secret would travel with it."""
    if found := list(secrets_in_env(config)):
        raise ConfigError(found)
    cluster = config.cluster
    if not any(host.ssh is not None for host in cluster.hosts or []):
        return []
    from smolrun.launch.remote.machine import HostSpec

    return [
        HostSpec(
            name=host.name,
            ssh=host.ssh,
            python=host.python or cluster.python,
            workdir=host.workdir or cluster.workdir,
            env=dict(host.env),
            torch=cluster.torch if host.torch == "auto" else host.torch,
            ssh_config=cluster.ssh_config,
            timeout_s=cluster.connect_timeout_s,
            cluster=cluster.name,
        )
        for host in cluster.hosts or []
        if host.ssh is not None
    ]


def secrets_in_env(config: RunConfig) -> Iterator[str]:
    """What is a secret by its name would be in the environment of a process, for all to see."""
    for index, host in enumerate(config.cluster.hosts or []):
        for name in filter(is_secret, host.env):
            yield problem(
                f"cluster.hosts[{index}].env.{name}",
                "...",
                "is a secret by its name, and ranks need none: the driver fetches what they use",
                allowed="names without TOKEN, KEY, PASSWORD and the like",
            )


def unknown_address(host: str) -> HostError:
    """What is wrong with a host behind a jump host that has no address in the cluster file."""
    return HostError(
        host,
        "it is reached through another host, so its address is not known here",
        "set its `address:` in the cluster file, as the other hosts reach it",
    )


def is_elsewhere(config: RunConfig) -> bool:
    """Whether some rank is not on this machine."""
    return any(not host.is_here for host in config.cluster.hosts or [])


def own_targets(config: RunConfig) -> list[str]:
    """What the configuration names of the user's own code."""
    groups = (config.model, config.data, config.algorithm)
    own = [group.target for group in groups if isinstance(group, CustomTargetConfig)]
    return own + ([config.model.loss] if config.model.loss else [])
