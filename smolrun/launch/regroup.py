"""Decides about the workers of a run whose ranks are all linked and which continues without lost
ones: every change of its ranks is a new generation of the mesh. Pure, as `elastic.py`, which
decides about the processes.

    generation 0: all ranks    RUNNING --- a rank ends, is lost by others, or is back ---+
                                  ^                                                      v
       roster of generation g + 1 to all that are there  <-- all listen --  regroup to the others

Survivors keep their process and what it holds. A change while a generation forms begins the next
one. A rank that is back interrupts all others, so it waits until they can pause, for a while, or
for the next loss. Rank 0 is needed to the end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from smolrun.launch.control import Address, RosterPeer
from smolrun.launch.elastic import ElasticSupervisor
from smolrun.launch.elastic_worker import Elasticity
from smolrun.launch.root_cause import RankState, RootCause, names, not_ready, pick_cause
from smolrun.launch.supervisor import Limits, RunPhase
from smolrun.launch.supervisor_events import (
    Action,
    Kill,
    Notify,
    PeerReported,
    RankInput,
    Regrouped,
    SendRegroup,
    SendRoster,
    WorkerReady,
)


@dataclass
class _Forming:
    """A generation that not all of its `ranks` listen for yet."""

    ranks: frozenset[int]
    since: float
    listening: dict[int, list[Address]]


class RegroupSupervisor(ElasticSupervisor):
    """An ElasticSupervisor that links all ranks that are there, anew whenever they change."""

    def __init__(
        self,
        states: Sequence[RankState],
        *,
        now: float,
        limits: Limits | None = None,
        policy: Elasticity | None = None,
        may_join: Callable[[], bool] = lambda: True,
    ) -> None:
        """`may_join()`: whether the ranks that are linked can pause now for one that is back."""
        super().__init__(states, now=now, limits=limits, policy=policy)
        self._may_join = may_join
        self._join_due: float | None = None  # until when a rank that is back waits
        self._generation = -1  # the latest that was announced
        self._members: frozenset[int] = frozenset()  # of the last one that was complete
        self._newcomers: frozenset[int] = frozenset()  # of these, who was not in the one before
        self._forming: _Forming | None = None
        self._used: set[int] = set()  # ranks whose process has been sent a roster
        # By the rank that reports: whom it has lost, in this generation.
        self._reports: dict[int, PeerReported] = {}
        self._reported_since: float | None = None

    def _note(self, state: RankState, item: RankInput) -> None:
        if isinstance(item, WorkerReady) and item.generation is not None:
            self._note_listening(state, item)
        elif isinstance(item, PeerReported):
            self._note_report(state, item)
        else:
            super()._note(state, item)

    def _note_listening(self, state: RankState, item: WorkerReady) -> None:
        """An answer to an earlier announcement means nothing any more."""
        forming, generation = self._forming, item.generation
        assert generation is not None, "it answers an announcement"
        if generation > self._generation:
            state.problem = state.problem or f"is ready for generation {generation}, which is none"
        elif forming is not None and generation == self._generation and item.rank in forming.ranks:
            forming.listening.setdefault(item.rank, item.addresses)

    def _note_report(self, state: RankState, item: PeerReported) -> None:
        pair = {item.rank, item.peer}
        if self._forming is None and item.generation == self._generation and pair <= self._members:
            self._reports.setdefault(state.rank, item)

    # -- the phases ----

    def _starting(self, now: float) -> list[Action]:
        """All must come: a rank that fails here would fail again."""
        late = [state for state in self._states if not state.addresses]
        if any(state.has_failed or state.is_over for state in self._states):
            self._close_for(pick_cause(self._states), now)
        elif self._interrupts:
            self._stop_before_it_began(now)
        elif not late:
            self.phase, self._limit = RunPhase.RUNNING, None
        elif self._has_passed(now):
            self._close_for(not_ready(late, self._limits.start_s), now)
        return []

    def _running(self, now: float) -> list[Action]:
        actions = super()._running(now)
        if self.phase is RunPhase.RUNNING:
            actions += self._regroup(now)
        if self.phase is RunPhase.RUNNING:
            self._look_for_shortage(now)
        return actions

    def _let_join(self, state: RankState, worker: object, now: float) -> list[Action]:
        return []  # it joins with the next generation

    def _start_again(self, state: RankState, *rest: object) -> list[Action]:
        self._used.discard(state.rank)
        return super()._start_again(state, *rest)  # type: ignore[arg-type]  # as it was called

    def _times(self) -> list[float]:
        times = super()._times()
        if self._join_due is not None:
            times.append(self._join_due)
        if self._forming is not None:
            times.append(self._forming.since + self._limits.start_s)
        elif self._reported_since is not None:
            times.append(self._reported_since + self._waits_s())
        return times

    # -- generations ----

    def _regroup(self, now: float) -> list[Action]:
        """What the generation of the ranks that are there needs now."""
        actions: list[Action] = []
        there = frozenset(state.rank for state in self._states if _is_there(state))
        forming = self._forming
        if forming is None and self._members and self._members < there:
            actions += self._look_whether_to_wait(there - self._members, now)
            if self._join_due is not None:
                there = self._members
        if there != (self._members if forming is None else forming.ranks):
            actions += self._announce(there, now)
        elif forming is None:
            return [*actions, *self._judge(now)]
        forming = self._forming
        assert forming is not None, "one was just announced, or forms already"
        if forming.listening.keys() == forming.ranks:
            actions += self._complete(forming, now)
        elif now >= forming.since + self._limits.start_s:
            late = min(forming.ranks - forming.listening.keys())
            waited = (
                f"did not leave generation {self._generation - 1} for {now - forming.since:.0f} s"
            )
            actions += self._end(late, waited, now)
        return actions

    def _look_whether_to_wait(self, back: frozenset[int], now: float) -> list[Action]:
        """Sets until when these wait; None: they join now."""
        if self._may_join() or (self._join_due is not None and now >= self._join_due):
            self._join_due = None
            return []
        if self._join_due is not None:
            return []
        # Its worker waits for a roster a little longer than a start may take.
        wait_s = min(self._policy.join_wait_s, self._limits.start_s)
        self._join_due = now + wait_s
        who = names([self._states[rank] for rank in sorted(back)])
        text = f"{who} can join again; that waits until the others can pause, {wait_s:g} s at most"
        return [Notify("info", text)]

    def _announce(self, there: frozenset[int], now: float) -> list[Action]:
        """A new process listens already; the others are asked to."""
        self._join_due = None
        self._generation += 1
        new = {rank: self._states[rank].addresses for rank in there - self._used}
        self._forming = _Forming(there, now, new)
        self._reports, self._reported_since = {}, None
        return [SendRegroup(rank, self._generation) for rank in sorted(there & self._used)]

    def _complete(self, forming: _Forming, now: float) -> list[Action]:
        """All listen: each gets the roster, and they connect."""
        ranks = sorted(forming.ranks)
        peers = [
            RosterPeer(rank, self._states[rank].host, forming.listening[rank]) for rank in ranks
        ]
        actions: list[Action] = [SendRoster(peers, rank, self._generation) for rank in ranks]
        for rank in sorted(forming.ranks - self._used):
            actions += self._joined(self._states[rank], self._elastic[rank], now)
        self._newcomers = forming.ranks - self._members
        self._members, self._forming = forming.ranks, None
        self._used |= forming.ranks
        return [*actions, Regrouped(ranks, self._generation)]

    # -- who is lost ----

    def _waits_s(self) -> float:
        """From the first report to the decision: a rank that has ended is seen to be gone by then;
        less if all others have said whom they lost."""
        accused = {report.peer for report in self._reports.values()}
        is_clear = self._members <= self._reports.keys() | accused
        return self._limits.settle_s if is_clear else self._limits.grace_s

    def _judge(self, now: float) -> list[Action]:
        """Ends a rank that its peers have lost, although its process has not ended: it is frozen or
        cut off."""
        if not self._reports:
            return []
        if self._reported_since is None:
            self._reported_since = now
        if now < self._reported_since + self._waits_s():
            return []
        report = min(self._reports.values(), key=self._weight)
        return self._end(report.peer, f"is lost: {report.reason}", now)

    def _weight(self, report: PeerReported) -> tuple[int | bool, ...]:
        """Of all reports the one with the least weight names the rank to end: not rank 0, by one
        that saw it itself, one that reports nothing, one that most have lost, one that is new."""
        lost = report.peer
        votes = sum(other.peer == lost for other in self._reports.values())
        is_second_hand = report.reported_by is not None
        is_new = lost in self._newcomers
        return (lost == 0, is_second_hand, lost in self._reports, -votes, not is_new, lost)

    def _end(self, rank: int, what: str, now: float) -> list[Action]:
        state, worker = self._states[rank], self._elastic[rank]
        if rank == 0:
            reason = f"{state.label} {what}; log: {state.log}"
            self._close_for(RootCause(0, state.host, reason, is_lost=True), now)
            return []
        worker.blamed = what
        # One that was never linked has not joined: after some such attempts it is given up.
        worker.has_joined = rank not in self._newcomers
        state.killed = True
        return [Kill(rank), *self._regroup(now)]


def _is_there(state: RankState) -> bool:
    return bool(state.addresses) and not (state.has_failed or state.is_over or state.killed)
