"""A worker waits for answers that are quick, and not for those that are slow."""

from __future__ import annotations

import pytest

from smolrun.parts.patience import Patience


def computed(patience: Patience, begin_s: float, push_s: float) -> None:
    patience.begin(begin_s)
    patience.push(push_s)


def test_it_waits_until_the_answer_is_here() -> None:
    patience = Patience(0.5)
    assert patience.left_s(10.0) == 0, "there is nothing to wait for yet"
    computed(patience, 10.0, 12.0)
    assert patience.left_s(12.0) == pytest.approx(1.0)
    assert patience.left_s(12.75) == pytest.approx(0.25)
    patience.answer(12.75)
    assert patience.left_s(12.75) == 0


def test_it_gives_up_in_time_and_does_not_try_again() -> None:
    patience = Patience(0.5)
    computed(patience, 0.0, 2.0)
    assert patience.left_s(3.5) == 0
    patience.begin(3.5)
    patience.answer(4.5)  # 2.5 s, more than half of 2 s
    patience.push(5.5)
    assert patience.left_s(5.5) == 0


def test_it_tries_again_when_answers_have_become_quick() -> None:
    patience = Patience(0.5)
    computed(patience, 0.0, 2.0)
    patience.answer(4.0)
    computed(patience, 4.0, 6.0)
    assert patience.left_s(6.0) == 0
    patience.answer(6.5)  # in the background, and quick
    computed(patience, 6.0, 8.0)
    assert patience.left_s(8.0) == pytest.approx(1.0)


def test_an_answer_that_never_came_was_slow() -> None:
    patience = Patience(0.5)
    computed(patience, 0.0, 2.0)
    computed(patience, 3.0, 5.0)
    assert patience.left_s(5.0) == 0


def test_none_at_all() -> None:
    patience = Patience(0.0)
    computed(patience, 0.0, 2.0)
    assert patience.left_s(2.0) == 0


def test_an_answer_that_nobody_waits_for_changes_nothing() -> None:
    patience = Patience(0.5)
    patience.answer(7.0)  # weights that somebody sent without a push
    computed(patience, 7.0, 9.0)
    assert patience.left_s(9.0) == pytest.approx(1.0)
