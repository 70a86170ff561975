"""The final figures of a run."""

from __future__ import annotations

import math
import statistics
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any

from smolrun.events import (
    REPLACED,
    CheckpointSaved,
    EvalDone,
    Event,
    GradientDropped,
    PushApplied,
    PushDropped,
    RankStep,
    RunStarted,
    StepDone,
    TextSample,
)
from smolrun.tracking.formatting import clock, counted, named, number

_SHORT_S = 10.0
# A run has diverged if the median loss of its last steps is more than so many times the first one.
_LAST = 10  # steps
_FACTOR = 2.0
_SKIPPED = 3  # a float16 run skips one now and then, to find its loss scale

# Share of a rank's gradients that were replaced by newer ones, from which on advice is given.
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
    """What each worker of a parameter server contributed: gradients applied, their ages (staleness
    in updates), gradients dropped."""

    def __init__(self) -> None:
        self._workers: dict[int, _Worker] = {}

    def record(self, event: PushApplied | PushDropped) -> None:
        """Count one gradient, applied or dropped."""
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
        parts = []
        for rank, row in self.summary().items():
            dropped = sum(row["dropped"].values())
            age = "" if row["mean_age"] is None else f", mean staleness {row['mean_age']:.1f}"
            gone = f", {counted(dropped, 'gradient')} dropped" if dropped else ""
            parts.append(f"rank {rank} {row['share']:.0%} of the samples{age}{gone}")
        return "; ".join(parts)

    def advice(self, *, can_quantize: bool) -> str:
        """What to set against dropped gradients; empty if few were dropped."""
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


class RunRecord:
    """A tracker that keeps the last figures of a run."""

    def __init__(
        self,
        *,
        earlier_s: float = 0.0,
        tokens: int = 0,
        steps: int = 0,
        train_loss: float | None = None,
        eval_loss: float | None = None,
        checkpoint: str | None = None,
    ) -> None:
        """The figures are those of a resumed run, which was trained for `earlier_s` before."""
        self._earlier_s, self._earlier_steps, self._earlier_tokens = earlier_s, steps, tokens
        self.steps = steps
        self.parameters: int | None = None
        self.tokens = 0
        self.time_s = 0.0
        self.train_loss = train_loss
        self.eval_loss = eval_loss
        self.eval_accuracy: float | None = None
        self.checkpoint = checkpoint
        self.sample: TextSample | None = None
        self.sample_before: TextSample | None = None  # before the first step
        self.pushes = PushRecord()
        self.gradients_dropped: dict[int, int] = {}
        self._took_part: Counter[int] = Counter()  # steps of each rank
        self._not_finite_since: int | None = None
        self._first_loss: float | None = None  # of this start, before its first update
        self._last_losses: deque[float] = deque(maxlen=_LAST)
        self._skipped = 0  # updates in a row

    @property
    def divergence(self) -> str:
        """Why the run has diverged, as a sentence: at its end the loss is not finite, or updates
        are skipped, or the loss has more than doubled. Empty if it has not."""
        if self._not_finite_since is not None:
            return f"the loss is not a number since step {self._not_finite_since}"
        if self._skipped >= _SKIPPED:
            since = self.steps - self._skipped + 1
            return f"there is no update since step {since}, as the gradient is not finite"
        if self._first_loss is None:
            return ""
        # The median, as one step may have hard samples; below a loss of 1, doubling is no
        # divergence.
        last = statistics.median(self._last_losses)
        if last <= _FACTOR * max(self._first_loss, 1.0):
            return ""
        return f"the loss was {number(self._first_loss)} in the beginning and is {number(last)}"

    @property
    def tokens_per_s(self) -> float | None:
        """Since this start, evaluations included."""
        return self.tokens / self.time_s if self.time_s > 0 else None

    @property
    def tokens_per_s_of_all_starts(self) -> float | None:
        """Over the whole training, evaluations included."""
        whole_s = self._earlier_s + self.time_s
        return (self._earlier_tokens + self.tokens) / whole_s if whole_s > 0 else None

    def progress(self, wall_s: float) -> str:
        """How many steps were made and how long they took, beside the `wall_s` of the whole run."""
        made = self.steps - self._earlier_steps
        steps = counted(made, "step")
        if made and self._earlier_steps:
            first = self._earlier_steps + 1
            steps += f" ({first})" if made == 1 else f" ({first} to {self.steps})"
        if self.time_s <= 0:
            return f"{steps} in {clock(wall_s)}"
        # Whole seconds would falsify the speed of a short run.
        took = f"{self.time_s:.1f} s" if self.time_s < _SHORT_S else clock(self.time_s)
        return f"{steps} in {took} ({clock(wall_s)} from start to end)"

    @property
    def missed(self) -> str:
        """Ranks without which steps were made, and how many; empty if there are none. A dropped
        gradient counts once, but its rank may have missed many steps until it arrived."""
        made = self.steps - self._earlier_steps
        return "; ".join(
            f"rank {rank} missed {made - self._took_part[rank]:,} of {counted(made, 'step')}"
            for rank in sorted(self.gradients_dropped)
            if self._took_part[rank] < made
        )

    def record(self, event: Event) -> None:
        """Keep the figures that the summary needs."""
        if isinstance(event, StepDone):
            self.steps = event.step + 1  # steps are numbered from 0
            self.tokens += event.tokens
            self.time_s = event.time_s - self._earlier_s
            self.train_loss = event.loss
            self._look_at(event)
        elif isinstance(event, RankStep):
            # A late rank is moved to the step of the others, and has no samples in it.
            self._took_part[event.rank] += event.samples != 0
        elif isinstance(event, EvalDone):
            self.eval_loss, self.eval_accuracy = event.loss, event.accuracy
        elif isinstance(event, PushApplied | PushDropped):
            self.pushes.record(event)
        elif isinstance(event, GradientDropped):
            before = self.gradients_dropped.get(event.rank, 0)
            self.gradients_dropped[event.rank] = before + 1
        elif isinstance(event, RunStarted):
            self.parameters = event.parameters
        elif isinstance(event, CheckpointSaved):
            self.checkpoint = event.folder
        elif isinstance(event, TextSample) and event.step == 0:
            self.sample_before = event
        elif isinstance(event, TextSample):
            self.sample = event

    def _look_at(self, event: StepDone) -> None:
        self._skipped = self._skipped + 1 if event.grad_norm is None else 0
        # JSON has no number that is not finite: it was written as null.
        if event.loss is not None and math.isfinite(event.loss):
            self._not_finite_since = None
            self._last_losses.append(event.loss)
            if self._first_loss is None:
                self._first_loss = event.loss
        elif self._not_finite_since is None:
            self._not_finite_since = self.steps  # counted from 1, as people do

    def close(self) -> None:
        """Nothing is buffered."""

    def summary(self) -> dict[str, Any]:
        """The part of summary.json that is made of events."""
        return {
            "diverged": bool(self.divergence),
            "steps": self.steps,
            "parameters": self.parameters,
            "tokens_per_s": None
            if (rate := self.tokens_per_s_of_all_starts) is None
            else round(rate, 3),
            "final_train_loss": self.train_loss,
            "final_eval_loss": self.eval_loss,
            "final_eval_accuracy": self.eval_accuracy,
            "checkpoint": self.checkpoint,
            "gradients_dropped": {str(r): n for r, n in sorted(self.gradients_dropped.items())},
            "pushes": self.pushes.summary(),
        }
