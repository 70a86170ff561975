"""Runs the supervisor against real workers: signals and the clock come in here.

All inputs pass through one queue, and this loop alone touches the supervisor. What happens goes to
an ordered list of subscribers. Every wait has a deadline, and no worker is left running when the
loop ends, even by an error of the driver itself.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from smolrun.errors import ProtocolError
from smolrun.events import Event, Note
from smolrun.launch.control import (
    Message,
    RegroupMessage,
    RosterMessage,
    StopMessage,
    TaskMessage,
)
from smolrun.launch.elastic import ElasticSupervisor
from smolrun.launch.elastic_worker import Elasticity
from smolrun.launch.hosts import WorkerHost, WorkerPlan
from smolrun.launch.regroup import RegroupSupervisor
from smolrun.launch.root_cause import RankState
from smolrun.launch.supervisor import Limits, RunPhase, Supervisor
from smolrun.launch.supervisor_events import (
    Action,
    Answering,
    DriverFailed,
    Exited,
    Finish,
    HostSilent,
    Input,
    Interrupted,
    Kill,
    Notify,
    NotStarted,
    ProtocolViolation,
    Regrouped,
    Reported,
    RestartWorker,
    RunOutcome,
    SendRegroup,
    SendRoster,
    SendStop,
    TaskMessageReceived,
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


class Subscriber:
    """Receives what happens in a run. The driver calls all subscribers in the order of its list, on
    its own thread; only `on_end` may block. `topic`: of the task messages that it gets."""

    topic: str | None = None

    def on_start(self, driver: Driver) -> None:
        """The workers are about to be started."""

    def on_poll(self) -> None:
        """At least every 0.1 s, and before each event."""

    def on_event(self, event: Event) -> None:
        """A rank, or the driver itself, reported an event."""

    def on_message(self, rank: int, message: TaskMessage) -> None:
        """A rank sent a task message. A ProtocolError ends the run, with that rank as the cause."""

    def on_exit(self, rank: int) -> None:
        """The process of a rank has ended, or none could be started."""

    def on_restart(self, rank: int) -> None:
        """A rank is about to get a new process: its old one has ended, and what it had is lost."""

    def on_regrouped(self, ranks: list[int], generation: int) -> None:
        """These ranks are linked from now on, where the links are a group: at the beginning, and
        after every change of them."""

    def may_stop(self) -> bool:
        """The user has asked for a stop: whether the ranks may be asked now. It is asked again at
        every poll; a second Ctrl-C does not wait for it."""
        return True

    def may_join(self) -> bool:
        """A rank is back, and its joining would interrupt all others: whether it may now. It is
        asked again at every poll, for a while."""
        return True

    def on_end(self) -> None:
        """No worker runs any more. Called once, also when the run failed."""


class Driver:
    """One run's workers, from start to end."""

    def __init__(
        self,
        plans: Sequence[WorkerPlan],
        place: Callable[[WorkerPlan], tuple[WorkerPlan, WorkerHost]],
        subscribers: Sequence[Subscriber] = (),
        *,
        limits: Limits | None = None,
        stop_requests: Callable[[], int] = lambda: 0,
        elastic: Elasticity | None = None,
        has_steps: bool = True,
    ) -> None:
        """`plans` are in rank order. `place(plan)` gives the host to start a worker on, with the
        plan as it is now; it is called again for each new process of a rank.

        `stop_requests()` is the number of stop requests by other processes, each like one Ctrl-C.
        With `elastic` the run continues without lost ranks, and starts them again. `has_steps`: the
        ranks report steps, so that a failure before the first one can be named so.
        """
        self._plans = plans
        self._place = place
        self._subscribers = subscribers
        self._limits = limits or Limits()
        self._inputs = InputQueue()
        self._over = threading.Event()
        self._elastic = elastic
        self._has_steps = has_steps
        self._monitors: list[WorkerMonitor] = []
        for plan in plans:
            self._monitors.append(self._monitor(plan))
        self._interrupts = InterruptCounter()
        self._stop_requests = stop_requests
        self._requested = 0
        self._requests_due = 0.0

    @property
    def ranks(self) -> list[int]:
        """All ranks of the run."""
        return [plan.rank for plan in self._plans]

    @property
    def num_interrupts(self) -> int:
        """How often the user has pressed Ctrl-C, or sent what means the same."""
        return self._interrupts.count

    def run(self) -> RunOutcome:
        """Run all workers to their end; none is left when this returns or raises."""
        try:
            with self._interrupts.installed():
                try:
                    self._begin()
                    outcome = self._loop()
                finally:
                    self._end()
        finally:
            for subscriber in self._subscribers:
                subscriber.on_end()
        if outcome.failed_rank is None:
            return outcome
        return replace(outcome, log_tail=self._monitors[outcome.failed_rank].tail)

    def send(self, rank: int, message: Message, on_sent: Callable[[], None] | None = None) -> None:
        """Queue a message to a rank, from any thread; never blocks. `on_sent` is called from
        another thread once the rank's pipe has taken all of it."""
        self._monitors[rank].send(message, on_sent)

    def note_answering(self, rank: int, *, is_answering: bool) -> None:
        """Whether a rank answers what it is asked; from any thread. One of a run that continues
        without it is ended where it stays silent."""
        self._post(Answering(rank, is_answering))

    def fail(self, problem: str) -> None:
        """End the run as failed, with no rank as the cause; from any thread."""
        self._post(DriverFailed(problem))

    def _begin(self) -> None:
        for subscriber in self._subscribers:
            subscriber.on_start(self)
        for monitor in self._monitors:
            monitor.send(monitor.plan.start)
            monitor.begin()
        threading.Thread(target=self._renew_leases, name="smolrun-leases", daemon=True).start()

    def _publish(self, event: Event) -> None:
        for subscriber in self._subscribers:
            subscriber.on_event(event)

    def _loop(self) -> RunOutcome:
        states = [RankState(p.rank, p.host, str(p.log_path), self._has_steps) for p in self._plans]
        supervisor = self._supervisor(states)
        num_interrupts = 0
        while True:
            item = self._next(supervisor.deadline)
            for subscriber in self._subscribers:
                subscriber.on_poll()
            if isinstance(item, Reported):
                self._publish(item.event)
            elif isinstance(item, Exited | NotStarted):
                for subscriber in self._subscribers:
                    subscriber.on_exit(item.rank)
            asked = self._asked_to_stop()
            if asked > num_interrupts and (self._may_stop() or asked > 1):
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
        if self._elastic.links == "group":
            return RegroupSupervisor(
                states,
                now=now,
                limits=self._limits,
                policy=self._elastic,
                may_join=lambda: all(one.may_join() for one in self._subscribers),
            )
        return ElasticSupervisor(states, now=now, limits=self._limits, policy=self._elastic)

    def _monitor(self, plan: WorkerPlan) -> WorkerMonitor:
        """The monitor of one process of a rank; inputs of an earlier process are dropped."""

        def post(item: Input, num_bytes: int) -> None:
            if self._monitors[plan.rank] is monitor:
                self._post(item, num_bytes)

        monitor = WorkerMonitor(*self._place(plan), post)
        return monitor

    def _start_again(self, rank: int) -> None:
        monitor = self._monitors[rank] = self._monitor(self._plans[rank])
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

    def _may_stop(self) -> bool:
        """Every subscriber is asked, as each then begins to finish what it has."""
        answers = [subscriber.may_stop() for subscriber in self._subscribers]
        return all(answers)

    def _next(self, deadline: float | None) -> Input | None:
        wait_s = (
            _POLL_S if deadline is None else min(_POLL_S, max(0.0, deadline - time.monotonic()))
        )
        item = self._inputs.get(wait_s)
        return self._route(item) if isinstance(item, TaskMessageReceived) else item

    def _route(self, item: TaskMessageReceived) -> Input | None:
        """Hand a task message to its subscriber; the violation, if it must not have been sent."""
        for subscriber in self._subscribers:
            if subscriber.topic == item.message.topic:
                try:
                    subscriber.on_message(item.rank, item.message)
                except ProtocolError as error:
                    return ProtocolViolation(item.rank, str(error))
                return None
        topic = item.message.topic
        return ProtocolViolation(
            item.rank, f"sent a message of topic {topic!r}, which this task does not have"
        )

    def _perform(self, actions: Sequence[Action]) -> RunOutcome | None:
        if any(isinstance(action, SendStop) for action in actions):
            self._publish(Note("info", "stopping at the next agreed step; Ctrl-C again: at once"))
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
                        roster = RosterMessage(peers=action.peers, generation=action.generation)
                        monitor.send(roster)
            elif isinstance(action, SendRegroup):
                message = RegroupMessage(generation=action.generation)
                self._monitors[action.rank].send(message)
            elif isinstance(action, Regrouped):
                for subscriber in self._subscribers:
                    subscriber.on_regrouped(action.ranks, action.generation)
            elif isinstance(action, RestartWorker):
                self._start_again(action.rank)
                for subscriber in self._subscribers:
                    subscriber.on_restart(action.rank)
            elif isinstance(action, Notify):
                self._publish(Note(action.level, action.message))
        return None

    def _post(self, item: Input, num_bytes: int = 0) -> None:
        """For the monitors' threads; waits while the inbox is full, so a flood is slowed down."""
        while not self._over.is_set() and not self._inputs.put(item, num_bytes, _POLL_S):
            pass

    def _renew_leases(self) -> None:
        while not self._over.wait(self._limits.lease_every_s):
            for monitor in self._monitors:
                monitor.renew_lease()

    def _end(self) -> None:
        """Whatever happened: all workers are killed and, within a few seconds, seen to be gone."""
        for monitor in self._monitors:
            monitor.kill()
        self._over.set()
        give_up = time.monotonic() + _LAST_JOIN_S
        for monitor in self._monitors:
            if not monitor.join(max(0.0, give_up - time.monotonic())):
                log.warning("no sign that rank %d has ended", monitor.plan.rank)
