"""One worker of an elastic run, over all its processes: when the next one is started, and when no
more are. Pure; `elastic.py` asks it.

    process 1 ends -- 1 s --> process 2 ends at once -- 2 s --> process 3 ... -- given up
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from smolrun.launch.control import Links
from smolrun.launch.root_cause import RankState, RootCause, not_ready, pick_cause


@dataclass(frozen=True)
class Elasticity:
    """How far a run may shrink, and how lost ranks are started again. Times are in seconds.

    `links`: of a star, or of a group, rank 0 is needed to the end; without links no rank is.

    `min_ranks` counts rank 0 too; fewer may be there for `wait_s`. A rank that ends before it has
    joined for `quick_s`, or by an error of its own, has died quickly; after `max_quick` such deaths
    in a row it is given up. One whose host is out of reach is never given up, and asked for every
    `ask_s`. A process that the server has lost ends by itself once it notices; one that has not
    within `wake_s`, because it is suspended, is ended. `farewell_s`: from the server's result to
    the others'. `join_wait_s`: a rank of a group that is back waits at most so long until the
    others can pause.
    """

    min_ranks: int = 1
    links: Links = "star"
    wait_s: float = 60.0
    first_pause_s: float = 1.0
    longest_pause_s: float = 8.0
    ask_s: float = 2.0
    wake_s: float = 30.0
    quick_s: float = 10.0
    max_quick: int = 5
    farewell_s: float = 15.0
    join_wait_s: float = 60.0


@dataclass
class ElasticWorker:
    """What is known of a worker beyond its present process."""

    since: float  # when this process was started, or joined
    start_s: float  # how long a start may take
    policy: Elasticity
    has_joined: bool = False  # it has the address of rank 0
    due: float | None = None  # when it is started again; None while it lives, and when it is not
    is_late: bool = False  # it was not ready in time
    unlinked: float | None = None  # since when the server has lost this process
    stands_still: bool = False  # for so long that it is ended
    blamed: str | None = None  # why it is ended, where its peers lost it
    is_given_up: bool = False
    quick: int = 0  # quick deaths in a row
    row: dict[str, Any] | None = None  # of its departure, until it is back

    def look_at_clock(self, state: RankState, now: float) -> None:
        """Whether it is too late for this process to be ready, or to wake up."""
        self.is_late = self.is_late or (not state.addresses and now >= self.since + self.start_s)
        lost = self.unlinked
        self.stands_still = lost is not None and now >= lost + self.policy.wake_s

    def times(self, state: RankState) -> list[float]:
        """When something is due by itself."""
        if self.due is not None:
            return [self.due]
        if state.is_over or state.killed:
            return []
        times = [] if state.addresses else [self.since + self.start_s]
        return times if self.unlinked is None else [*times, self.unlinked + self.policy.wake_s]

    def starts_again(self, now: float) -> None:
        """It gets another process."""
        self.since, self.due, self.has_joined, self.is_late = now, None, False, False
        self.unlinked, self.stands_still, self.blamed = None, False, None

    def joins(self, now: float, began: float) -> float | None:
        """It may link up; how long it was away, if it was."""
        self.has_joined, self.since = True, now
        if self.row is None:
            return None
        away_s = now - began - float(self.row["after_s"])
        self.row["away_s"], self.row = round(away_s, 3), None
        return away_s

    def ended(self, state: RankState, now: float) -> RootCause:
        """Its process has ended too early: decides about the next one, and says why it ended."""
        policy, cause = self.policy, self._cause(state)
        is_brief = not self.has_joined or now - self.since < policy.quick_s
        if is_away(state):
            self.due = now + policy.ask_s
            return cause
        self.quick = self.quick + 1 if is_brief or not cause.is_lost else 0
        pause_s = policy.first_pause_s * 2 ** max(0, self.quick - 1)
        self.due = now + min(pause_s, policy.longest_pause_s)
        if self.quick >= policy.max_quick:
            self.give_up()
        return cause

    def give_up(self) -> None:
        """No process of it is started any more."""
        self.due, self.is_given_up = None, True

    def _cause(self, state: RankState) -> RootCause:
        if self.is_late:
            return not_ready([state], self.start_s)
        if self.blamed is not None:
            reason = f"{state.label} {self.blamed}"
            return RootCause(state.rank, state.host, reason, is_lost=True)
        if self.stands_still:
            reason = f"{state.label} stood still, and was ended after {self.policy.wake_s:g} s"
            return RootCause(state.rank, state.host, reason, is_lost=True)
        return pick_cause([state])


def is_away(state: RankState) -> bool:
    """Whether its host is the trouble, not the rank."""
    return state.never_started or state.lost is not None


def departure(state: RankState, cause: RootCause, after_s: float) -> dict[str, Any]:
    """A row of summary.json; `away_s` stays None if the rank never comes back."""
    return {
        "rank": state.rank,
        "host": state.host,
        "step": state.steps,
        "after_s": round(after_s, 3),
        "reason": cause.reason,
        "away_s": None,
        "given_up": False,
    }
