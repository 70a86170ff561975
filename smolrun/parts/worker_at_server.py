"""One worker as the parameter server sees it: room for one push, a copy of the weights that go
there, and what happens with it, for the server's one queue. See reception.py."""

from __future__ import annotations

import queue
from dataclasses import dataclass

import torch

from smolrun.mesh.mesh import Mesh
from smolrun.parts.flat_model import FlatModel, Flats
from smolrun.parts.push_pull import Facts, Letter, Lines, letter_room, read
from smolrun.parts.quantization import Quantization


@dataclass(frozen=True)
class Came:
    """A worker is here, for the first time or again."""

    worker: Worker


@dataclass(frozen=True)
class Gone:
    """A worker has left or is lost."""

    rank: int
    reason: str


@dataclass(frozen=True)
class Heard:
    """A letter."""

    worker: Worker
    letter: Letter


@dataclass(frozen=True)
class Pushed:
    """A gradient lies in the worker's room for it; or there is none to be had for the ticket."""

    worker: Worker
    facts: Facts
    has_gradient: bool = True


@dataclass(frozen=True)
class Sent:
    """The weights on their way to a worker have left."""

    worker: Worker


Happening = Came | Gone | Heard | Pushed | Sent


class Worker:
    """One worker as the server sees it, from its coming to its going."""

    def __init__(
        self,
        mesh: Mesh,
        rank: int,
        flat_model: FlatModel,
        quantization: Quantization,
        happenings: queue.SimpleQueue[Happening],
    ) -> None:
        """On the I/O thread, as it comes: all that follows is for this very link with it."""
        self.rank = rank
        self.sent_version = -1
        self.is_due = True  # it should get newer weights than it has
        self._is_sending = False
        self._lines = Lines(mesh, rank, mesh.link_with(rank))
        self._flat_model = flat_model
        self._quantization = quantization
        self._quantizer = quantization.quantizer()
        self._happenings = happenings
        self._letter = letter_room()
        self._facts = Facts.room()
        self._wires = [
            torch.zeros(self._wire_bytes(size, dtype), dtype=torch.uint8)
            for size, dtype in zip(flat_model.sizes, flat_model.dtypes, strict=True)
        ]
        self._snapshot = flat_model.host_zeros()

    def begin(self) -> None:
        """Expects the first letter and the first push."""
        self._lines.next_letter(self._letter, self._letter_came)
        self.expect_push()

    def say(self, letter: Letter) -> None:
        """Sends a letter."""
        self._lines.say(letter)

    def expect_push(self) -> None:
        """There is room for the next push now."""

        def came(error: BaseException | None) -> None:
            if error is None:  # else it is gone, as will be told
                self._happenings.put(Pushed(self, Facts.of(self._facts)))

        self._lines.pushes.receive([self._facts, *self._wires], came)

    def take_gradient(self, into: Flats) -> None:
        """The gradient that was pushed."""
        for wire, flat in zip(self._wires, into, strict=True):
            dtype = self._quantization.working_dtype(flat.dtype)
            if flat.device.type == "cpu" and flat.dtype == dtype:
                self._quantizer.decode(wire, flat)
            else:
                decoded = torch.empty(flat.shape, dtype=dtype)
                self._quantizer.decode(wire, decoded)
                flat.copy_(decoded)

    def send_if_due(self, version: int) -> None:
        """Starts to send the newest weights, if it should get some and none are under way."""
        if not self.is_due or self._is_sending or self.sent_version >= version:
            return
        self._flat_model.copy_to(self._snapshot)
        self.is_due, self._is_sending, self.sent_version = False, True, version
        number = torch.tensor([version], dtype=torch.int64)
        self._lines.weights.send(
            [number, *self._snapshot], lambda _: self._happenings.put(Sent(self))
        )

    def has_sent(self) -> None:
        """The weights have left, the copy may change."""
        self._is_sending = False

    def _wire_bytes(self, numel: int, dtype: torch.dtype) -> int:
        return self._quantizer.wire_bytes(numel, self._quantization.working_dtype(dtype))

    def _letter_came(self, error: BaseException | None) -> None:
        if error is None:
            letter = read(self._letter)
            self._lines.next_letter(self._letter, self._letter_came)
            self._happenings.put(Heard(self, letter))
