"""Streams of operations: who uses which stream, how its operations are counted, and a check that
all ranks run the same ones.

    Tag(stream, operation, hop)      stream 49987 = the group "world", operation 423 = its 424th

Streams below 256 are point to point and stand in one table; every group of collectives has the one
of its name, so all ranks find the same without communication. A tag does not say what an
operation is: frames carry a fingerprint of it (a CRC-32 of its name and of the group's ranks), and
a rank compares each with its own operation of that number, whether or not it waits for that frame.

Knows nothing of frames, sockets or schedules. Source: torch.distributed's debug mode compares
"collective fingerprints" in the same way, with an additional all_gather before each collective."""

from __future__ import annotations

import zlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

from smolrun.errors import CollectiveMismatch, SmolrunError
from smolrun.wire.frame import Tag

DEFAULT_GROUP = "world"  # all ranks of the mesh
# Operations that are remembered: far more than are pending at one time, a few MB.
_REMEMBERED = 1 << 14
_FIRST_OF_GROUPS, _NUM_STREAMS = 256, 1 << 16


class Stream(IntEnum):
    """Streams that are used point to point; groups have all the others (`stream_of`)."""

    CONTROL = 0  # heartbeats, and lost ranks
    LINK_SPEEDS = 7
    SERVER_MESSAGES = 16  # of a parameter server and its workers, as the two below
    SERVER_PUSHES = 17
    SERVER_WEIGHTS = 18
    STAGE_ACTIVATIONS = 20  # of a model that is trained in stages, from each to the next
    STAGE_GRADIENTS = 21  # and back
    STAGE_TIED = 22  # a matrix that the first and the last of them hold, and its gradient
    SERVING_BATCHES = 24  # of an inference server: from stage to stage, and from the last to rank 0
    SERVING_RESULTS = 25


def stream_of(group: str) -> int:
    """The stream of a group of collectives: from its name, so it is the same on all ranks."""
    room = _NUM_STREAMS - _FIRST_OF_GROUPS
    return _FIRST_OF_GROUPS + zlib.crc32(group.encode()) % room


@dataclass
class OperationCounter:
    """Numbers the operations of a stream."""

    stream: int
    operation: int = 0

    def take(self, count: int = 1) -> Tag:
        """The tag of the next operation, or of the first of the next `count` ones."""
        tag = Tag(self.stream, self.operation, 0)
        self.operation += count
        return tag


class Groups:
    """The groups of collectives that use one mesh, each on a stream of its own."""

    def __init__(self) -> None:
        self._groups: dict[int, tuple[str, OperationCounter]] = {}

    def open(self, name: str) -> OperationCounter:
        """The counter of a group. The default group is one, as torch.distributed's, however often
        it is opened; SmolrunError for any other name that is in use."""
        stream = stream_of(name)
        user, counter = self._groups.get(stream, ("", OperationCounter(stream)))
        if user and (user, name) != (DEFAULT_GROUP, DEFAULT_GROUP):
            raise SmolrunError(
                f"the group {name!r} would share stream {stream} with the group {user!r} that this "
                "mesh already has: their tensors would be confused; give it another name"
            )
        self._groups[stream] = (name, counter)
        return counter


class Fingerprints:
    """The fingerprint of each operation of each stream, of the first rank known to run it."""

    def __init__(self) -> None:
        self._texts: dict[int, tuple[str, str]] = {}  # fingerprint -> its operation, and the hint
        # (stream, operation) -> rank, fingerprint; oldest first.
        self._running: OrderedDict[tuple[int, int], tuple[int, int]] = OrderedDict()

    def register(self, what: str, ranks: Sequence[int], hint: str = "") -> int:
        """The fingerprint of an operation among `ranks`, never 0; `hint` is the advice of
        the error where other ranks run another one."""
        fingerprint = zlib.crc32(f"{what} among {list(ranks)}".encode()) or 1
        self._texts[fingerprint] = (what, hint)
        return fingerprint

    def check(self, rank: int, tag: Tag, fingerprint: int) -> None:
        """Records which operation `rank` runs under a tag; CollectiveMismatch if another rank
        runs another one. A fingerprint of 0 is not checked."""
        if not fingerprint:
            return
        key = (tag.stream, tag.operation)
        first = self._running.setdefault(key, (rank, fingerprint))
        if first[1] != fingerprint:
            sides = sorted((first, (rank, fingerprint)))
            # A rank that has not come this far knows neither side, so that two unknown operations
            # must still read as different ones.
            unknown = "an operation of another name or group ({:08x})".format
            (what, hint), (other_what, other_hint) = (
                self._texts.get(number, (unknown(number), "")) for _, number in sides
            )
            ranks = sides[0][0], sides[1][0]
            raise CollectiveMismatch(ranks, (what, other_what), hint or other_hint)
        if len(self._running) > _REMEMBERED:
            self._running.popitem(last=False)

    def forget(self, tag: Tag) -> None:
        """Makes the next `check` of this operation the first one."""
        self._running.pop((tag.stream, tag.operation), None)

    def of(self, tag: Tag) -> int:
        """The fingerprint to send along with a tensor, or with the grant of one."""
        return self._running.get((tag.stream, tag.operation), (0, 0))[1]
