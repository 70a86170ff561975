"""The rows of a dashboard's table: a rank each, and what they are together; those of a server are
its stages, by the difference of two of its answers.

Pure.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from smolrun.events import StepDone
from smolrun.sanitize import one_line
from smolrun.tracking.server_load import ServerLoad, StageLoad

SHARES = ("computing", "waiting for slower ranks", "pipeline bubble", "network", "other")
_MOST_STAGES = 1024
_RATES_S = 5.0  # over which those of a server are
_MOST_RATES = 32


@dataclass(frozen=True)
class TableRow:
    """One rank, or all of them (rank null). None is unknown. `shares` of the time are in the order
    of SHARES; bytes are a second."""

    rank: int | None
    host: str = ""
    status: str = ""
    step: int | None = None
    loss: float | None = None
    grad_norm: float | None = None
    tokens_per_s: float | None = None
    shares: tuple[float, ...] = ()
    sent: float | None = None
    received: float | None = None
    memory: float | None = None
    device_memory: float | None = None
    temperature_c: float | None = None
    throttled: bool = False
    lag: int | None = None
    step_s: Sequence[float] = ()
    layers: str = ""


def together(
    rows: Sequence[TableRow], last: StepDone | None, tokens_per_s: float | None
) -> TableRow:
    """The row of all ranks. Without `tokens_per_s` it is the sum."""
    shares = [row.shares for row in rows if row.shares]
    hot = [row.temperature_c for row in rows if row.temperature_c is not None]
    return TableRow(
        rank=None,
        step=last.step + 1 if last else None,
        loss=last.loss if last else None,
        grad_norm=last.grad_norm if last else None,
        tokens_per_s=tokens_per_s if last else _sum(rows, "tokens_per_s"),
        shares=tuple(sum(part) / len(shares) for part in zip(*shares, strict=True)),
        sent=_sum(rows, "sent"),
        received=_sum(rows, "received"),
        memory=_sum(rows, "memory"),
        device_memory=_sum(rows, "device_memory"),
        temperature_c=max(hot, default=None),
    )


def _sum(rows: Sequence[TableRow], name: str) -> float | None:
    known = [value for row in rows if (value := getattr(row, name)) is not None]
    return sum(known) if known else None


class ServerState:
    """The last answers of a server about its load."""

    def __init__(self) -> None:
        self._loads: deque[tuple[float, ServerLoad]] = deque(maxlen=64)
        self.rates: deque[float] = deque(maxlen=_MOST_RATES)  # tokens of answers a second

    def add(self, load: ServerLoad, now: float) -> None:
        """A new answer."""
        self._loads.append((now, load))
        then, old = self._compared()
        passed_s = now - then
        if passed_s > 0:
            self.rates.append(max(0, load.generated_tokens - old.generated_tokens) / passed_s)

    @property
    def load(self) -> ServerLoad | None:
        """The newest."""
        return self._loads[-1][1] if self._loads else None

    def _compared(self) -> tuple[float, ServerLoad]:
        """The oldest answer that rates are made of."""
        now = self._loads[-1][0]
        return next(one for one in self._loads if now - one[0] <= _RATES_S)

    def rows(self, status: str | None) -> list[TableRow]:
        """Its stages. `status` null: as it said itself."""
        if self.load is None:
            return []
        now, (then, old) = self._loads[-1][0], self._compared()
        before = {stage.rank: stage for stage in old.stages}
        stages = sorted(self.load.stages, key=lambda stage: stage.rank)[:_MOST_STAGES]
        word = one_line(self.load.status) if status is None else status
        return [
            _stage_row(stage, before.get(stage.rank, stage), now - then, word) for stage in stages
        ]


def _stage_row(new: StageLoad, old: StageLoad, passed_s: float, status: str) -> TableRow:
    ends = ((new.compute_s, old.compute_s), (new.wait_s, old.wait_s), (0.0, 0.0),
            (new.network_s, old.network_s))  # fmt: skip
    times = [max(0.0, end - begin) for end, begin in ends]
    whole_s = max(passed_s, sum(times))
    shares = [part / whole_s for part in times] if whole_s else []
    return TableRow(
        rank=new.rank,
        host=one_line(new.host),
        status=status,
        tokens_per_s=max(0, new.tokens - old.tokens) / passed_s if passed_s else None,
        shares=(*shares, max(0.0, 1 - sum(shares))) if shares else (),
        sent=max(0, new.sent_bytes - old.sent_bytes) / passed_s if passed_s else None,
        memory=new.memory_bytes or None,
        layers=f"{new.first_layer}-{new.last_layer}",
    )
