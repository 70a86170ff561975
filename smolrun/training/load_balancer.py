"""Shares of the batch for machines that are not equally fast, and do not stay as fast as they are.

    step        1 .. 10            11 .. 20           21 .. 30
    rank 0      8 samples  1.0 s   12 samples  1.5 s  12 samples
    rank 1      8 samples  4.0 s    4 samples  2.0 s   4 samples
                         window |           window |  nothing to gain: they stay

Every step all ranks exchange what each computed, and how long. After a window of steps the median
gives each rank's rate, and shares in proportion give the expected time of a step. If that is
clearly less, the shares change. All ranks decide from the same numbers by the same arithmetic, so
they decide alike without a message. The global batch keeps its samples, so two splits differ by
rounding only.

A rank whose share is 0 is not measured: it keeps its last rate.

`BalancePolicy` decides and knows nothing of hosts, plans or checkpoints; `LoadBalancer` is the
callback that applies its decisions.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from smolrun.algorithms.base import StepResult
from smolrun.errors import CheckpointError
from smolrun.events import Event, Note
from smolrun.parts.placement import BatchPlans, shares
from smolrun.training.trainer import Callback

# Steps from one decision to the next. The median of ten ignores four disturbed ones.
WINDOW = 10
# Smallest relative gain. In the tests, steps that vary by 3 % with a fivefold one now and then move
# nothing; a machine that throttles loses a quarter and more.
WORTH = 0.08


@dataclass(frozen=True)
class ShareChange:
    """New shares, in samples, and what they are expected to save."""

    before: tuple[int, ...]
    after: tuple[int, ...]
    rates: tuple[float, ...]  # samples a second of every rank
    gain: float  # share of a step's computing time that is saved


class BalancePolicy:
    """Decides when shares change, from what all ranks did in each step."""

    def __init__(self, counts: Sequence[int], *, idle: Sequence[int] = ()) -> None:
        """`counts` are the samples of every rank at first; ranks in `idle` never get any."""
        self._idle = frozenset(idle)
        self.counts = tuple(counts)
        self.rates: list[float] = []  # samples a second, the latest known of every rank
        self._times_s: list[Sequence[float]] = []

    def observe(self, samples: Sequence[int], compute_s: Sequence[float]) -> ShareChange | None:
        """Takes one step of all ranks; returns a change when a window is full and it gains."""
        # A step in flight may have other shares; one from a checkpoint has no times.
        if tuple(samples) != self.counts or not any(compute_s):
            return None
        self._times_s.append(compute_s)
        if len(self._times_s) < WINDOW:
            return None
        medians = [statistics.median(times) for times in zip(*self._times_s, strict=True)]
        self._times_s = []
        return self._decide(medians)

    def _decide(self, times_s: Sequence[float]) -> ShareChange | None:
        measured = [
            count / time_s if count and time_s > 0 else 0.0
            for count, time_s in zip(self.counts, times_s, strict=True)
        ]
        known = self.rates or [0.0] * len(measured)
        self.rates = [new or old for new, old in zip(measured, known, strict=True)]
        # A rank that never had a sample has no rate yet: the slowest one's is assumed.
        slowest = min((rate for rate in self.rates if rate), default=1.0)
        rates = [
            0.0 if rank in self._idle else rate or slowest for rank, rate in enumerate(self.rates)
        ]
        after = tuple(shares(sum(self.counts), rates))
        before_s, after_s = _step_s(self.counts, rates), _step_s(after, rates)
        gain = 1 - after_s / before_s
        if gain < WORTH:
            return None
        change = ShareChange(self.counts, after, tuple(rates), gain)
        self.counts = after
        return change


def _step_s(counts: Sequence[int], rates: Sequence[float]) -> float:
    """How long the slowest rank computes."""
    return max(count / rate for count, rate in zip(counts, rates, strict=True) if count)


@dataclass(kw_only=True)
class LoadBalancer(Callback):
    """Changes the plans of all ranks from the same step on, as measured, and emits a `Note`."""

    policy: BalancePolicy
    plans: BatchPlans
    steps: int
    emit: Callable[[Event], None]
    prefetched_steps: int = 0  # beyond the next one, requested already: their shares stay
    hosts: Sequence[str] = ()  # name of each rank's host
    _next_step: int = 0

    def before_step(self, step: int) -> None:
        """Remembers which step has begun."""
        self._next_step = step + 1

    def after_update(self, result: StepResult) -> None:
        """Passes the update to the policy and applies its change, if there is one."""
        change = self.policy.observe(result.samples, result.computed_s)
        if change is None:
            return
        first = self._next_step + self.prefetched_steps
        self.plans.change(self._next_step, first, change.after)
        # Shares of steps beyond this run are for its checkpoint only.
        if first < self.steps:
            self.emit(Note("info", _sentence(change, first, self.hosts)))

    def state(self) -> dict[str, Any]:
        """Shares by step, and the rates of all ranks."""
        return {"balance": {"shares": self.plans.shares, "rates": self.policy.rates}}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continues with the shares of a checkpoint, unless it has none, or those of another number
        of ranks or of another batch. CheckpointError if they cannot be read."""
        if not (own := state.get("balance")):
            return
        try:
            saved = [(int(first), [int(n) for n in counts]) for first, counts in own["shares"]]
            rates = [float(rate) for rate in own["rates"]]
            newest = tuple(saved[-1][1])
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise CheckpointError(f"the saved shares of work cannot be used: {error!r}") from None
        counts = self.policy.counts
        if len(newest) == len(counts) and sum(newest) == sum(counts):
            self.plans.shares = [(first, list(shares)) for first, shares in saved]
            self.policy.counts, self.policy.rates = newest, rates


def _sentence(change: ShareChange, first: int, hosts: Sequence[str]) -> str:
    def named(rank: int) -> str:
        return f"rank {rank} ({hosts[rank]})" if rank < len(hosts) else f"rank {rank}"

    ranks = [rank for rank, rate in enumerate(change.rates) if rate]
    fast = max(ranks, key=change.rates.__getitem__)
    slow = min(ranks, key=change.rates.__getitem__)
    factor = change.rates[fast] / change.rates[slow]
    return (
        f"batch shares from step {first + 1}: {_counts(change.after)} samples, before "
        f"{_counts(change.before)}; {named(fast)} computes {factor:.1f}x as many samples/s as "
        f"{named(slow)}; expected compute time of a step {-change.gain:.0%}"
    )


def _counts(counts: Sequence[int]) -> str:
    return "+".join(str(count) for count in counts)
