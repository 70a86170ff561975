"""The work queue against everything that holders may do."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smolrun.algorithms.edp.server import STALENESS_LR_SCALES
from smolrun.algorithms.edp.work_queue import WorkQueue
from smolrun.errors import ProtocolError

STEPS = 6
MOVES = st.lists(
    st.tuples(
        st.sampled_from(["take", "complete", "put_back", "put_back_all", "save"]), st.integers(1, 3)
    ),
    max_size=120,
)


@settings(max_examples=150, deadline=None)
@given(MOVES, st.integers(1, 4), st.sampled_from([None, 0, 1, 2]))
def test_nothing_is_lost_and_nothing_done_twice(
    moves: list[tuple[str, int]], per_step: int, bound: int | None
) -> None:
    work = WorkQueue(per_step, bound)
    held: dict[int, list[int]] = {1: [], 2: [], 3: []}
    done: list[int] = []
    for what, who in moves:
        mine = held[who]
        if what == "take":
            item = work.take(who, STEPS)
            if item is not None:
                number = item.number
                assert number not in done and all(number not in other for other in held.values())
                if bound is not None:
                    before = (number // per_step - bound) * per_step
                    assert set(range(before)) <= set(done), "the steps before are done"
                    assert len(mine) <= bound
                    assert max(0, before) <= item.min_version <= len(done)
                mine.append(number)
        elif what == "complete" and mine:
            done.append(mine.pop(0))
            work.complete(who, done[-1])
        elif what == "put_back" and mine:
            work.put_back(who, mine.pop())
        elif what == "put_back_all":
            assert work.put_back_all(who) == sorted(mine)
            mine.clear()
        elif what == "save":
            saved = work.state()
            work = WorkQueue(99, bound)
            work.restore(saved)
            for other in held.values():
                other.clear()
        assert work.num_done == len(done)
    # The holders do the rest, and all is done exactly once.
    for who, mine in held.items():
        for number in mine:
            work.complete(who, number)
            done.append(number)
    while (item := work.take(1, STEPS)) is not None:
        work.complete(1, item.number)
        done.append(item.number)
    assert sorted(done) == list(range(STEPS * per_step))
    assert work.is_complete(STEPS) and not work.is_complete(STEPS + 1)


def numbers(work: WorkQueue, *holders: int) -> list[int | None]:
    items = [work.take(holder, 9) for holder in holders]
    return [None if item is None else item.number for item in items]


def test_returned_items_are_taken_first() -> None:
    work = WorkQueue(2)
    assert numbers(work, 1, 2, 1, 2) == [0, 1, 2, 3]
    work.put_back(2, 3)
    assert work.put_back_all(1) == [0, 2]
    assert numbers(work, 3, 3, 3, 3) == [0, 2, 3, 4]
    assert work.held_by(3) == [0, 2, 3, 4]


def test_only_the_holder_can_complete_an_item() -> None:
    work = WorkQueue(1)
    work.take(1, 9)
    for who in (2, 1, 1):
        if who == 1 and work.held_by(1):
            work.complete(1, 0)
        else:
            with pytest.raises(ProtocolError, match=f"rank {who} does not hold work item 0"):
                work.complete(who, 0)


def test_an_item_is_attempted_four_times() -> None:
    """Each holder whose gradient is not finite gives it back; the fourth keeps it, to skip it."""
    work = WorkQueue(1)
    for holder in (1, 2, 3):
        assert numbers(work, holder) == [0]
        assert work.put_back_nonfinite(holder, 0)
    assert numbers(work, 4) == [0]
    assert not work.put_back_nonfinite(4, 0) and work.held_by(4) == [0]


def test_a_fast_rank_waits_for_the_slowest_at_the_bound() -> None:
    """SSP with K = 1: while rank 2 is at step 0, rank 1 gets items of steps 0 and 1, no others; and
    those of step 2 need all updates of step 0."""
    work = WorkQueue(2, bound=1)
    assert numbers(work, 2) == [0]
    assert numbers(work, 1, 1, 1) == [1, 2, None], "holds two, no more"
    work.complete(1, 1)
    three = work.take(1, 9)
    assert three is not None and (three.number, three.min_version) == (3, 0)
    for item in (2, 3):
        work.complete(1, item)
    assert numbers(work, 1) == [None]
    work.complete(2, 0)
    four = work.take(1, 9)
    assert four is not None and four.number == 4
    assert four.min_version == 4, "all of step 0 was done with the fourth update"


@pytest.mark.parametrize(
    ("name", "factors"), [("none", [1, 1]), ("inverse", [1, 0.25]), ("inverse_sqrt", [1, 0.5])]
)
def test_staleness_lr_scale(name: str, factors: list[float]) -> None:
    assert [STALENESS_LR_SCALES[name](age) for age in (0, 3)] == factors
