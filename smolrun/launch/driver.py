"""Runs the supervisor against real workers: signals and the clock come in here.

Everything that happens comes through one inbox; this loop is the only one that touches the
supervisor. Every wait has a deadline, and whatever ends the loop, an error of our own included, no
worker is left running.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence

from smolrun.errors import ProtocolError
from smolrun.events import Event, Note
from smolrun.launch.control import LEASE_EVERY_S, RosterMessage, StopMessage
from smolrun.launch.elastic import ElasticSupervisor
from smolrun.launch.elastic_worker import Elasticity
from smolrun.launch.hosts import WorkerHost, WorkerPlan
from smolrun.launch.root_cause import RankState
from smolrun.launch.stream_server import RowSource, StreamServer
from smolrun.launch.supervisor import Limits, RunPhase, Supervisor
from smolrun.launch.supervisor_events import (
    Action,
    Finish,
    HostSilent,
    Input,
    Interrupted,
    Kill,
    Notify,
    ProtocolViolation,
    ReaderFailed,
    Reported,
    RestartWorker,
    RunOutcome,
    SendRoster,
    SendStop,
    WantsRows,
)
from smolrun.launch.worker_monitor import WorkerMonitor

# Of lines that wait to be handled; one more of any length is accepted. A worker that sends more has
# to wait. The objects that are made of a line may take 30 times its bytes ("[]" is the worst).
_INBOX_BYTES = 16 << 20
_ITEM_BYTES = 1024  # what an input takes up beside its line, roughly
_POLL_S = 0.1  # how late a Ctrl-C may be noticed
_REQUESTS_EVERY_S = 0.5  # how late a wish of another process may be
_SAME_CTRL_C_S = 0.05  # one Ctrl-C can come twice: from the terminal and a wrapper such as make
_LAST_JOIN_S = 5.0

log = logging.getLogger(__name__)


class InterruptCounter:
    """Counts Ctrl-C and what means the same: SIGTERM, or the terminal being closed."""

    def __init__(self) -> None:
        self.count = 0
        self._last = float("-inf")

    def __call__(self, *_: object) -> None:
        """The signal handler; it only counts, as the main thread may hold any lock right now."""
        now = time.monotonic()
        if now - self._last > _SAME_CTRL_C_S:
            self.count += 1
            self._last = now

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Take the signals over; only the main thread can, elsewhere this does nothing."""
        found = [
            getattr(signal, name, None) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")
        ]
        before = {}
        if threading.current_thread() is threading.main_thread():
            # What was ignored stays ignored: nohup does that to SIGHUP.
            wanted = [
                number
                for number in found
                if number and signal.getsignal(number) is not signal.SIG_IGN
            ]
            before = {number: signal.signal(number, self) for number in wanted}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class InputQueue:
    """Inputs of all workers in order, for one reader; `most_bytes` of lines, and no more, wait."""

    def __init__(self, most_bytes: int = _INBOX_BYTES) -> None:
        self._most_bytes = most_bytes
        self._changed = threading.Condition()
        self._items: deque[tuple[Input, int]] = deque()
        self._bytes = 0

    def put(self, item: Input, num_bytes: int, timeout_s: float) -> bool:
        """Waits while it is full, and takes one line of any length if it is not; False if it was
        full until the deadline."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._bytes < self._most_bytes, timeout_s):
                return False
            self._items.append((item, num_bytes + _ITEM_BYTES))
            self._bytes += num_bytes + _ITEM_BYTES
            self._changed.notify_all()
            return True

    def get(self, timeout_s: float) -> Input | None:
        """The oldest input, waited for; None at the deadline."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._items, timeout_s):
                return None
            item, num_bytes = self._items.popleft()
            self._bytes -= num_bytes
            self._changed.notify_all()
            return item


