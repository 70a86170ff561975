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
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import msgspec

from smolrun.config import RunConfig, ranks
from smolrun.driver.serving_start import Progress, ServingSpec, load_message, problem_text
from smolrun.errors import HostError, HostErrors, ProtocolError, SmolrunError
from smolrun.estimate.serving_plan import ServingPlan, ServingRank, plan_for
from smolrun.launch.control import TaskMessage, decode_data, task_message
from smolrun.launch.driver import Driver, Subscriber
from smolrun.serving.messages import LOADING, FromRank, Loading, NotLoaded, Probe, Probed, ToRank
from smolrun.serving.source import ModelSource

_AGAIN_S = 10.0  # after a host could not be brought the model


@dataclass
class _Delivery:
    """A model for a rank, or why its host does not have it. `reload`: the rank answers, or did so
    until now, with other weights; `process`: which one of the rank it is for."""

    rank: int
    source: ModelSource
    process: int
    reload: Literal["beside", "alone"] | None = None
    folder: str = ""
    error: Exception | None = None


class ReplicaLoader(Subscriber):
    """Has every rank load the whole model. `deliver(host, source)` returns the source for the ranks
    of a host and its folder there; it is called in a thread, and may raise any error.

    `source_of(rank)` is what a new process loads. `on_refused` gets the reason why a
    rank that answers has not loaded a newer one."""

    topic = LOADING

    def __init__(
        self,
        config: RunConfig,
        spec: ServingSpec,
        deliver: Callable[[str, ModelSource], tuple[ModelSource, str]],
        *,
        progress: Progress,
        say: Callable[[str], None],
    ) -> None:
        self._config = config
        self._spec = spec
        self._deliver = deliver
        self._progress = progress
        self._say = say
        self.source_of: Callable[[int], ModelSource] = lambda rank: spec.source
        self.on_refused: Callable[[NotLoaded], None] = lambda news: None
        self._ranks = ranks(config)
        self._driver: Driver | None = None
        self._probed: dict[int, Probed] = {}
        self._plans: dict[int, ServingPlan] = {}
        self._delivered: queue.SimpleQueue[_Delivery] = queue.SimpleQueue()
        self._processes: Counter[int] = Counter()  # of every rank that have ended
        self._again: dict[int, float] = {}  # when to bring a rank the model again
        self._loading: dict[int, tuple[int, int]] = {}
        self._has_loaded = False  # any rank

    def on_start(self, driver: Driver) -> None:
        """Ask every rank to measure."""
        self._driver = driver
        for rank in driver.ranks:
            self.on_restart(rank)

    def on_restart(self, rank: int) -> None:
        """A new process has no weights; what fits on its host is known from the first one, as the
        other ranks there now hold theirs."""
        if rank in self._plans:
            self.bring(rank, self.source_of(rank))
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
        elif isinstance(news, NotLoaded):
            self.on_refused(news)
        elif isinstance(news, Loading):
            self._show(rank, news)

    def on_exit(self, rank: int) -> None:
        """What was under way was for this process."""
        self._processes[rank] += 1
        self._again.pop(rank, None)

    def on_poll(self) -> None:
        """Ranks whose host has the model load it."""
        while not self._delivered.empty():
            found = self._delivered.get()
            if found.process != self._processes[found.rank]:
                continue  # it has ended meanwhile
            if found.error is None:
                self._load(found)
            else:
                self._not_delivered(found, found.error)
        now = time.monotonic()
        for rank in [rank for rank, due in self._again.items() if due <= now]:
            del self._again[rank]
            self.bring(rank, self.source_of(rank))

    def _show(self, rank: int, news: Loading) -> None:
        """How far the first start is; later ones are not waited for."""
        self._loading[rank] = (news.done, news.total)
        together = [sum(column) for column in zip(*self._loading.values(), strict=True)]
        if not self._has_loaded:
            self._progress("loading the model", *together)
        self._has_loaded = self._has_loaded or together[0] == together[1]

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
            self.bring(one.rank, self.source_of(one.rank))

    def bring(
        self, rank: int, source: ModelSource, reload: Literal["beside", "alone"] | None = None
    ) -> None:
        """Have a rank load a model, once its host has it; `beside` the one that it answers with, or
        in its place."""
        host = self._ranks[rank].host
        delivery = _Delivery(rank, source, self._processes[rank], reload)

        def bring() -> None:
            try:
                delivery.source, delivery.folder = self._deliver(host, source)
            except Exception as error:  # of a host, a disk or a library; the driver reports it
                delivery.error = error
            self._delivered.put(delivery)

        threading.Thread(target=bring, name=f"smolrun-parts-{host}", daemon=True).start()

    def _load(self, found: _Delivery) -> None:
        rank, dtype, folders = found.rank, self._spec.dtype, [found.folder] * len(self._ranks)
        load = load_message(self._config, dtype, found.source, self._plans[rank], folders)
        # Its plan is of one rank, which is called 0 there.
        beside = found.reload == "beside"
        load = msgspec.structs.replace(load, stages=[rank], head=rank, beside=beside)
        self._send(rank, load)

    def _not_delivered(self, found: _Delivery, error: Exception) -> None:
        """Of newer weights, or to a host that is away again, it is no reason to end the others."""
        rank, text = found.rank, problem_text(error, found.source.name)
        if found.reload:
            self.on_refused(NotLoaded(rank, found.source.step, text))
        elif self._has_loaded and isinstance(error, HostError | HostErrors):
            self._say(f"warning: rank {rank} does not have the model yet: {text}")
            self._again[rank] = time.monotonic() + _AGAIN_S
        else:
            self._fail(rank, error)

    def _send(self, rank: int, message: ToRank) -> None:
        assert self._driver is not None, "the driver has started"
        self._driver.send(rank, task_message(LOADING, message))

    def _fail(self, rank: int, error: Exception) -> None:
        """The server cannot be as configured."""
        assert self._driver is not None, "the driver has started"
        where = f" on {self._ranks[rank].host}"
        self._driver.fail(problem_text(error, self._spec.source.name, where))
