"""A door that stays open: ranks of the run that come late, or come back, are let in at any time.

    caller -> proofs -> control kept -> its other channels -> admit(rank, pipes)

The caller is a rank in its own rendezvous, and the higher one, so it decides and dials, as always.
Proofs and limits are those of the rendezvous too: a stranger gets a few seconds and one small
object, and no frame of anybody is read before all channels stand. Runs on the I/O thread."""

from __future__ import annotations

import logging
from collections.abc import Callable

from smolrun.mesh.callers import Callers
from smolrun.mesh.endpoint import Endpoint
from smolrun.mesh.guards import Guard, PlainGuard
from smolrun.mesh.io import IoThread
from smolrun.mesh.knock import Knock, KnockEvents
from smolrun.mesh.link import Pipe
from smolrun.mesh.strangers import Strangers
from smolrun.wire.handshake import CHANNELS, Acceptor, Identity

_log = logging.getLogger(__name__)

# From the first channel of a rank to its last one; a rank that dies in between holds nobody up
# longer than that, not even its own successor.
VISIT_S = 5.0


class Door:
    """Collects the channels of each rank that comes, one visit of a rank at a time."""

    def __init__(
        self,
        io: IoThread,
        endpoint: Endpoint,
        identity: Identity,
        guard: Guard | None,
        *,
        may_come: Callable[[int], bool],
        admit: Callable[[int, dict[str, Pipe]], None],
    ) -> None:
        """`may_come(rank)` is asked when a rank has proved itself; `admit(rank, pipes)` takes the
        pipes over. The endpoint is closed with the door."""
        self._io = io
        self._endpoint = endpoint
        self._may_come = may_come
        self._admit = admit
        self._visits: dict[int, dict[str, Pipe]] = {}
        self._callers = Callers(
            io,
            endpoint,
            identity,
            guard or PlainGuard(),
            Strangers({}, anywhere=identity.world_size - 1),
            KnockEvents(self._on_proven, self._on_kept, self._on_failed),
        )

    @property
    def refused(self) -> int:
        """How many connections did not prove themselves."""
        return self._callers.refused

    def open(self) -> None:
        """Lets callers in."""
        self._callers.listen()

    def close(self) -> None:
        """Stops listening, and ends all visits."""
        self._callers.stop()
        for rank in list(self._visits):
            self._end_visit(rank)
        self._endpoint.close()

    def _on_proven(self, knock: Knock) -> None:
        talk = knock.conversation
        assert talk.peer is not None
        self._callers.has_proven(knock)
        is_visiting = talk.peer in self._visits
        if talk.channel == "control":
            is_welcome = not is_visiting and not talk.decides and self._may_come(talk.peer)
        else:
            is_welcome = is_visiting
        if not is_welcome:
            _log.info("rank %d is not let in by a second link", talk.peer)
            knock.close()
            self._callers.has_ended(knock)

    def _on_kept(self, knock: Knock) -> None:
        rank, channel = knock.conversation.peer, knock.conversation.channel
        assert rank is not None
        self._callers.has_ended(knock)
        if channel == "control":
            self._begin_visit(rank)
        visit = self._visits.get(rank)
        if visit is None:  # it took longer than a visit may
            knock.pipe.close()
            return
        if channel in visit:
            visit[channel].close()  # the peer dialed again, so it lost the first
        visit[channel] = knock.pipe
        if len(visit) == len(CHANNELS):
            del self._visits[rank]
            self._admit(rank, visit)

    def _begin_visit(self, rank: int) -> None:
        self._end_visit(rank)
        visit = self._visits[rank] = {}

        def expire() -> None:
            if self._visits.get(rank) is visit:
                self._end_visit(rank)

        self._io.call_later(VISIT_S, expire)

    def _end_visit(self, rank: int) -> None:
        for pipe in self._visits.pop(rank, {}).values():
            pipe.close()

    def _on_failed(self, knock: Knock, error: Exception) -> None:
        self._callers.has_ended(knock)
        talk = knock.conversation
        if talk.is_proven:
            return  # one of us: it dials again
        self._callers.count_refused(error)
        if isinstance(talk, Acceptor) and talk.refused_because:
            _log.warning("refused rank %s: %s", talk.peer, talk.refused_because)
