"""Rows of tokens to the ranks that hold their experts, and what these make of them back: two
exchanges with uneven counts, in forward and in backward.

    rank 0   rows [e0 e0 e1 | e2]  --> rank 0   [e0 e0 e1 | e0]       by rank, then by expert
    rank 1   rows [e0 | e2 e3]         rank 1   [e2 | e2 e3]

Every rank first gathers how many rows each rank has for each expert, so all know what will arrive.
The gradient of an exchange is the exchange the other way.

Source: Lepikhin et al., "GShard: Scaling Giant Models with Conditional Computation and Automatic
Sharding", 2020.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from smolrun.collectives.api import Collectives
from smolrun.errors import ProtocolError
from smolrun.mesh.mesh import Work

# Rows that a rank may get in one exchange. A peer's number decides what is allocated for them, so
# it has a bound: of an ordinary width so many are 32 GB.
MAX_ROWS = 1 << 24


class TokenExchange:
    """The exchanges of one group of ranks, of which each holds `experts[index]`. All ranks must run
    equally many forwards, and backwards through the same layers; each blocks."""

    def __init__(
        self, group: Collectives, experts: Sequence[range], wait: Callable[[Work], None]
    ) -> None:
        self._group, self._experts, self._wait = group, experts, wait
        self._own = experts[group.index]

    def run(
        self, run_own: Callable[[Tensor, Tensor], Tensor], rows_AD: Tensor, tokens_E: Tensor
    ) -> Tensor:
        """What all experts make of this rank's rows, which are sorted by expert. `run_own(rows,
        counts)` runs this rank's experts on the rows of all ranks, sorted by expert too."""
        arriving_RE = self._counts(tokens_E)[:, self._own.start : self._own.stop]
        sends = [int(tokens_E[part.start : part.stop].sum()) for part in self._experts]
        receives = arriving_RE.sum(1).tolist()
        arrived = _Exchange.apply(rows_AD, self, sends, receives)  # type: ignore[no-untyped-call]
        experts = torch.arange(len(self._own)).repeat(len(receives))
        by_expert = experts.repeat_interleave(arriving_RE.flatten()).argsort(stable=True)
        by_expert = by_expert.to(rows_AD.device)
        made = run_own(arrived[by_expert], arriving_RE.sum(0))[by_expert.argsort()]
        found: Tensor = _Exchange.apply(made, self, receives, sends)  # type: ignore[no-untyped-call]
        return found

    def _counts(self, tokens_E: Tensor) -> Tensor:
        """[R, E]: rows of every rank for every expert, on the CPU."""
        own = tokens_E.to("cpu", torch.int64)
        table_RE = own.new_empty((self._group.size, len(own)))
        self._wait(self._group.all_gather(table_RE, own, async_op=True))
        if int(table_RE.min()) < 0 or float(table_RE.double().sum()) > MAX_ROWS:
            raise ProtocolError(
                f"the ranks announced {table_RE.sum(1).tolist()} rows of tokens, each a number "
                f"from 0 and {MAX_ROWS} together at most"
            )
        return table_RE

    def move(self, rows: Tensor, sends: Sequence[int], receives: Sequence[int]) -> Tensor:
        """Sends the first `sends[0]` rows to the first rank, and so on; receives so many."""
        width, outgoing = rows.shape[1], rows.detach().to("cpu").contiguous()
        incoming = outgoing.new_empty((sum(receives), width))
        numbers = ([count * width for count in counts] for counts in (receives, sends))
        self._wait(self._group.all_to_all(incoming, outgoing, *numbers, async_op=True))
        return incoming.to(rows.device)


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, exchange: TokenExchange, sends: list[int], receives: list[int]
    ) -> Tensor:
        ctx.exchange, ctx.sends, ctx.receives = exchange, sends, receives
        return exchange.move(rows, sends, receives)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.exchange.move(gradients[0], ctx.receives, ctx.sends), None, None, None
