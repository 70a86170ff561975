"""Which worker trains on what: every global batch is cut into equal work items, and a worker takes
the next one whenever it is ready.

    step            0           1           2
    item         0  1  2     3  4  5     6  7  8 ...      three items a step
    rank 1       ^     ^     ^  ^        ^     ^          a fast rank takes more
    rank 2          ^              ^        ^
    rank 3                                                lost with item 7: the next that is taken

An item is new, held by a worker, returned, or done; a run is complete when all are done. So no data
is lost with a rank, no item counts twice, and a fast rank takes more items without its samples
weighing more.

With a bound K an item of step s is given out only when all items of the steps before s - K are
done, and must be trained with weights that contain all of these; a holder has at most K + 1 items.
That is Ho's guarantee: no rank is more than K steps ahead of the slowest, no weights are more than
K steps old. With m items a step no gradient is older than (2 K + 1) m - 1 updates.

Pure: a holder is any number; knows nothing of gradients.

Source: Ho et al., "More Effective Distributed ML via a Stale Synchronous Parallel Parameter
Server", 2013 (the bound)."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

from smolrun.errors import ProtocolError

# Attempts at an item whose gradient is not finite: in fp16 the next loss scale may do.
_MAX_ATTEMPTS = 4


class WorkItem(NamedTuple):
    """Part `number % per_step` of the global batch of step `number // per_step`."""

    number: int
    min_version: int  # of the weights that it may be trained with
    per_step: int

    @property
    def step(self) -> int:
        """Of its global batch."""
        return self.number // self.per_step


class WorkQueue:
    """The items of a run; `per_step` of them make a global batch. `bound` None: no bound."""

    def __init__(self, per_step: int, bound: int | None = None) -> None:
        self.per_step = per_step
        self.num_done = 0
        self._bound = bound
        self._next = 0  # the first new item
        self._returned: list[int] = []  # a heap: the oldest is taken first
        self._holders: dict[int, int] = {}  # item -> holder
        self._failures: Counter[int] = Counter()  # item -> attempts that were not finite
        # For steps around the oldest unfinished one: how many items were done when all before that
        # step were.
        self._done_before: dict[int, int] = {0: 0}

    @property
    def step(self) -> int:
        """The step of the next update."""
        return self.num_done // self.per_step

    @property
    def oldest_step(self) -> int:
        """All items of the steps before this one are done."""
        return min([self._next, *self._returned[:1], *self._holders]) // self.per_step

    def is_complete(self, steps: int) -> bool:
        """Whether all items of the first `steps` steps are done."""
        return self.num_done >= steps * self.per_step

    def held_by(self, holder: int) -> list[int]:
        """The items of a holder, in order."""
        return sorted(item for item, who in self._holders.items() if who == holder)

    @property
    def has_returned(self) -> bool:
        """Whether returned items wait for another holder."""
        return bool(self._returned)

    def take(self, holder: int, steps: int) -> WorkItem | None:
        """The oldest item that is new or returned; None where there is none, or the bound forbids
        it."""
        number = self._returned[0] if self._returned else self._next
        step = number // self.per_step
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
        self._holders[number] = holder
        return WorkItem(number, self._min_version(step), self.per_step)

    def put_back(self, holder: int, item: int) -> None:
        """Makes an item available again; ProtocolError if the holder does not have it."""
        self._remove(holder, item)
        heapq.heappush(self._returned, item)

    def put_back_nonfinite(self, holder: int, item: int) -> bool:
        """As `put_back`, for an item whose gradient was not finite. False after the last attempt:
        the holder keeps the item, which is to be completed without a gradient."""
        self._failures[item] += 1
        if self._failures[item] >= _MAX_ATTEMPTS:
            del self._failures[item]
            return False
        self.put_back(holder, item)
        return True

    def put_back_all(self, holder: int) -> list[int]:
        """Makes all items of a lost holder available again; returns them."""
        lost = self.held_by(holder)
        for item in lost:
            self.put_back(holder, item)
        return lost

    def complete(self, holder: int, item: int) -> None:
        """Marks an item as done; ProtocolError if the holder does not have it, as when it is done
        twice."""
        before = self.oldest_step
        self._remove(holder, item)
        self.num_done += 1
        oldest = self.oldest_step
        for step in range(before + 1, oldest + 1):
            self._done_before[step] = self.num_done
        for step in [step for step in self._done_before if step < oldest - (self._bound or 0)]:
            del self._done_before[step]

    def state(self) -> dict[str, Any]:
        """For a checkpoint, as JSON; items that are held now will have to be taken again."""
        return {
            "per_step": self.per_step,
            "next": self._next,
            "open": sorted([*self._returned, *self._holders]),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continues from there; steps stay cut into as many items as they were."""
        self.per_step, self._next = int(state["per_step"]), int(state["next"])
        self._returned, self._holders = sorted(map(int, state["open"])), {}
        self.num_done = self._next - len(self._returned)
        # When exactly the steps before were done is not known any more: later is safe.
        first = self.oldest_step - (self._bound or 0)
        self._done_before = dict.fromkeys(range(max(0, first), self.oldest_step + 1), self.num_done)

    def _min_version(self, step: int) -> int:
        if self._bound is None:
            return 0
        return self._done_before.get(step - self._bound, 0)

    def _remove(self, holder: int, item: int) -> None:
        if self._holders.get(item) != holder:
            raise ProtocolError(f"rank {holder} does not hold work item {item}")
        del self._holders[item]
