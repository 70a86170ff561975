"""The replicas of a server on the driver: each rank is measured, gets the whole model, and loads it
again whenever its process is a new one.

rank 1  <-- Probe ---  driver       once a host: all its ranks share its memory
        --- Probed ->  plan         slots and context that fit beside the weights
host    <-- parts ---  (a thread)   by hash; a host that comes back has them already
rank 1  <-- Load ----
        --- Ready -->  frontend     routes requests to it (engine_bridge.py)
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

import msgspec

from smolrun.config import RunConfig, ranks
from smolrun.driver.serving_start import Progress, ServingSpec
from smolrun.errors import ProtocolError, SmolrunError
from smolrun.estimate.serving_plan import DoesNotFit, ServingPlan, ServingRank, plan_for
from smolrun.launch.control import TaskMessage, decode_data, task_message
from smolrun.launch.driver import Driver, Subscriber
from smolrun.serving.messages import LOADING, FromRank, Load, Loading, Probe, Probed, ToRank
from smolrun.serving.source import ModelSource

Delivery = tuple[ModelSource, str]


class ReplicaLoader(Subscriber):
    """Has every rank load the whole model. `deliver(host)` returns the source for the ranks of a
    host and its folder there; it is called in a thread, and may raise any error."""

    topic = LOADING

    def __init__(
        self,
        config: RunConfig,
        spec: ServingSpec,
        deliver: Callable[[str], Delivery],
        *,
        progress: Progress,
    ) -> None:
        self._config = config
        self._spec = spec
        self._deliver = deliver
        self._progress = progress
        self._ranks = ranks(config)
        self._driver: Driver | None = None
        self._probed: dict[int, Probed] = {}
        self._plans: dict[int, ServingPlan] = {}
        self._delivered: queue.SimpleQueue[tuple[int, Delivery | Exception]] = queue.SimpleQueue()
        self._loading: dict[int, tuple[int, int]] = {}

    def on_start(self, driver: Driver) -> None:
        """Ask every rank to measure."""
        self._driver = driver
        for rank in driver.ranks:
            self.on_restart(rank)

    def on_restart(self, rank: int) -> None:
        """A new process has no weights; what fits on its host is known from the first one, as the
        other ranks there now hold theirs."""
        if rank in self._plans:
            self._bring(rank)
        else:
            source = msgspec.to_builtins(self._spec.source)
            self._send(rank, Probe(source=source, dtype=self._spec.dtype))

    def on_message(self, rank: int, message: TaskMessage) -> None:
        """A measurement, or how far the loading is."""
        news: FromRank = decode_data(message, FromRank)  # type: ignore[arg-type]  # a union is fine
        if news.rank != rank:
            raise ProtocolError(f"sent a message of rank {news.rank}")
        if isinstance(news, Probed):
            self._probed[rank] = news
            self._decide(self._ranks[rank].host)
        elif isinstance(news, Loading):
            self._loading[rank] = (news.done, news.total)
            together = [sum(column) for column in zip(*self._loading.values(), strict=True)]
            self._progress("loading the model", *together)

    def on_poll(self) -> None:
        """Ranks whose host has the model load it."""
        while not self._delivered.empty():
            rank, found = self._delivered.get()
            if isinstance(found, Exception):
                self._fail(rank, found)
            else:
                self._load(rank, *found)

    def _decide(self, host: str) -> None:
        """Once all ranks of a host have measured; none of them has loaded anything before."""
        here = [one for one in self._ranks if one.host == host]
        if any(one.rank not in self._probed or one.rank in self._plans for one in here):
            return
        for one in here:
            probed = self._probed[one.rank]
            free = probed.free_bytes / one.local_world_size
            found = ServingRank(host, max(probed.layer_s, 1e-9), probed.head_s, free)
            longest = self._spec.source.shape.max_sequence_length
            try:
                self._plans[one.rank] = plan_for(self._config, self._spec.sizes, longest, [found])
            except (SmolrunError, ValueError) as error:
                self._fail(one.rank, error)
                return
            self._bring(one.rank)

    def _bring(self, rank: int) -> None:
        host = self._ranks[rank].host

        def bring() -> None:
            try:
                self._delivered.put((rank, self._deliver(host)))
            except Exception as error:  # of a host, a disk or a library; the driver reports it
                self._delivered.put((rank, error))

        threading.Thread(target=bring, name=f"smolrun-parts-{host}", daemon=True).start()

    def _load(self, rank: int, source: ModelSource, folder: str) -> None:
        plan, serving = self._plans[rank], self._config.serving
        self._send(
            rank,
            Load(
                source=msgspec.to_builtins(source),
                dtype=self._spec.dtype,
                stages=[rank],
                last_layers=[source.shape.layers - 1],
                folders=[folder] * len(self._ranks),
                slots=plan.slots,
                capacity=plan.capacity,
                chunk_tokens=serving.prefill_chunk,
                prefix_reuse=serving.prefix_reuse,
                batch_invariant=serving.batch_invariant,
                head=rank,
            ),
        )

    def _send(self, rank: int, message: ToRank) -> None:
        assert self._driver is not None, "the driver has started"
        self._driver.send(rank, task_message(LOADING, message))

    def _fail(self, rank: int, error: Exception) -> None:
        """The server cannot be as configured."""
        assert self._driver is not None, "the driver has started"
        what = str(error) if isinstance(error, SmolrunError | ValueError) else repr(error)
        if isinstance(error, DoesNotFit):
            host = self._ranks[rank].host
            what = f"{self._spec.source.name} does not fit on {host}: {error}"
        self._driver.fail(what)
