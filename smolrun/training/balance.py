"""Shares of the batch for machines that are not equally fast, and do not stay as fast as they are.

    step        1 .. 10            11 .. 20           21 .. 30
    rank 0      8 samples  1.0 s   12 samples  1.5 s  12 samples
    rank 1      8 samples  4.0 s    4 samples  2.0 s   4 samples
                         window |           window |  nothing to gain: they stay

Every step all ranks learn what every rank computed, and how long. After a window of steps the
median says how fast each is, and shares in proportion say how long a step would take. If that is
clearly less, they change. All ranks decide from the same numbers by the same arithmetic, so all
decide alike, and nobody has to be asked. The global batch stays what it is, so only rounding can
tell one split from another.

A rank whose share is 0 is not measured any more: it keeps the speed it had last.

The decision (Balancer) knows nothing of ranks' names, feeds or checkpoints; Balance is its place in
the training loop."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from smolrun.algorithms.contract import StepResult
from smolrun.errors import CheckpointError
from smolrun.parts.placement import Plans, shares

# Steps from one decision to the next. The median of ten shrugs off four that something disturbed.
WINDOW = 10
# A step must become shorter by this share of itself. In the tests, steps that vary by 3 % with a
# fivefold one now and then move nothing; a machine that throttles loses a quarter and more.
WORTH = 0.08


@dataclass(frozen=True)
class Change:
    """New shares, in samples, and what is hoped of them."""

    before: tuple[int, ...]
    after: tuple[int, ...]
    rates: tuple[float, ...]  # samples a second of every rank
    gain: float  # share of a step's computing time that is saved


class Balancer:
    """Decides when shares change; told what all ranks did, step after step."""

    def __init__(
        self,
        counts: Sequence[int],
        *,
        idle: Sequence[int] = (),
        window: int = WINDOW,
        worth: float = WORTH,
    ) -> None:
        """`counts` are the samples of every rank at first; ranks in `idle` never get any."""
        self._idle = frozenset(idle)
        self.counts = tuple(counts)
        self.rates: list[float] = []  # the newest that is known of every rank
        self._window = window
        self._worth = worth
        self._times_s: list[Sequence[float]] = []

    def heard(self, samples: Sequence[int], compute_s: Sequence[float]) -> Change | None:
        """One step of all ranks; a change if it is time for one, and worth it."""
        # A step of other shares, which was under way when these began, says nothing about them;
        # nor does one that was in flight in a checkpoint, whose times are not kept.
        if tuple(samples) != self.counts or not any(compute_s):
            return None
        self._times_s.append(compute_s)
        if len(self._times_s) < self._window:
            return None
        medians = [statistics.median(times) for times in zip(*self._times_s, strict=True)]
        self._times_s = []
        return self._decide(medians)

    def _decide(self, times_s: Sequence[float]) -> Change | None:
        measured = [
            count / time_s if count and time_s > 0 else 0.0
            for count, time_s in zip(self.counts, times_s, strict=True)
        ]
        known = self.rates or [0.0] * len(measured)
        self.rates = [new or old for new, old in zip(measured, known, strict=True)]
        # Of a rank that never had a sample nothing is known; it begins as fast as the slowest.
        slowest = min((rate for rate in self.rates if rate), default=1.0)
        rates = [
            0.0 if rank in self._idle else rate or slowest for rank, rate in enumerate(self.rates)
        ]
        after = tuple(shares(sum(self.counts), rates))
        before_s, after_s = _step_s(self.counts, rates), _step_s(after, rates)
        gain = 1 - after_s / before_s
        if gain < self._worth:
            return None
        change = Change(self.counts, after, tuple(rates), gain)
        self.counts = after
        return change


def _step_s(counts: Sequence[int], rates: Sequence[float]) -> float:
    """How long the slowest rank computes."""
    return max(count / rate for count, rate in zip(counts, rates, strict=True) if count)


class Balance:
    """Measured shares in the training loop: hears of every update, changes the plans of all ranks
    from the same step on, and is part of a checkpoint."""

    def __init__(
        self, balancer: Balancer, plans: Plans, *, ahead: int = 0, hosts: Sequence[str] = ()
    ) -> None:
        """`ahead` steps beyond the next one have been asked for already: their shares stay."""
        self._balancer = balancer
        self._plans = plans
        self._ahead = ahead
        self._hosts = hosts

    def heard(self, result: StepResult, next_step: int, steps: int) -> str | None:
        """After every update of a run of so many `steps`; a sentence where it changed the shares
        of any of them."""
        change = self._balancer.heard(result.samples, result.computed_s)
        if change is None:
            return None
        first = next_step + self._ahead
        self._plans.change(next_step, first, change.after)
        # Shares of steps that only a resumed run will make are for its checkpoint, not for people.
        return _sentence(change, first, self._hosts) if first < steps else None

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of it, as JSON."""
        return {"shares": self._plans.shares, "rates": self._balancer.rates}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on with the shares of a checkpoint; those of another number of ranks, or of another
        batch, say nothing: then it begins anew. CheckpointError if they cannot be read."""
        try:
            saved = [(int(first), [int(n) for n in counts]) for first, counts in state["shares"]]
            rates = [float(rate) for rate in state["rates"]]
            newest = tuple(saved[-1][1])
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise CheckpointError(f"the saved shares of work cannot be used: {error!r}") from None
        mine = self._balancer.counts
        if len(newest) == len(mine) and sum(newest) == sum(mine):
            self._plans.shares = [(first, list(counts)) for first, counts in saved]
            self._balancer.counts, self._balancer.rates = newest, rates


def _sentence(change: Change, first: int, hosts: Sequence[str]) -> str:
    def named(rank: int) -> str:
        return f"rank {rank} ({hosts[rank]})" if rank < len(hosts) else f"rank {rank}"

    ranks = [rank for rank, rate in enumerate(change.rates) if rate]
    fast = max(ranks, key=change.rates.__getitem__)
    slow = min(ranks, key=change.rates.__getitem__)
    factor = change.rates[fast] / change.rates[slow]
    return (
        f"shares from step {first + 1} on: {_counts(change.after)} samples, before "
        f"{_counts(change.before)}: {named(fast)} computes {factor:.1f}x as many a second as "
        f"{named(slow)}; a step should compute {change.gain:.0%} shorter"
    )


def _counts(counts: Sequence[int]) -> str:
    return "+".join(str(count) for count in counts)
