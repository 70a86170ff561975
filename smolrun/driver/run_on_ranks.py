"""One start of a run's ranks: the hosts get what they need, one worker per rank runs the task, and
the hosts are cleaned again. Used by every task that runs on ranks.

    fleet = open_fleet(config)
    outcome = run_on_ranks(config, folder, fleet, [subscriber, ...], ...)
    fleet.close()
"""

from __future__ import annotations

import queue
import secrets
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from smolrun.config import (
    RankPlan,
    RunConfig,
    config_hash,
    linked,
    min_ranks_left,
    ranks,
    redacted,
    world_size,
)
from smolrun.driver.fleet import Fleet, is_elsewhere, open_host
from smolrun.errors import HostError, SmolrunError
from smolrun.launch.control import Saving, Security, StartMessage
from smolrun.launch.driver import Driver, Subscriber
from smolrun.launch.elastic_worker import Elasticity
from smolrun.launch.hosts import WorkerHost, WorkerPlan, WorkerProcess
from smolrun.launch.supervisor import Limits
from smolrun.launch.supervisor_events import RunOutcome
from smolrun.mesh.certificates import issue_credentials
from smolrun.tracking.run_folder import RunFolder

if TYPE_CHECKING:
    from smolrun.data.prepared import Prepared, Progress


def run_on_ranks(
    config: RunConfig,
    folder: RunFolder,
    fleet: Fleet,
    subscribers: Sequence[Subscriber] = (),
    *,
    limits: Limits,
    say: Callable[[str], None],
    progress: Progress = lambda *_: None,
    prepared: Prepared | None = None,
    checkpoint: Path | None = None,
    saving: Saving | None = None,
    stop_requests: Callable[[], int] | None = None,
) -> RunOutcome:
    """Run the configured task on all ranks of `fleet`, until the last one has ended. HostError or
    HostErrors: a host cannot be equipped, no rank was started.

    `subscribers` get what happens, in this order, on this thread. `prepared` data and a
    `checkpoint` to resume from are delivered to the hosts; `saving` says where ranks save;
    `stop_requests` counts as of Driver, those in the folder unless it is given.
    """
    try:
        fleet.equip(folder.unique_id, prepared, checkpoint, progress=progress, say=say)
        reconnector = Reconnector(config, fleet, saving, say)
        driver = Driver(
            plan_workers(config, folder, fleet, saving),
            reconnector.place,
            [reconnector, *subscribers],
            limits=limits,
            stop_requests=stop_requests or folder.stop_requests,
            elastic=reconnector.elasticity,
            has_steps=config.task == "train",
        )
        return driver.run()
    finally:
        for line in fleet.clear(folder.unique_id):
            say(f"warning: {line}")


def plan_workers(
    config: RunConfig, folder: RunFolder, fleet: Fleet, saving: Saving | None = None
) -> list[WorkerPlan]:
    """One worker per rank. Secret and TLS keys are made here and sent over stdin only."""
    plain, digest, secret = redacted(config), config_hash(config), secrets.token_hex(32)
    size, security = world_size(config), _security(config)
    keys = issue_credentials(folder.unique_id, size) if security == "tls" else [None] * size
    plans = []
    for rank in ranks(config):
        start = StartMessage(
            rank=rank.rank,
            world_size=size,
            host=rank.host,
            run_id=folder.unique_id,
            config=plain,
            config_hash=digest,
            secret=secret,
            ports=rank.ports,
            security=security,
            credentials=keys[rank.rank],
            device=rank.device,
            links=linked(config),
            **_on_host(rank, fleet, saving),
        )
        plans.append(WorkerPlan(start, folder.log(rank.rank, rank.host)))
    return plans


def _on_host(rank: RankPlan, fleet: Fleet, saving: Saving | None) -> dict[str, Any]:
    """The fields of a start message that depend on the host as it is now."""
    prepared = fleet.prepared(rank.host)
    return {
        "addresses": fleet.addresses(rank),
        "threads": fleet.threads(rank),
        "prepared": prepared.to_json() if prepared is not None else None,
        "saving": fleet.saving(rank.host, saving),
    }


def _security(config: RunConfig) -> Security:
    """auto: what stays on this machine needs no encryption, what leaves it does."""
    chosen = config.mesh.security
    if chosen == "auto":
        return "tls" if is_elsewhere(config) else "loopback_plain"
    return chosen


class Reconnector(Subscriber):
    """Places workers on the hosts of the fleet. In an elastic run it reconnects to hosts that are
    away, each in a thread of its own, as soon as a rank is to be started there."""

    def __init__(
        self, config: RunConfig, fleet: Fleet, saving: Saving | None, say: Callable[[str], None]
    ) -> None:
        """`say` is called by `on_poll` only."""
        self.elasticity = None
        if (links := linked(config)) != "all":
            self.elasticity = Elasticity(min_ranks=min_ranks_left(config) or 1, links=links)
        self._config = config
        self._fleet = fleet
        self._saving = saving
        self._say = say
        self._reported: dict[str, str] = {}
        self._news: queue.SimpleQueue[tuple[str, str, str]] = queue.SimpleQueue()
        self._threads: dict[str, threading.Thread] = {}
        for name, error in fleet.missing.items():
            self._news.put((name, str(error), "the run begins without it"))

    def place(self, plan: WorkerPlan) -> tuple[WorkerPlan, WorkerHost]:
        """The host of a worker, and its plan as that host is now."""
        if self.elasticity is None:
            return plan, self._fleet.host_of(plan)
        if self._fleet.is_there(plan.host):
            (rank,) = [rank for rank in ranks(self._config) if rank.rank == plan.rank]
            start = msgspec.structs.replace(plan.start, **_on_host(rank, self._fleet, self._saving))
            return WorkerPlan(start, plan.log_path), self._fleet.host_of(plan)
        thread = self._threads.get(plan.host)
        if thread is None or not thread.is_alive():
            thread = self._threads[plan.host] = threading.Thread(
                target=self._reach,
                args=(plan.host,),
                name=f"smolrun-reach-{plan.host}",
                daemon=True,
            )
            thread.start()
        return plan, _UnreachableHost()

    def on_poll(self) -> None:
        """Report why hosts could not be reached, each reason once."""
        while not self._news.empty():
            name, error, what = self._news.get()
            if self._reported.get(name) != error:
                self._reported[name] = error
                self._say(f"warning: {error}; {what}")

    def _reach(self, host: str) -> None:
        try:
            self._open_and_equip(host)
        except SmolrunError as error:
            self._news.put((host, str(error), "it is tried again"))
        except Exception as error:  # a library's; the host is asked again all the same
            self._news.put((host, f"{host}: {type(error).__name__}: {error}", "it is tried again"))

    def _open_and_equip(self, host: str) -> None:
        from smolrun.launch.delivery.provision import provision

        assert self._fleet.order is not None, "a host that is away was to be equipped"
        machine = open_host(self._config, host)
        try:
            ready = provision({host: machine}, self._fleet.order).hosts[host]
        except BaseException:
            machine.close()
            raise
        self._fleet.take_in(host, machine, ready)


class _UnreachableHost:
    """A host without a connection."""

    def start(self, plan: WorkerPlan) -> WorkerProcess:
        """HostError."""
        raise HostError(plan.host, "it does not answer yet")
