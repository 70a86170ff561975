"""Hosts that went away during an elastic run, or were never there: reached again as soon as they
answer, in a thread each, so that nobody waits for them.

When a rank is to be started again, is asked whether its host is there; what to try and how often is
decided in launch/elastic.py.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

from smolrun.config import RunConfig
from smolrun.driver.fleet import Fleet, host_specs
from smolrun.driver.outputs import plan_again
from smolrun.errors import HostError, SmolrunError
from smolrun.launch.control import Saving
from smolrun.launch.elastic_worker import Elasticity
from smolrun.launch.hosts import WorkerHost, WorkerPlan, WorkerProcess

_AGAIN = "it is tried again"


class Reconnector:
    """What the driver of a run asks about its hosts; where it is not elastic, nothing special."""

    def __init__(
        self, config: RunConfig, fleet: Fleet, saving: Saving | None, say: Callable[[str], None]
    ) -> None:
        """`say` is called by `tell` only."""
        least = config.algorithm.min_ranks_left
        self.elasticity = None if least is None else Elasticity(min_ranks=least)
        self._config = config
        self._fleet = fleet
        self._saving = saving
        self._say = say
        self._told: dict[str, str] = {}
        self._news: queue.SimpleQueue[tuple[str, str, str]] = queue.SimpleQueue()
        self._threads: dict[str, threading.Thread] = {}
        for name, error in fleet.missing.items():
            self._news.put((name, str(error), "the run begins without it"))

    def host_of(self, plan: WorkerPlan) -> WorkerHost:
        """Where a worker is started; one that is away is being reached from now on."""
        if self.elasticity is None or self._fleet.is_there(plan.host):
            return self._fleet.host_of(plan)
        thread = self._threads.get(plan.host)
        if thread is None or not thread.is_alive():
            thread = self._threads[plan.host] = threading.Thread(
                target=self._reach,
                args=(plan.host,),
                name=f"smolrun-reach-{plan.host}",
                daemon=True,
            )
            thread.start()
        return _Away()

    def plan_again(self, plan: WorkerPlan) -> WorkerPlan:
        """What a rank is told that is started again; a host that is away says nothing new."""
        if not self._fleet.is_there(plan.host):
            return plan
        return plan_again(plan, self._config, self._fleet, self._saving)

    def tell(self) -> None:
        """Why hosts could not be reached, each reason once."""
        while not self._news.empty():
            name, error, what = self._news.get()
            if self._told.get(name) != error:
                self._told[name] = error
                self._say(f"warning: {error}; {what}")

    def _reach(self, host: str) -> None:
        try:
            self._open_and_equip(host)
        except SmolrunError as error:
            self._news.put((host, str(error), _AGAIN))
        except Exception as error:  # a library's; the host is asked again all the same
            self._news.put((host, f"{host}: {type(error).__name__}: {error}", _AGAIN))

    def _open_and_equip(self, host: str) -> None:
        from smolrun.launch.delivery.provision import provision
        from smolrun.launch.ssh.connect import open_machine

        assert self._fleet.order is not None, "a host that is away was to be equipped"
        (spec,) = [spec for spec in host_specs(self._config) if spec.name == host]
        cluster = self._config.cluster
        machine = open_machine(
            spec,
            ssh_config=cluster.ssh_config,
            timeout_s=cluster.connect_timeout_s,
            cluster=cluster.name,
        )
        try:
            ready = provision({host: machine}, self._fleet.order).hosts[host]
        except BaseException:
            machine.close()
            raise
        self._fleet.take_in(host, machine, ready)


class _Away:
    """A host that is not there yet."""

    def start(self, plan: WorkerPlan) -> WorkerProcess:
        """Not now."""
        raise HostError(plan.host, "it does not answer yet")
