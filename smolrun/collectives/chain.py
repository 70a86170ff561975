"""An operation of several exchanges with computing in between: a generator that yields the exchange
to run next, and is resumed when that has run.

    def all_reduce_in_fewer_bits():
        ...encode the parts that other ranks sum...
        yield Phase("all_to_all", ...)
        ...sum, encode the sum...
        yield Phase("all_gather", ...)
        ...decode...

Knows nothing of how an exchange is run: each implementation of `Collectives` has its own way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import torch

from smolrun.collectives.schedule import Range


class Phase(NamedTuple):
    """One exchange. "all_to_all": elements `sends[i]` of `outgoing` go to rank i, and `receives[i]`
    of `incoming` come from it. "all_gather": elements `receives[i]` of `incoming` come from rank i,
    of this rank they are there already; the other two fields are the same."""

    kind: Literal["all_to_all", "all_gather"]
    outgoing: torch.Tensor
    sends: Sequence[Range]
    incoming: torch.Tensor
    receives: Sequence[Range]

    @property
    def send_sizes(self) -> list[int]:
        """Elements to each rank."""
        return [stop - start for start, stop in self.sends]

    @property
    def receive_sizes(self) -> list[int]:
        """Elements from each rank."""
        return [stop - start for start, stop in self.receives]


Chain = Iterator[Phase]
