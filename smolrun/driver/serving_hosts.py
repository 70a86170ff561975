"""Beside the requests of a server: the memory of its hosts, keeping them awake, and unloading.

An idle server stops its ranks after a while, which gives back all of their memory, and keeps its
port; the next request waits while new ranks load the model.

    ready -- idle for unload_after_min --> unloaded -- a request --> loading --> ready
                                               ^------- it failed -----|
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable

from smolrun.errors import ProtocolError
from smolrun.launch.control import TaskMessage, decode_data, task_message
from smolrun.launch.driver import Driver, InterruptCounter, Subscriber
from smolrun.launch.supervisor_events import EXIT_STOPPED, RunOutcome
from smolrun.launch.wake import AwakeSwitch
from smolrun.serving.frontend import Frontend
from smolrun.serving.messages import HOSTS, HostMemory, Ready, StayAwake

_LINGER_S = 60.0  # a machine stays awake so long after the last answer: another one often follows
_LOOK_EVERY_S = 0.5
_POLL_S = 0.1


class ServingHosts(Subscriber):
    """The memory of the hosts, and whether they are kept awake: while there are requests, and with
    `is_spread`, ranks on other machines than the driver's, as long as the model is loaded. One that
    falls asleep would be a lost host, and without the driver all ranks end."""

    topic = HOSTS

    def __init__(
        self,
        frontend: Frontend,
        *,
        is_spread: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._frontend = frontend
        self._is_spread = is_spread
        self._clock = clock
        self._driver: Driver | None = None
        self._busy_until_s = 0.0
        self._is_awake = False
        self._closing = contextlib.ExitStack()
        self._switch = self._closing.enter_context(AwakeSwitch())

    def on_start(self, driver: Driver) -> None:
        """New ranks: none is kept awake yet; loading counts as a request."""
        self._driver, self._is_awake = driver, False
        self._busy_until_s = self._clock() + _LINGER_S

    def on_message(self, rank: int, message: TaskMessage) -> None:
        """A report of a host's memory."""
        report = decode_data(message, HostMemory)
        if report.rank != rank:
            raise ProtocolError(f"sent the memory of rank {report.rank}")
        self._frontend.note_memory(report)

    def on_poll(self) -> None:
        """Keep the machines awake while they are needed, and a while longer."""
        now = self._clock()
        if (
            self._is_spread or self._frontend.num_requests
        ):  # a length: this is not the event loop's thread
            self._busy_until_s = now + _LINGER_S
        if (is_busy := now < self._busy_until_s) != self._is_awake:
            self._is_awake = is_busy
            self._switch.set(is_busy)
            assert self._driver is not None, "the driver has started"
            for rank in self._driver.ranks:
                self._driver.send(rank, task_message(HOSTS, StayAwake(is_busy)))

    def on_restart(self, rank: int) -> None:
        """Its new process keeps no machine awake yet."""
        if self._is_awake and self._driver is not None:
            self._driver.send(rank, task_message(HOSTS, StayAwake(is_on=True)))

    def on_end(self) -> None:
        """The ranks are gone; this machine need not stay awake for them."""
        self._switch.set(False)

    def close(self) -> None:
        """Let this machine sleep."""
        self._closing.close()


class Unloading(Subscriber):
    """Stops the ranks of an idle server, and starts new ones for the next request. `after_min`:
    minutes without a request, None for never."""

    def __init__(
        self,
        frontend: Frontend,
        after_min: float | None,
        stop_requests: Callable[[], int],
        say: Callable[[str], None],
    ) -> None:
        self._frontend = frontend
        self._after_s = None if after_min is None else 60 * after_min
        self._stop_requests = stop_requests
        self._say = say
        self._driver: Driver | None = None
        self._look_at_s = 0.0
        self.is_unloading = False
        self.interrupts = InterruptCounter()

    def on_start(self, driver: Driver) -> None:
        """Ranks are started."""
        self._driver, self.is_unloading = driver, False

    def on_poll(self) -> None:
        """Unload once nothing was asked for long enough; the event loop decides, as requests come
        there."""
        if self._after_s is None or self.is_unloading or time.monotonic() < self._look_at_s:
            return
        self._look_at_s = time.monotonic() + _LOOK_EVERY_S
        self._frontend.unload(self._after_s, self._begin)

    def _begin(self) -> None:
        self.is_unloading = True

    def num_stops(self) -> int:
        """The stop requests of users, also those between two drivers, and our own."""
        return self._stop_requests() + self.interrupts.count + self.is_unloading

    def has_unloaded(self, outcome: RunOutcome) -> bool:
        """Whether the ranks ended because they were idle, and no user has asked for it."""
        is_users = self._stop_requests() or self.interrupts.count
        is_users = is_users or (self._driver is not None and self._driver.num_interrupts)
        return self.is_unloading and outcome.exit_code == EXIT_STOPPED and not is_users

    def load_again(self, run: Callable[[Callable[[Ready], None]], RunOutcome]) -> RunOutcome:
        """Wait for a request, and run ranks for it; where they end before the model is loaded, wait
        for the next. `run` gets what to call once it is."""
        self._say(f"the model is unloaded: {self._frontend.reason}")
        while self._wait():
            self._say("a request has come, and the model is loaded again")
            self._frontend.begin_loading()
            began, is_loaded = time.monotonic(), threading.Event()

            def ready(_: Ready, began: float = began, loaded: threading.Event = is_loaded) -> None:
                if not loaded.is_set():
                    self._say(f"the model is loaded again after {time.monotonic() - began:.1f} s")
                loaded.set()

            outcome = run(ready)
            if is_loaded.is_set() or outcome.status != "failed":
                return outcome
            self._say(f"warning: it could not be loaded: {outcome.reason}; the next request tries")
            self._frontend.stay_unloaded(outcome.reason)
        return RunOutcome("stopped", EXIT_STOPPED)

    def _wait(self) -> bool:
        """Until a request comes; False where the user stops the server before."""
        while not self._frontend.is_wanted:
            if self.interrupts.count or self._stop_requests():
                return False
            time.sleep(_POLL_S)
        return True
