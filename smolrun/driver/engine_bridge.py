"""The task messages between the HTTP server and the engines on the ranks: rank 0's, or every
replica's.

Replicas have no mesh whose heartbeats would show that one is frozen or cut off, so the driver asks
them a few times a second.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from smolrun.config import RunConfig, are_replicas, world_size
from smolrun.config.settings import TcpMeshConfig
from smolrun.errors import ProtocolError
from smolrun.launch.control import SILENCE_S, TaskMessage, decode_data, task_message
from smolrun.launch.driver import Driver, Subscriber
from smolrun.serving.frontend import Frontend
from smolrun.serving.messages import TOPIC, FromEngine, Ping, Ready, ToEngine

_PING_EVERY_S = 0.25


class EngineBridge(Subscriber):
    """The task messages between the HTTP server and the engines: rank 0's, or every replica's."""

    topic = TOPIC

    def __init__(self, config: RunConfig, say: Callable[[str], None]) -> None:
        self._has_replicas = are_replicas(config)
        least_gb = config.serving.min_free_gb
        self.frontend = Frontend(
            self._send,
            num_replicas=world_size(config) if self._has_replicas else 1,
            prefix_reuse=config.serving.prefix_reuse,
            max_waiting=config.serving.max_queue,
            min_free_gb=None if least_gb == "auto" else least_gb,
        )
        self.on_ready: Callable[[Ready], None] = lambda _: None
        self._say = say
        self._driver: Driver | None = None
        self._ready: dict[int, Ready] = {}  # of the replicas that are loaded
        self._vacant: set[int] = set()  # that take no requests, as their weights are replaced
        self._drain_s = config.serving.drain_s
        assert isinstance(config.mesh, TcpMeshConfig), "checks.py: task=serve has links of its own"
        self._limit_s = SILENCE_S[config.mesh.liveness]
        self._silence = Silence(self._limit_s)
        self._asked_s = 0.0

    def on_start(self, driver: Driver) -> None:
        """Requests can be sent from now on; none of these ranks is loaded yet."""
        self._driver = driver
        self._ready.clear()
        self._silence = Silence(self._limit_s)

    def on_end(self) -> None:
        """Requests have no rank left that takes them."""
        self._driver = None

    def on_message(self, rank: int, message: TaskMessage) -> None:
        """New tokens, or the news that tokens can flow."""
        if rank >= self.frontend.num_replicas:
            raise ProtocolError("sent tokens, which only rank 0 does")
        news: FromEngine = decode_data(message, FromEngine)  # type: ignore[arg-type]  # a union is fine
        self._heard(rank)
        self.frontend.on_message(news, rank)
        if isinstance(news, Ready):
            self._ready[rank] = news
            self._vacant.discard(rank)
            self.on_ready(news)

    def may_join(self) -> bool:
        """While no answer would have to pause."""
        return self.frontend.state != "ready" or not self.frontend.num_requests

    def on_poll(self) -> None:
        """Ask the replicas whether they are alive, and move the requests of those that are not."""
        now = time.monotonic()
        if not self._has_replicas or now < self._asked_s + _PING_EVERY_S:
            return
        self._asked_s = now
        for rank in self._ready:
            self._send(rank, Ping())
        for rank in self._silence.lost(2 * _PING_EVERY_S):
            reason = f"rank {rank} has not answered for {self._limit_s:g} s"
            self._say(f"warning: {reason}; its requests move to other replicas")
            self.frontend.lose(rank, reason)
            self._answers(rank, is_answering=False)

    def on_exit(self, rank: int) -> None:
        """Its requests continue elsewhere; the supervisor says why it has ended."""
        if self._ready.pop(rank, None) is not None and self._has_replicas:
            self._silence.forget(rank)
            self._vacant.discard(rank)
            self.frontend.lose(rank, f"rank {rank} has ended")

    def vacate(self, rank: int, then: Callable[[], None]) -> None:
        """Take a replica out of use; `then` is called, on any thread, once it runs no request."""
        self._vacant.add(rank)
        self.frontend.vacate(rank, self._drain_s, then)

    def reopen(self, rank: int) -> None:
        """Use a replica again with the weights that it has; nothing where it is in use."""
        if rank in self._vacant and rank in self._ready:
            self._vacant.discard(rank)
            self.frontend.on_message(self._ready[rank], rank)

    def _heard(self, rank: int) -> None:
        if self._has_replicas and self._silence.heard(rank) and rank in self._ready:
            self._say(f"rank {rank} answers again")
            if rank not in self._vacant:
                self.frontend.on_message(self._ready[rank], rank)
            self._answers(rank, is_answering=True)

    def _answers(self, rank: int, *, is_answering: bool) -> None:
        assert self._driver is not None, "the driver has started"
        self._driver.note_answering(rank, is_answering=is_answering)

    def _send(self, rank: int, message: ToEngine) -> None:
        if (driver := self._driver) is not None:  # another thread may set it to None meanwhile
            driver.send(rank, task_message(TOPIC, message))


class Silence:
    """How long each rank has not answered, in time that the driver itself was awake."""

    def __init__(self, limit_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit_s = limit_s
        self._clock = clock
        self._before_s = clock()
        self._silent_s: dict[int, float] = {}

    def heard(self, rank: int) -> bool:
        """A message of it has come; whether it had been silent for too long."""
        was_lost = self._silent_s.get(rank, 0.0) >= self._limit_s
        self._silent_s[rank] = 0.0
        return was_lost

    def forget(self, rank: int) -> None:
        """It is not asked any more."""
        self._silent_s.pop(rank, None)

    def lost(self, longest_tick_s: float) -> list[int]:
        """Those who have just become silent for too long. A tick counts for `longest_tick_s` at
        most: while this machine slept, no answer could arrive."""
        now = self._clock()
        tick_s = min(now - self._before_s, longest_tick_s)
        self._before_s, found = now, []
        for rank, silent_s in self._silent_s.items():
            self._silent_s[rank] = silent_s + tick_s
            if silent_s < self._limit_s <= silent_s + tick_s:
                found.append(rank)
        return found
