"""Who waits at the door without having proved anything: a limited number, and a newcomer is never
refused for them.

Pure: it says who must leave for whom. Honest ranks speak as soon as they are connected and need
milliseconds, so whoever is silent goes first, and then whoever has been here longest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Generic, Protocol, TypeVar

MAX_STRANGERS = 64
MAX_PER_ORIGIN = 8
# A rank has so many connections to another one under way at once, at most.
_PER_RANK = 3


class Stranger(Protocol):
    """What is known of somebody who waits."""

    @property
    def has_spoken(self) -> bool:
        """Whether anything was heard from it."""


S = TypeVar("S", bound=Stranger)


class Strangers(Generic[S]):
    """Those who wait, in the order in which they came."""

    def __init__(self, ranks_at: Mapping[str, int], anywhere: int = 0) -> None:
        """`ranks_at` tells how many honest ranks may come from an address; `anywhere` so many more
        may come from any."""
        self._ranks_at = ranks_at
        self._anywhere = anywhere
        self._total = MAX_STRANGERS + _PER_RANK * (sum(ranks_at.values()) + anywhere)
        self._waiting: dict[S, str] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def room_for(self, origin: str) -> S | None:
        """Who must leave before somebody from `origin` may wait too; it is no longer counted."""
        here = [one for one, where in self._waiting.items() if where == origin]
        ranks_here = self._ranks_at.get(origin, 0) + self._anywhere
        if len(here) < MAX_PER_ORIGIN + _PER_RANK * ranks_here:
            if len(self._waiting) < self._total:
                return None
            crowd = Counter(self._waiting.values()).most_common(1)[0][0]
            here = [one for one, where in self._waiting.items() if where == crowd]
        leaving = min(here, key=lambda one: one.has_spoken)  # the first of equals came first
        del self._waiting[leaving]
        return leaving

    def add(self, stranger: S, origin: str) -> None:
        """Somebody has come."""
        self._waiting[stranger] = origin

    def discard(self, stranger: S) -> None:
        """It has gone, or is no stranger any more."""
        self._waiting.pop(stranger, None)
