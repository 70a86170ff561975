"""What each worker of a parameter server contributed: how many of its gradients were applied, how
old they were, and how many never came."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from smolrun.events import REPLACED, PushApplied, PushDropped
from smolrun.tracking.formatting import counted, named

# From here on it is worth a word of advice how much of what a rank finished was for nothing.
_MANY = 0.1


_MOST_REASONS = 16  # there are three; a server that has been taken over may make up any number


@dataclass
class _Worker:
    pushes: int = 0
    samples: int = 0
    ages: int = 0
    max_age: int = 0
    dropped: Counter[str] = field(default_factory=Counter)


class PushRecord:
    """Sums over the pushes of a run."""

    def __init__(self) -> None:
        self._workers: dict[int, _Worker] = {}

    def record(self, event: PushApplied | PushDropped) -> None:
        """One more gradient came, or did not."""
        worker = self._workers.setdefault(event.rank, _Worker())
        if isinstance(event, PushDropped):
            is_known = event.reason in worker.dropped or len(worker.dropped) < _MOST_REASONS
            worker.dropped[event.reason if is_known else "other"] += 1
            return
        worker.pushes += 1
        worker.samples += event.samples
        worker.ages += event.age
        worker.max_age = max(worker.max_age, event.age)

    def summary(self) -> dict[str, dict[str, Any]]:
        """For summary.json, by rank."""
        total = sum(worker.samples for worker in self._workers.values())
        return {
            str(rank): {
                "pushes": worker.pushes,
                "samples": worker.samples,
                "share": round(worker.samples / total, 4) if total else 0.0,
                "mean_age": round(worker.ages / worker.pushes, 3) if worker.pushes else None,
                "max_age": worker.max_age,
                "dropped": dict(worker.dropped),
            }
            for rank, worker in sorted(self._workers.items())
        }

    @property
    def line(self) -> str:
        """One line about all ranks; empty if there was no push."""
        told = []
        for rank, row in self.summary().items():
            dropped = sum(row["dropped"].values())
            age = "" if row["mean_age"] is None else f", {row['mean_age']:.1f} updates late"
            gone = f", {counted(dropped, 'gradient')} dropped" if dropped else ""
            told.append(f"rank {rank} {row['share']:.0%} of the samples{age}{gone}")
        return "; ".join(told)

    def advice(self, *, can_quantize: bool) -> str:
        """What to try against gradients that were computed for nothing; empty if few were."""
        slow = [
            rank
            for rank, worker in sorted(self._workers.items())
            if worker.dropped[REPLACED] > _MANY * (worker.pushes + worker.dropped[REPLACED])
        ]
        if not slow:
            return ""
        whose = "its link is slower than it computes"
        if len(slow) > 1:
            whose = "their links are slower than they compute"
        hint = "; try quantization=int8" if can_quantize else ""
        return f"{named(slow)}: {whose}, so newer gradients took the place of older ones{hint}"
