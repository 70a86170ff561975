"""Who trains on what, where nobody waits for anybody: every global batch is cut into equal parts, a
ticket is one of them, and whoever is ready takes the next.

    step            0           1           2
    ticket       0  1  2     3  4  5     6  7  8 ...      three parts a step
    rank 1       ^     ^     ^  ^        ^     ^          a fast rank simply takes more
    rank 2          ^              ^        ^
    rank 3                                                  it died with ticket 7: that goes back
                                                            and is the next to be taken

A ticket was never handed out, is in somebody's hands, came back, or is done; a run is over when all
are done. So no part of the data is lost with a rank, none counts twice, and fast ranks take more of
it without their samples counting more than others'.

With a bound K a ticket of step s is handed out only when all tickets of the steps before s - K are
done, and only to be trained with weights that have all of these in them; nobody has more than K + 1
in hands. That is Ho's guarantee: no rank is more than K steps ahead of the slowest, no weights are
more than K steps old. With m tickets a step no gradient is older than (2 K + 1) m - 1 updates.

Pure: knows nothing of ranks but a number, nothing of gradients.

Source: Ho et al., "More Effective Distributed ML via a Stale Synchronous Parallel Parameter
Server", 2013 (the bound)."""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from typing import Any

from smolrun.errors import ProtocolError


class Tickets:
    """The tickets of a run; `per_step` of them make a global batch. `bound` None: no bound."""

    def __init__(self, per_step: int, bound: int | None = None) -> None:
        self.per_step = per_step
        self.num_done = 0
        self._bound = bound
        self._next = 0  # from here on they were never handed out
        self._returned: list[int] = []  # a heap: the oldest is taken first
        self._holders: dict[int, int] = {}  # ticket -> who has it
        # For steps around the oldest unfinished one: how many tickets were done when all before
        # that step were.
        self._done_before: dict[int, int] = {0: 0}

    @property
    def oldest_step(self) -> int:
        """All tickets of the steps before this one are done."""
        return min([self._next, *self._returned[:1], *self._holders]) // self.per_step

    def is_over(self, steps: int) -> bool:
        """Whether all tickets of so many steps are done."""
        return self.num_done >= steps * self.per_step

    def held_by(self, holder: int) -> list[int]:
        """What somebody has in hands, in order."""
        return sorted(ticket for ticket, who in self._holders.items() if who == holder)

    @property
    def has_returned(self) -> bool:
        """Whether some came back that nobody has taken again."""
        return bool(self._returned)

    def take(self, holder: int, steps: int) -> int | None:
        """The oldest ticket that nobody has; None where there is none now, or the bound forbids
        it."""
        ticket = self._returned[0] if self._returned else self._next
        step = ticket // self.per_step
        if step >= steps:
            return None
        if self._bound is not None and (
            step - self.oldest_step > self._bound or len(self.held_by(holder)) > self._bound
        ):
            return None
        if self._returned:
            heapq.heappop(self._returned)
        else:
            self._next += 1
        self._holders[ticket] = holder
        return ticket

    def needs(self, ticket: int) -> int:
        """How many done tickets the weights must have in them that a ticket is trained with."""
        if self._bound is None:
            return 0
        return self._done_before.get(ticket // self.per_step - self._bound, 0)

    def give_back(self, holder: int, ticket: int) -> None:
        """Somebody's ticket is to be had again; ProtocolError if it was not theirs."""
        self._take_from(holder, ticket)
        heapq.heappush(self._returned, ticket)

    def lose(self, holder: int) -> list[int]:
        """Somebody is gone: what they had is to be had again."""
        lost = self.held_by(holder)
        for ticket in lost:
            self.give_back(holder, ticket)
        return lost

    def finish(self, holder: int, ticket: int) -> None:
        """A ticket is done; ProtocolError if it was not theirs, as when it is done twice."""
        before = self.oldest_step
        self._take_from(holder, ticket)
        self.num_done += 1
        oldest = self.oldest_step
        for step in range(before + 1, oldest + 1):
            self._done_before[step] = self.num_done
        for step in [step for step in self._done_before if step < oldest - (self._bound or 0)]:
            del self._done_before[step]

    def state(self) -> dict[str, Any]:
        """For a checkpoint, as JSON: what is in somebody's hands now will have to be taken anew."""
        return {
            "per_step": self.per_step,
            "next": self._next,
            "open": sorted([*self._returned, *self._holders]),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from there; steps stay cut as they were."""
        self.per_step, self._next = int(state["per_step"]), int(state["next"])
        self._returned, self._holders = sorted(map(int, state["open"])), {}
        self.num_done = self._next - len(self._returned)
        # When exactly the steps before were done is not known any more: later is safe.
        first = self.oldest_step - (self._bound or 0)
        self._done_before = dict.fromkeys(range(max(0, first), self.oldest_step + 1), self.num_done)

    def _take_from(self, holder: int, ticket: int) -> None:
        if self._holders.get(ticket) != holder:
            raise ProtocolError(f"rank {holder} does not have ticket {ticket}")
        del self._holders[ticket]