class Driver:
    """One run's workers, from start to end."""

    def __init__(
        self,
        plans: Sequence[WorkerPlan],
        host_of: Callable[[WorkerPlan], WorkerHost],
        *,
        listen: Callable[[Event], None],
        limits: Limits | None = None,
        lease_every_s: float = LEASE_EVERY_S,
        rows: RowSource | None = None,
        stop_requests: Callable[[], int] = lambda: 0,
        meanwhile: Callable[[], None] = lambda: None,
        elastic: Elasticity | None = None,
        plan_again: Callable[[WorkerPlan], WorkerPlan] = lambda plan: plan,
    ) -> None:
        """`plans` are in rank order. `listen` gets the events, in this thread; it must be quick.
        `meanwhile` is called there too, a few times a second at least.

        `rows` is what the ranks may ask for where the data is a stream. `stop_requests` tells how
        often another process asked this run to stop, which counts as so many Ctrl-C. With `elastic`
        the run goes on without ranks that are lost, and starts them again: `plan_again` and
        `host_of` are then asked anew.
        """
        self._plans = plans
        self._listen = listen
        self._lease_every_s = lease_every_s
        self._limits = limits or Limits()
        self._inputs = InputQueue()
        self._over = threading.Event()
        self._host_of = host_of
        self._elastic = elastic
        self._plan_again = plan_again
        self._monitors: list[WorkerMonitor] = []
        for plan in plans:
            self._monitors.append(self._monitor(plan))
        self._interrupts = InterruptCounter()
        self._rows = rows
        self._server: StreamServer | None = None
        self._stop_requests = stop_requests
        self._requested = 0
        self._requests_due = 0.0
        self._meanwhile = meanwhile

    def run(self) -> RunOutcome:
        """Start all workers and tell how it ended; none is left when this returns or raises."""
        with self._interrupts.installed():
            try:
                self._begin()
                return self._loop()
            finally:
                self._end()

    def log_tail(self, rank: int) -> list[str]:
        """The last lines that a rank wrote to its log."""
        return self._monitors[rank].tail

    def _begin(self) -> None:
        if self._rows is not None:
            self._server = StreamServer(
                self._rows,
                [plan.rank for plan in self._plans],
                send=lambda rank, message, sent: self._monitors[rank].send(message, sent),
                fail=lambda problem: self._post(ReaderFailed(problem)),
            )
        for monitor in self._monitors:
            monitor.send(monitor.plan.start)
            monitor.begin()
        threading.Thread(target=self._renew_leases, name="smolrun-leases", daemon=True).start()

    def _loop(self) -> RunOutcome:
        states = [RankState(p.rank, p.host, str(p.log_path)) for p in self._plans]
        supervisor = self._supervisor(states)
        num_interrupts = 0
        while True:
            item = self._next(supervisor.deadline)
            self._meanwhile()
            if isinstance(item, Reported):
                self._listen(item.event)
            if self._asked_to_stop() > num_interrupts:
                num_interrupts += 1
                actions = supervisor.handle(Interrupted(), time.monotonic())
                if outcome := self._perform(actions):
                    return outcome
            now = time.monotonic()
            actions = self._look_for_silence(supervisor, now)
            actions += supervisor.advance(now) if item is None else supervisor.handle(item, now)
            if outcome := self._perform(actions):
                return outcome

    def _supervisor(self, states: Sequence[RankState]) -> Supervisor:
        now = time.monotonic()
        if self._elastic is None:
            return Supervisor(states, now=now, limits=self._limits)
        return ElasticSupervisor(states, now=now, limits=self._limits, policy=self._elastic)

    def _monitor(self, plan: WorkerPlan) -> WorkerMonitor:
        """Who looks after one process of a rank; what is left of an earlier one is not heard."""

        def post(item: Input, num_bytes: int) -> None:
            if self._monitors[plan.rank] is monitor:
                self._post(item, num_bytes)

        monitor = WorkerMonitor(plan, self._host_of(plan), post)
        return monitor

    def _start_again(self, rank: int) -> None:
        plan = self._plan_again(self._plans[rank])
        monitor = self._monitors[rank] = self._monitor(plan)
        monitor.send(monitor.plan.start)
        monitor.begin()

    def _look_for_silence(self, supervisor: Supervisor, now: float) -> list[Action]:
        """While the cause of a failure is sought, it counts who does not answer us either."""
        if supervisor.phase is not RunPhase.FAILING:
            return []
        silent = [HostSilent(one.plan.rank) for one in self._monitors if one.is_silent]
        return [action for item in silent for action in supervisor.handle(item, now)]

    def _asked_to_stop(self) -> int:
        """How often, by signals and by other processes together."""
        now = time.monotonic()
        if now >= self._requests_due:
            self._requests_due = now + _REQUESTS_EVERY_S
            self._requested = self._stop_requests()
        return self._interrupts.count + self._requested

    def _next(self, deadline: float | None) -> Input | None:
        wait_s = (
            _POLL_S if deadline is None else min(_POLL_S, max(0.0, deadline - time.monotonic()))
        )
        item = self._inputs.get(wait_s)
        return self._pass_on(item) if isinstance(item, WantsRows) else item

    def _pass_on(self, item: WantsRows) -> Input | None:
        """To the server; what is left for the supervisor is a wish that cannot be met."""
        if self._server is None:
            return ProtocolViolation(
                item.rank, "asks for rows of a stream, but the data is no stream"
            )
        try:
            self._server.want(item.rank, item.wanted)
        except ProtocolError as error:
            return ProtocolViolation(item.rank, str(error))
        return None

    def _perform(self, actions: Sequence[Action]) -> RunOutcome | None:
        if any(isinstance(action, SendStop) for action in actions):
            self._listen(Note("info", "stopping at the next agreed step; Ctrl-C again: at once"))
        for action in actions:
            if isinstance(action, Finish):
                return action.outcome
            if isinstance(action, Kill):
                self._monitors[action.rank].kill()
            elif isinstance(action, SendStop):
                self._monitors[action.rank].send(StopMessage())
            elif isinstance(action, SendRoster):
                for monitor in self._monitors:
                    if action.to in (None, monitor.plan.rank):
                        monitor.send(RosterMessage(peers=action.peers))
            elif isinstance(action, RestartWorker):
                self._start_again(action.rank)
            elif isinstance(action, Notify):
                self._listen(Note(action.level, action.message))
        return None

    def _post(self, item: Input, num_bytes: int = 0) -> None:
        """For the monitors' threads; waits while the inbox is full, so a flood is slowed down."""
        while not self._over.is_set() and not self._inputs.put(item, num_bytes, _POLL_S):
            pass

    def _renew_leases(self) -> None:
        while not self._over.wait(self._lease_every_s):
            for monitor in self._monitors:
                monitor.renew_lease()

    def _end(self) -> None:
        """Whatever happened: all workers are killed and, within a few seconds, seen to be gone."""
        for monitor in self._monitors:
            monitor.kill()
        self._over.set()
        if self._server is not None:
            self._server.close()
        give_up = time.monotonic() + _LAST_JOIN_S
        for monitor in self._monitors:
            if not monitor.join(max(0.0, give_up - time.monotonic())):
                log.warning("no sign that rank %d has ended", monitor.plan.rank)
