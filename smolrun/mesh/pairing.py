"""How two ranks find the one path between them, when each has several addresses and a firewall may
let only one of them call.

    higher rank   dials its peer's best address at once, the next ones a moment later each
    lower rank    does the same, but begins a moment later
    higher rank   keeps the best of what was proved, and says so over that connection

Pure: it is told what happened and when, and says which address is due and what to keep. Knows
nothing of sockets. Source: RFC 8305 (Happy Eyeballs) for the head start of an address over the
next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

Candidate = TypeVar("Candidate")  # a connection whose two ends have proved themselves

HEAD_START_S = 0.25  # of an address over the next one; RFC 8305 recommends this
TURN_S = 0.2  # of the higher rank over the lower one
GRACE_S = 0.5  # what a better address may take longer than a worse one, and still be kept
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 1.0  # between two tries of one address


@dataclass(eq=False)
class Way:
    """One address of a peer, and how it went; `place` is its place in the peer's own list."""

    place: int
    address: str
    port: int
    due_s: float
    is_busy: bool = False
    outcome: str = "not tried"
    pause_s: float = FIRST_PAUSE_S


class Pairing(Generic[Candidate]):
    """One peer: when to dial which of its addresses, and which connection becomes the path."""

    def __init__(self, *, decides: bool, ways: Sequence[tuple[int, str, int]], now: float) -> None:
        """`decides` says that this rank is the higher one; `ways` are places, addresses, ports."""
        begin_s = now if decides else now + TURN_S
        self.ways = [
            Way(place, address, port, begin_s + HEAD_START_S * index)
            for index, (place, address, port) in enumerate(ways)
        ]
        self.kept: Candidate | None = None
        self._decides = decides
        self._chosen: Candidate | None = None
        self._proven: list[tuple[int, Candidate]] = []
        self._proven_since_s = now

    def due(self, now: float) -> list[Way]:
        """Which ways to dial now; each is busy until `failed` says otherwise."""
        if self.kept is not None:
            return []
        due = [way for way in self.ways if not way.is_busy and way.due_s <= now]
        for way in due:
            way.is_busy, way.outcome = True, "no answer yet"
        return due

    def failed(self, way: Way, why: str, now: float) -> None:
        """A way did not lead there: it is tried again later, and the next one need not wait."""
        way.is_busy, way.outcome = False, why
        way.due_s = now + way.pause_s
        way.pause_s = min(2 * way.pause_s, LONGEST_PAUSE_S)
        waiting = [other for other in self.ways if other.outcome == "not tried"]
        if waiting and way.place <= waiting[0].place:
            waiting[0].due_s = min(waiting[0].due_s, now)

    def proven(self, candidate: Candidate, place: int, now: float) -> None:
        """A connection to the acceptor's address number `place` could be the path."""
        if not self._proven:
            self._proven_since_s = now
        self._proven.append((place, candidate))

    def gone(self, candidate: Candidate) -> None:
        """A connection that had been proven broke."""
        self._proven = [one for one in self._proven if one[1] is not candidate]
        if self._chosen is candidate:
            self._chosen = None

    def choice(self, now: float) -> Candidate | None:
        """The connection to keep, if this rank decides and the time has come; told once."""
        if not self._decides or not self._proven or self._chosen is not None:
            return None
        place, best = min(self._proven, key=lambda one: one[0])
        if place > 0 and now < self._proven_since_s + GRACE_S:
            return None
        self._chosen = best
        return best
