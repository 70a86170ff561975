"""Decides what the driver does with the workers of an elastic run: it continues without lost ones
and restarts them. The same interface as Supervisor, and as pure.

    rank 0 ready: its listener is open --> RUNNING -- first Ctrl-C: stop --> STOPPING
                                             |                                   |
    worker ready: roster of rank 0 and it    | rank 0 reported, or is lost, or too few are left
    worker lost: reported once, restarted    v                                   |
                                          CLOSING <------------------------------+

Rank 0 is the server: its end is the end of the run. Without links between ranks none is, and each
gets a roster of itself alone. Which ranks train, and on what, is decided by the algorithm; here
only their processes count. Ranks that are all linked: `regroup.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from smolrun.events import Membership
from smolrun.launch.control import RosterPeer
from smolrun.launch.elastic_worker import Elasticity, ElasticWorker, departure, is_away
from smolrun.launch.root_cause import RankState, RootCause, names, not_ready, pick_cause
from smolrun.launch.supervisor import Limits, RunPhase, Supervisor, ended, failed_by
from smolrun.launch.supervisor_events import (
    Action,
    Answering,
    Input,
    Kill,
    Notify,
    Reported,
    RestartWorker,
    RunOutcome,
    SendRoster,
    SendStop,
)


class ElasticSupervisor(Supervisor):
    """A Supervisor whose workers, ranks 1 and up (without links all ranks), are each restarted on
    their own."""

    def __init__(
        self,
        states: Sequence[RankState],
        *,
        now: float,
        limits: Limits | None = None,
        policy: Elasticity | None = None,
    ) -> None:
        super().__init__(states, now=now, limits=limits)
        self.departures: list[dict[str, Any]] = []
        self._policy = policy or Elasticity()
        self._elastic = [ElasticWorker(now, self._limits.start_s, self._policy) for _ in states]
        self._began = now
        self._limit: float | None = now + self._limits.start_s  # of rank 0's start, or of an end
        self._is_parting = False
        self._short_since: float | None = now  # since when fewer than min_ranks are at work
        self._was_enough = False
        self._last_cause: RootCause | None = None

    def handle(self, item: Input, now: float) -> list[Action]:
        """See Supervisor."""
        if isinstance(item, Reported) and isinstance(item.event, Membership):
            # A process that joins comes after the loss of the one before it, also in this order.
            worker = self._elastic[item.event.rank]
            worker.unlinked = None if item.event.is_here else now
        elif isinstance(item, Answering):
            self._elastic[item.rank].unlinked = None if item.is_answering else now
        return super().handle(item, now)

    def advance(self, now: float) -> list[Action]:
        """See Supervisor."""
        actions = super().advance(now)
        if self.phase in (RunPhase.STARTING, RunPhase.RUNNING, RunPhase.STOPPING):
            self.deadline = min(self._times(), default=None)
        return actions

    def _times(self) -> list[float]:
        """When something is due by itself."""
        times = [time for state, worker in self._workers() for time in worker.times(state)]
        if self._limit is not None:
            times.append(self._limit)
        if self._short_since is not None:
            times.append(self._short_since + self._patience_s())
        return times

    def _workers(self) -> list[tuple[RankState, ElasticWorker]]:
        pairs = list(zip(self._states, self._elastic, strict=True))
        return pairs if self._server is None else pairs[1:]

    @property
    def _server(self) -> RankState | None:
        """The rank that is needed to the end."""
        return None if self._policy.links == "none" else self._states[0]

    # -- the phases ----

    def _starting(self, now: float) -> list[Action]:
        server = self._server
        if server is None:
            self.phase, self._limit = RunPhase.RUNNING, None
        elif server.has_failed or server.is_over:
            self._fail(now)
        elif self._interrupts:
            self._stop_before_it_began(now)
        elif server.addresses:
            self.phase, self._limit = RunPhase.RUNNING, None
            self._elastic[0].has_joined = True
            return [SendRoster([_peer(server)], to=0)]
        elif self._has_passed(now):
            self._close_for(not_ready([server], self._limits.start_s), now)
        else:
            return self._tend(now)
        return []

    def _running(self, now: float) -> list[Action]:
        server = self._server
        if self._hurry:
            self._stop_at_once("stopped at once by the user", now)
        elif server is not None and server.has_failed:
            self._fail(now)
        elif self._is_done():
            return self._part(now)
        elif self._interrupts and not self._has_begun:
            self._stop_before_it_began(now)
        elif self._interrupts and self.phase is RunPhase.RUNNING:
            self._start_nobody_again(now + self._limits.stop_s)
            return [SendStop(state.rank) for state in self._states if not state.is_over]
        elif self.phase is RunPhase.STOPPING and self._has_passed(now):
            late = [state for state in self._states if not state.is_over]
            self._stop_at_once(self._not_stopped(late if server is None else [server]), now)
        else:
            actions = self._tend(now)
            if self.phase is RunPhase.RUNNING:
                self._look_for_shortage(now)
            return actions
        return []

    def _is_done(self) -> bool:
        """Whether the server, or without links every rank, has come to its end."""
        if self._server is not None:
            return self._server.result is not None
        is_stopping = self.phase is RunPhase.STOPPING
        return all(s.is_over and (is_stopping or not s.has_failed) for s in self._states)

    def _part(self, now: float) -> list[Action]:
        """The server is done: workers may still report their result, then they end."""
        if not self._is_parting:
            self._is_parting = True
            self._start_nobody_again(now + self._policy.farewell_s)
        awaited = [s for s, worker in self._workers() if worker.has_joined and not s.is_over]
        if awaited and not self._has_passed(now):
            return []
        ends = self._states if self._server is None else [self._server]
        statuses = {state.result.status for state in ends if state.result}
        self._close(now, ended(is_stopped="stopped" in statuses))
        return []

    def _start_nobody_again(self, limit: float) -> None:
        """The run comes to its end, until `limit`."""
        self.phase, self._limit, self._short_since = RunPhase.STOPPING, limit, None
        for worker in self._elastic:
            worker.due = None

    def _has_passed(self, now: float) -> bool:
        return self._limit is not None and now >= self._limit

    def _fail(self, now: float) -> None:
        """Rank 0 is at an end, and so is the run."""
        fine = [state for state in self._states[1:] if not state.has_failed]
        self._close_for(pick_cause([self._states[0], *fine]), now)

    def _close_for(self, cause: RootCause, now: float) -> None:
        self._close(now, failed_by(cause))
        # Nothing is saved any more, so workers are ended without waiting for a result.
        self.deadline = now + min(self._limits.exit_s, self._limits.grace_s)

    def _final(self, alive: Sequence[RankState]) -> RunOutcome:
        return replace(super()._final(alive), departures=self.departures)

    # -- workers ----

    def _tend(self, now: float) -> list[Action]:
        return [
            action
            for state, worker in self._workers()
            for action in self._tend_one(state, worker, now)
        ]

    def _tend_one(self, state: RankState, worker: ElasticWorker, now: float) -> list[Action]:
        """What one worker needs now."""
        if worker.due is not None:
            return self._start_again(state, worker, now) if now >= worker.due else []
        if state.is_gone:
            is_news = state.has_failed and not worker.is_given_up
            return self._has_gone(state, worker, now) if is_news else []
        worker.look_at_clock(state, now)
        is_useless = state.has_failed or worker.is_late or worker.stands_still
        if is_useless and not state.killed:
            state.killed = True
            return [Kill(state.rank)]
        if state.addresses and not worker.has_joined and self.phase is RunPhase.RUNNING:
            return self._let_join(state, worker, now)
        return []

    def _start_again(self, state: RankState, worker: ElasticWorker, now: float) -> list[Action]:
        worker.starts_again(now)
        self._states[state.rank] = RankState(state.rank, state.host, state.log, state.has_steps)
        return [RestartWorker(state.rank)]

    def _let_join(self, state: RankState, worker: ElasticWorker, now: float) -> list[Action]:
        known = [state] if self._server is None else [self._server, state]
        roster = SendRoster([_peer(one) for one in known], to=state.rank)
        return [roster, *self._joined(state, worker, now)]

    def _joined(self, state: RankState, worker: ElasticWorker, now: float) -> list[Action]:
        """It takes part from now on; reported if it was away."""
        away_s = worker.joins(now, self._began)
        if away_s is None:
            return []
        text = f"{state.label} is back after {away_s:.0f} s; {self._count()} are at work"
        return [Notify("info", text)]

    def _has_gone(self, state: RankState, worker: ElasticWorker, now: float) -> list[Action]:
        """Its process has ended too early: reported once, however many restarts it takes."""
        cause = self._last_cause = worker.ended(state, now)
        is_first = worker.row is None
        if worker.row is None:
            worker.row = departure(state, cause, now - self._began)
            self.departures.append(worker.row)
        if self.phase is RunPhase.STOPPING:
            worker.give_up()
            return []
        if worker.is_given_up:
            worker.row["given_up"] = True
            text = f"that was {worker.quick} times in a row, so it is not started again"
            return [Notify("warning", f"{cause.reason}; {text}; {self._count()} are at work")]
        if not is_first:
            return []
        again = "tried again until it answers" if is_away(state) else "started again"
        text = f"the run continues with {self._count()}; rank {state.rank} is {again}"
        return [Notify("warning", f"{cause.reason}; {text}")]

    # -- how many ----

    def _at_work(self) -> list[RankState]:
        pairs = zip(self._states, self._elastic, strict=True)
        return [state for state, worker in pairs if worker.has_joined and not state.has_failed]

    def _count(self) -> str:
        count = sum(not state.has_failed for state in self._states)
        return f"{count} of {len(self._states)} ranks"

    def _patience_s(self) -> float:
        """How long there may be too few: at the beginning, as long as a start may take."""
        return self._policy.wait_s if self._was_enough else self._limits.start_s

    def _look_for_shortage(self, now: float) -> None:
        """Ends the run where too few ranks are there for too long, or can be there at all."""
        least, there = min(self._policy.min_ranks, len(self._states)), len(self._at_work())
        if there >= least:
            self._short_since, self._was_enough = None, True
            return
        if self._short_since is None:
            self._short_since = now
        can_be = len(self._states) - sum(worker.is_given_up for worker in self._elastic)
        if can_be < least:
            why = f"{can_be} of the {least} ranks that it needs are left"
        elif now >= self._short_since + self._patience_s():
            why = (
                f"only {there} of the {least} ranks that it needs were there for "
                f"{self._patience_s():g} s"
            )
        else:
            return
        missing = [state for state in self._states if state not in self._at_work()]
        cause = self._last_cause or RootCause(
            missing[0].rank, missing[0].host, f"{names(missing)} never joined", is_lost=True
        )
        reason = f"{cause.reason}; {why} (algorithm.min_ranks={self._policy.min_ranks})"
        self._close_for(replace(cause, reason=reason), now)


def _peer(state: RankState) -> RosterPeer:
    return RosterPeer(state.rank, state.host, state.addresses)
