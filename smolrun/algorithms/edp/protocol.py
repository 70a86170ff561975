"""What a worker and the parameter server send to each other.

    worker                                      server
      REQUEST_WORK ----------------------------->
                   <----------------------------- ASSIGN_WORK item, version it needs, items per step
      push = header + gradient ----------------->      computed with the weights of that version
                   <----------------------------- APPLIED version that contains it
                   <----------------------------- weights = version + parameters
      RETURN_WORK item, reason ----------------->      no gradient of this item will be pushed
                   <----------------------------- BUSY      evaluating; resets the worker's timeout
                   <----------------------------- FINISHED  all work is done, or the run was stopped

Messages are four integers on a channel of their own; pushes and weights are tensors, see
parts/parameter_server.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple

import torch

from smolrun.mesh.mesh import Work
from smolrun.parts.parameter_server import Channels


class MessageKind(IntEnum):
    """First number of a message."""

    REQUEST_WORK = 0
    RETURN_WORK = 1
    ASSIGN_WORK = 2
    APPLIED = 3
    BUSY = 4
    FINISHED = 5


class DropReason(IntEnum):
    """Why the gradient of a work item is not applied."""

    REPLACED = 0
    NOT_FINITE = 1
    LOST = 2


class WorkMessage(NamedTuple):
    """A kind and up to three numbers."""

    kind: MessageKind
    first: int = 0
    second: int = 0
    third: int = 0

    @classmethod
    def buffer(cls) -> torch.Tensor:
        """Receive buffer of one message, int64."""
        return torch.zeros(len(cls._fields), dtype=torch.int64)

    @classmethod
    def read(cls, buffer: torch.Tensor) -> WorkMessage:
        """The message in a receive buffer; ValueError for an unknown kind."""
        kind, *numbers = buffer.tolist()
        return cls(MessageKind(kind), *numbers)

    def send(self, channels: Channels) -> Work:
        """Starts to send it."""
        return channels.messages.send([torch.tensor(self, dtype=torch.int64)])


class PushHeader(NamedTuple):
    """What travels with a gradient."""

    item: int
    version: int  # number of updates in the weights that it was computed with
    loss_sum: float
    num_targets: float
    num_samples: float
    wants_stop: float

    @classmethod
    def buffer(cls) -> torch.Tensor:
        """Receive buffer of one header, float64."""
        return torch.zeros(len(cls._fields), dtype=torch.float64)

    @classmethod
    def read(cls, buffer: torch.Tensor) -> PushHeader:
        """The header in a receive buffer."""
        item, version, *rest = buffer.tolist()
        return cls(int(item), int(version), *rest)

    def tensor(self) -> torch.Tensor:
        """As it travels, float64."""
        return torch.tensor(self, dtype=torch.float64)


@dataclass
class BatchTotals:
    """Sums over the pushes of one global batch so far."""

    num_pushes: int = 0
    loss_sum: float = 0.0
    num_targets: float = 0.0
    grad_norm: float | None = None  # of the last finite push
    nonfinite_ranks: set[int] = field(default_factory=set)
    wants_stop: bool = False

    def add(self, rank: int, header: PushHeader, grad_norm: float | None) -> None:
        """One more push; `grad_norm` None: its gradient was not finite and was not applied."""
        self.num_pushes += 1
        self.loss_sum += header.loss_sum
        self.num_targets += header.num_targets
        if grad_norm is None:
            self.nonfinite_ranks.add(rank)
        else:
            self.grad_norm = grad_norm
        self.wants_stop |= bool(header.wants_stop)
