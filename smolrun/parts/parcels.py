"""Several tensors to one rank as one thing, in order: the n-th that is sent is the n-th that is
received, and somebody is told when it is there.

    line.send([facts, flat], then)         then(error) when the tensors may change again
    line.receive([facts, flat], then)      then(error) when all have come

`then` runs on the mesh's I/O thread and must be quick; `error` is None if all went well."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from smolrun.mesh.mesh import Mesh, Work
from smolrun.wire.frame import Tag

Then = Callable[[BaseException | None], None]


class Line:
    """Parcels to and from one rank. `stream` keeps several lines between two ranks apart.

    A line ends with its `link`, if that is given: to a rank that has come back nothing may go that
    was meant for the process before it."""

    def __init__(self, mesh: Mesh, peer: int, stream: int, link: int | None) -> None:
        self._mesh = mesh
        self._peer = peer
        self._link = link
        self._stream = stream
        self._sent = 0
        self._received = 0

    def send(self, tensors: Sequence[torch.Tensor], then: Then = lambda error: None) -> None:
        """Starts to send; contiguous CPU tensors."""
        tags = self._tags(self._sent, len(tensors))
        self._sent += 1
        works = [
            self._mesh.send(self._peer, tag, tensor, link=self._link)
            for tag, tensor in zip(tags, tensors, strict=True)
        ]
        _when_all(works, then)

    def receive(self, tensors: Sequence[torch.Tensor], then: Then) -> None:
        """Starts to receive into tensors of the shapes that are sent."""
        tags = self._tags(self._received, len(tensors))
        self._received += 1
        works = [
            self._mesh.recv(self._peer, tag, tensor, link=self._link)
            for tag, tensor in zip(tags, tensors, strict=True)
        ]
        _when_all(works, then)

    def _tags(self, number: int, count: int) -> list[Tag]:
        return [Tag(self._stream, number, hop) for hop in range(count)]


def _when_all(works: list[Work], then: Then) -> None:
    left = len(works)  # counted on the I/O thread alone

    def one_is_over(work: Work) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            then(next((one.error for one in works if one.error is not None), None))

    for work in works:
        work.add_done_callback(one_is_over)
