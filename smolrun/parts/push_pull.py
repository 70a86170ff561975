"""What a worker and its parameter server say to each other.

    worker                                   server
      WANT  ---------------------------------->        may I have a ticket?
            <---------------------------------- TICKET number, weights it needs, tickets per step
      push  = facts + gradient --------------->        computed with weights of that version
            <---------------------------------- APPLIED, version that has it
            <---------------------------------- weights = version + parameters
      GIVE_BACK ticket, why ------------------>        this gradient will not come
            <---------------------------------- BUSY   it evaluates; wait on
            <---------------------------------- OVER   all is done, or the run was stopped

Letters are a few numbers; pushes and weights are parcels of tensors on lines of their own, so that
a letter never waits behind them."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple

import torch

from smolrun.mesh.mesh import Mesh
from smolrun.mesh.streams import Stream
from smolrun.parts.parcels import Line, Then

_LETTERS, _PUSHES, _WEIGHTS = Stream.EDP_MESSAGES, Stream.EDP_PUSHES, Stream.EDP_WEIGHTS


class Word(IntEnum):
    """What a letter says."""

    WANT = 0
    GIVE_BACK = 1
    TICKET = 2
    APPLIED = 3
    BUSY = 4
    OVER = 5


class Why(IntEnum):
    """Why a gradient does not come."""

    REPLACED = 0
    NOT_FINITE = 1
    LOST = 2


class Letter(NamedTuple):
    """A word and up to three numbers."""

    word: Word
    first: int = 0
    second: int = 0
    third: int = 0


class Facts(NamedTuple):
    """What a push tells beside its gradient."""

    ticket: int
    version: int  # updates in the weights that it was computed with
    loss_sum: float
    weight: float
    samples: float
    wants_stop: float

    @classmethod
    def room(cls) -> torch.Tensor:
        """Where the facts of a push arrive."""
        return torch.zeros(len(cls._fields), dtype=torch.float64)

    @classmethod
    def of(cls, row: torch.Tensor) -> Facts:
        """The facts that arrived there."""
        ticket, version, *rest = row.tolist()
        return cls(int(ticket), int(version), *rest)

    def row(self) -> torch.Tensor:
        """Ready to travel."""
        return torch.tensor(self, dtype=torch.float64)


@dataclass
class Sums:
    """What the pushes of one global batch have told so far."""

    pushes: int = 0
    loss: float = 0.0
    weight: float = 0.0
    grad_norm: float | None = None  # of the last push that was finite
    culprits: set[int] = field(default_factory=set)
    wants_stop: bool = False

    def add(self, rank: int, facts: Facts, grad_norm: float | None) -> None:
        """One more push, `grad_norm` None: it was not finite and changed nothing."""
        self.pushes += 1
        self.loss += facts.loss_sum
        self.weight += facts.weight
        if grad_norm is not None:  # of length zero it is finite too
            self.grad_norm = grad_norm
        self.culprits |= set() if grad_norm is not None else {rank}
        self.wants_stop |= bool(facts.wants_stop)


class Lines:
    """Both ends have these: letters, pushes up, weights down."""

    def __init__(self, mesh: Mesh, peer: int, link: int | None = None) -> None:
        self.letters = Line(mesh, peer, _LETTERS, link)
        self.pushes = Line(mesh, peer, _PUSHES, link)
        self.weights = Line(mesh, peer, _WEIGHTS, link)

    def say(self, letter: Letter) -> None:
        """Sends a letter."""
        self.letters.send([torch.tensor(letter, dtype=torch.int64)])

    def next_letter(self, into: torch.Tensor, then: Then) -> None:
        """Expects one; `into` is a `letter_room`."""
        self.letters.receive([into], then)


def letter_room() -> torch.Tensor:
    """Where a letter arrives."""
    return torch.zeros(len(Letter._fields), dtype=torch.int64)


def read(room: torch.Tensor) -> Letter:
    """The letter that arrived there."""
    word, *numbers = room.tolist()
    return Letter(Word(word), *numbers)
