"""Two implementations of one thing, measured in turn: A B, B A, A B, ... so that a drift of the
machine affects both alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Comparison:
    """Seconds per call of ours and the peer's: medians, the median of the pairwise ratios, and
    their spread."""

    ours_s: float
    peer_s: float
    ours_cpu_s: float
    peer_cpu_s: float
    ratio: float
    spread: tuple[float, float]
    repeats: int

    def row(self, bench: str, op: str, peer: str, **facts: Any) -> dict[str, Any]:
        """The result as one flat JSON object; `facts` describe the setup."""
        return {
            "bench": bench,
            "op": op,
            **facts,
            "ours_s": self.ours_s,
            "peer": peer,
            "peer_s": self.peer_s,
            "ratio": self.ratio,
            "repeats": self.repeats,
            "spread": list(self.spread),
            "cpu_ratio": self.ours_cpu_s / self.peer_cpu_s,
        }


def compare(
    ours: Callable[[], object],
    peer: Callable[[], object],
    *,
    repeats: int,
    calls: int,
    meet: Callable[[], object],
    warm_up: int = 1,
) -> Comparison:
    """Times `calls` calls of each side, `repeats` times in turn; `meet` is called before every
    measurement.

    CPU seconds are those of this process, all threads.
    """
    for _ in range(warm_up):
        ours()
        peer()
    taken: dict[str, list[tuple[float, float]]] = {"ours": [], "peer": []}
    sides = [("ours", ours), ("peer", peer)]
    for repeat in range(repeats):
        for name, call in sides if repeat % 2 == 0 else reversed(sides):
            meet()
            wall, cpu = time.perf_counter(), time.process_time()
            for _ in range(calls):
                call()
            taken[name].append(
                ((time.perf_counter() - wall) / calls, (time.process_time() - cpu) / calls)
            )
    return summed(taken["ours"], taken["peer"])


def summed(ours: Sequence[tuple[float, float]], peer: Sequence[tuple[float, float]]) -> Comparison:
    """Measurements of both sides, pair by pair: seconds of the clock and of the processor."""
    ratios = [mine[0] / other[0] for mine, other in zip(ours, peer, strict=True)]
    return Comparison(
        ours_s=statistics.median(wall for wall, _ in ours),
        peer_s=statistics.median(wall for wall, _ in peer),
        ours_cpu_s=statistics.median(cpu for _, cpu in ours),
        peer_cpu_s=statistics.median(cpu for _, cpu in peer),
        ratio=statistics.median(ratios),
        spread=(min(ratios), max(ratios)),
        repeats=len(ratios),
    )
