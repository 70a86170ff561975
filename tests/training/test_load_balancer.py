"""Load balancing: which shares result from which speeds, when they change, and when not."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from smolrun.algorithms.contract import StepResult, StepStats
from smolrun.errors import CheckpointError
from smolrun.events import Event, Note
from smolrun.parts.placement import BatchPlans, plan_batches
from smolrun.training.load_balancer import WINDOW, WORTH, BalancePolicy, LoadBalancer, ShareChange


def run(
    policy: BalancePolicy, seconds: Callable[[int, int], float], steps: int, begin: int = 0
) -> list[tuple[int, ShareChange]]:
    """`seconds(rank, step)` for a sample; the changes with the steps after which they came."""
    changes = []
    for step in range(begin, begin + steps):
        times = [count * seconds(rank, step) for rank, count in enumerate(policy.counts)]
        if (change := policy.observe(policy.counts, times)) is not None:
            changes.append((step, change))
    return changes


@pytest.mark.parametrize("seed", range(30))
def test_shares_come_close_to_the_best_split_and_then_stay(seed: int) -> None:
    dice = random.Random(seed)
    speeds = [dice.uniform(1, 8) for _ in range(dice.randrange(2, 6))]
    batch = dice.choice([8, 32, 96])
    begin = plan_counts(batch, [1.0] * len(speeds))
    policy = BalancePolicy(begin)
    changes = run(policy, lambda rank, step: 1 / speeds[rank], 20 * WINDOW)
    assert sum(policy.counts) == batch and min(policy.counts) >= 0
    took = max(c / s for c, s in zip(policy.counts, speeds, strict=True))
    by_largest_remainder = plan_counts(batch, speeds)
    best = max(c / s for c, s in zip(by_largest_remainder, speeds, strict=True))
    assert took * (1 - WORTH) <= best * 1.0001
    assert [step for step, _ in changes] in ([], [WINDOW - 1]), "one is enough, where nothing moves"
    assert all(change.gain >= WORTH for _, change in changes)


def plan_counts(batch: int, weights: list[float]) -> list[int]:
    return [sum(plan_batches(batch, weights, rank).sizes) for rank in range(len(weights))]


@pytest.mark.parametrize("seed", range(20))
def test_noise_alone_moves_nothing(seed: int) -> None:
    dice = random.Random(seed)

    def noisy(rank: int, step: int) -> float:
        slow = 5.0 if dice.random() < 0.1 else 1.0  # and something else had the machine
        return dice.uniform(0.97, 1.03) * slow

    assert run(BalancePolicy([16, 16]), noisy, 30 * WINDOW) == []


def test_a_machine_gets_less_while_it_throttles() -> None:
    policy = BalancePolicy([16, 16])
    hot = range(100, 200)
    changes = run(policy, lambda rank, step: 3.0 if rank and step in hot else 1.0, 300)
    assert [change.after for _, change in changes] == [(24, 8), (16, 16)]
    assert [
        step in range(first, first + 2 * WINDOW)
        for (step, _), first in zip(changes, (100, 200), strict=True)
    ] == [True, True]


def test_shares_change_at_most_once_a_window() -> None:
    dice = random.Random(1)
    policy = BalancePolicy([16, 16, 16])
    wild = {step // 7: [dice.uniform(0.2, 5) for _ in range(3)] for step in range(700)}
    steps = [step for step, _ in run(policy, lambda rank, step: wild[step // 7][rank], 600)]
    assert len(steps) > 5, "such machines are worth a change often"
    assert min(b - a for a, b in itertools.pairwise(steps)) >= WINDOW


def test_all_ranks_decide_alike_from_the_same_numbers() -> None:
    dice = random.Random(2)
    ranks = [BalancePolicy([8, 8, 8]) for _ in range(3)]
    for _ in range(20 * WINDOW):
        times = [dice.uniform(0.1, 3.0) for _ in range(3)]
        changes = [policy.observe(policy.counts, times) for policy in ranks]
        assert changes[0] == changes[1] == changes[2]
    assert ranks[0].counts != (8, 8, 8)


def test_a_fixed_cost_does_not_make_shares_oscillate() -> None:
    policy, changes = BalancePolicy([16, 16]), []
    for _ in range(40 * WINDOW):
        times = [0.5 + policy.counts[0] * 0.1, 0.5 + policy.counts[1] * 0.4]
        changes += [change.after] if (change := policy.observe(policy.counts, times)) else []
    assert 1 <= len(changes) <= 4
    assert sorted(changes) == changes, "always on towards the end, never back"
    first, second = 0.5 + policy.counts[0] * 0.1, 0.5 + policy.counts[1] * 0.4
    assert abs(first - second) < 0.15 * max(first, second)


def test_an_idle_rank_keeps_its_last_rate() -> None:
    policy = BalancePolicy([2, 2])
    run(policy, lambda rank, step: 9.0 if rank else 1.0, WINDOW)
    assert policy.counts == (4, 0)
    run(policy, lambda rank, step: 1.0, 3 * WINDOW)
    assert policy.counts == (4, 0) and policy.rates[1] == pytest.approx(1 / 9)


def test_steps_with_earlier_shares_are_ignored() -> None:
    policy = BalancePolicy([16, 16])
    for _ in range(5 * WINDOW):
        assert policy.observe([24, 8], [1.0, 9.0]) is None
    assert run(policy, lambda rank, step: 1.0, WINDOW) == []


def test_a_step_that_was_in_flight_in_a_checkpoint_has_no_times() -> None:
    policy = BalancePolicy([2, 2])
    for _ in range(WINDOW - 1):
        assert policy.observe([2, 2], [0.0, 0.0]) is None
    run(policy, lambda rank, step: 9.0 if rank else 1.0, WINDOW)
    assert policy.counts == (4, 0)


STATS = StepStats(
    ("samples", "compute_s"), (0, 1), torch.tensor([[16.0, 1.6], [16.0, 6.4]]).double()
)
RESULT = StepResult(0, 1.0, 32, 1.0, 0.1, 1.0, 0.0, None, (), False, None, STATS)


def made(
    ahead: int = 0, batch: int = 32, of: int = 1000
) -> tuple[LoadBalancer, BatchPlans, list[Event]]:
    """A balancer of two ranks in a run of so many steps, the plans of rank 1, and the events."""
    counts, events = [batch // 2, batch // 2], list[Event]()
    plans = BatchPlans(lambda weights: plan_batches(batch, weights, 1), counts)
    policy, hosts = BalancePolicy(counts), ["mac", "pi"]
    balancer = LoadBalancer(
        policy=policy,
        plans=plans,
        steps=of,
        emit=events.append,
        prefetched_steps=ahead,
        hosts=hosts,
    )
    return balancer, plans, events


def train(balancer: LoadBalancer, steps: int) -> None:
    for step in range(steps):
        balancer.before_step(step)
        balancer.after_update(dataclasses.replace(RESULT, step=step))


@pytest.mark.parametrize("ahead", [0, 3])
def test_a_change_holds_from_one_step_on_and_is_noted_with_its_reason(ahead: int) -> None:
    balancer, plans, events = made(ahead)
    train(balancer, WINDOW)
    (note,) = events
    assert isinstance(note, Note)
    assert note.message == (
        f"batch shares from step {WINDOW + ahead + 1}: 26+6 samples, before 16+16; rank 0 (mac) "
        "computes 4.0x as many samples/s as rank 1 (pi); expected compute time of a step -59%"
    )
    first = WINDOW + ahead
    sizes = [sum(plans.at(step).sizes) for step in range(first - 1, first + 2)]
    assert sizes == [16, 6, 6]


@pytest.mark.parametrize("ahead", [0, 3])
def test_shares_of_steps_after_the_run_are_kept_and_not_noted(ahead: int) -> None:
    for of, notes in ((WINDOW + ahead, 0), (WINDOW + ahead + 1, 1)):
        balancer, plans, events = made(ahead, of=of)
        train(balancer, WINDOW)
        assert len(events) == notes
        assert sum(plans.at(WINDOW + ahead).sizes) == 6, "for a resumed run"


def test_a_checkpoint_has_current_and_scheduled_shares() -> None:
    one, plans, _ = made(ahead=3)
    train(one, WINDOW)
    other, restored, _ = made(ahead=3)
    other.restore(one.state())
    steps = range(WINDOW, 2 * WINDOW)
    assert [restored.at(s).sizes for s in steps] == [plans.at(s).sizes for s in steps]
    assert other.state() == one.state()


def test_saved_shares_for_another_world_size_or_batch_are_ignored() -> None:
    for state in (
        {"shares": [[0, [8, 8, 16]]], "rates": [1.0, 1.0, 2.0]},
        {"shares": [[0, [8, 8]]], "rates": [1.0, 1.0]},
    ):
        fresh, plans, _ = made()
        fresh.restore({"balance": state})
        assert plans.at(99).sizes == (16,)


@pytest.mark.parametrize(
    "state",
    [
        {"rates": []},
        {"shares": [], "rates": []},
        {"shares": [[0, ["a"]]], "rates": []},
        {"shares": 3},
    ],
)
def test_shares_that_cannot_be_read_are_refused(state: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="shares of work"):
        made()[0].restore({"balance": state})
