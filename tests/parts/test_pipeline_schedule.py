"""Pipeline schedules: every micro-batch goes forward and backward once on every stage, no stages
wait for each other, and the idle time and memory are what the formulas say."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smolrun.parts.pipeline_schedule import (
    SCHEDULES,
    Simulation,
    StageAction,
    gpipe,
    one_f_one_b,
    simulate,
    without_flush,
)
from smolrun.parts.placement import cut

EXAMPLES = settings(max_examples=50, deadline=None)
SIZES = st.tuples(st.sampled_from(sorted(SCHEDULES)), st.integers(1, 6), st.integers(1, 12))


def simulated(
    name: str, stages: int, micro_batches: int, *, backward_s: float = 1.0, hop_s: float = 0.0
) -> Simulation:
    actions = [SCHEDULES[name](stage, stages, micro_batches) for stage in range(stages)]
    return simulate(actions, [1.0] * stages, [backward_s] * stages, hop_s)


@EXAMPLES
@given(SIZES)
def test_every_micro_batch_once_each_way_in_order(sizes: tuple[str, int, int]) -> None:
    name, stages, micro_batches = sizes
    for stage in range(stages):
        actions = SCHEDULES[name](stage, stages, micro_batches)
        for kind in ("forward", "backward"):
            # Ascending on all stages: tensors between two of them are told apart by counting.
            assert [n for k, n in actions if k == kind] == list(range(micro_batches))
        for number in range(micro_batches):
            forward, backward = StageAction("forward", number), StageAction("backward", number)
            assert actions.index(forward) < actions.index(backward)


@EXAMPLES
@given(SIZES, st.floats(0.1, 4.0), st.floats(0.0, 3.0))
def test_no_stages_wait_for_each_other_and_needs_come_first(
    sizes: tuple[str, int, int], backward_s: float, hop_s: float
) -> None:
    name, stages, micro_batches = sizes
    found = simulated(name, stages, micro_batches, backward_s=backward_s, hop_s=hop_s)
    times = [{timed.action: timed for timed in stage} for stage in found.stages]
    for stage, own in enumerate(times):
        assert len(own) == 2 * micro_batches
        for action, timed in own.items():
            before = stage - 1 if action.kind == "forward" else stage + 1
            if 0 <= before < stages:
                assert timed.begin_s >= times[before][action].end_s + hop_s - 1e-9


@EXAMPLES
@given(SIZES, st.floats(0.1, 4.0))
def test_the_bubble_is_that_of_the_formula(sizes: tuple[str, int, int], backward_s: float) -> None:
    name, stages, micro_batches = sizes
    found = simulated(name, stages, micro_batches, backward_s=backward_s)
    assert found.bubble == pytest.approx((stages - 1) / (micro_batches + stages - 1))


@EXAMPLES
@given(SIZES)
def test_activations_held(sizes: tuple[str, int, int]) -> None:
    name, stages, micro_batches = sizes
    found = simulated(name, stages, micro_batches)
    for stage in range(stages):
        most = micro_batches if name == "gpipe" else min(stages - stage, micro_batches)
        assert found.held(stage) == most


def test_a_tensor_takes_a_link_for_itself() -> None:
    """3 micro-batches of 1 s over a link that needs 2 s for each: the second stage begins at 3, 5
    and 7 s."""
    actions = [gpipe(stage, 2, 3) for stage in range(2)]
    found = simulate(actions, [1.0, 1.0], [1.0, 1.0], hop_s=2.0)
    assert [timed.begin_s for timed in found.stages[1][:3]] == [3.0, 5.0, 7.0]


def test_stages_that_wait_for_each_other_are_found() -> None:
    wrong = [StageAction("backward", 0), StageAction("forward", 0)]
    with pytest.raises(ValueError, match=r"stages \[0, 1\] wait for each other"):
        simulate([wrong, one_f_one_b(1, 2, 1)], [1.0, 1.0], [1.0, 1.0])


def test_a_slow_stage_sets_the_pace() -> None:
    """Each of 8 micro-batches takes the slow stage 6 s; filling and draining the other adds 3 s."""
    actions = [one_f_one_b(stage, 2, 8) for stage in range(2)]
    assert simulate(actions, [1.0, 2.0], [2.0, 4.0]).seconds == pytest.approx(8 * 6 + 3)


@EXAMPLES
@given(st.integers(1, 5), st.integers(1, 8), st.integers(1, 4))
def test_without_a_flush_every_micro_batch_goes_backward_a_step_later_at_most(
    stages: int, micro_batches: int, steps: int
) -> None:
    """And only the first step fills the pipeline: an idle stage waits for nothing else."""
    whole = []
    for stage in range(stages):
        actions, left = [], 0
        for step in range(steps):
            for kind, number in without_flush(stage, stages, micro_batches, left):
                actions.append(StageAction(kind, step * micro_batches + number))
            left = min(stages - stage - 1, micro_batches)
            open_now = sum(1 if kind == "forward" else -1 for kind, _ in actions)
            assert open_now == left
        count = steps * micro_batches
        actions += [StageAction("backward", number) for number in range(count - left, count)]
        for kind in ("forward", "backward"):
            assert [n for k, n in actions if k == kind] == list(range(count))
        whole.append(actions)
    found = simulate(whole, [1.0] * stages, [1.0] * stages)
    if micro_batches >= stages:
        assert found.bubble == pytest.approx((stages - 1) / (steps * micro_batches + stages - 1))


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_cut_by_speed_is_about_the_best_of_all(name: str) -> None:
    """16 equal layers, speeds 4:2:1:1, 16 micro-batches: all 455 cuts are tried."""
    speeds = [4.0, 2.0, 1.0, 1.0]

    def seconds(sizes: Sequence[int]) -> float:
        actions = [SCHEDULES[name](stage, 4, 16) for stage in range(4)]
        forward_s = [size / speed for size, speed in zip(sizes, speeds, strict=True)]
        return simulate(actions, forward_s, [2 * s for s in forward_s]).seconds

    found = cut([1.0] * 16, speeds)
    assert found is not None
    ends = [(0, *ends, 16) for ends in combinations(range(1, 16), 3)]
    best = min(seconds([b - a for a, b in pairwise(each)]) for each in ends)
    ours = seconds([len(stage) for stage in found.layers])
    assert best / ours >= 0.95
    assert seconds([4, 4, 4, 4]) / ours >= 1.8
