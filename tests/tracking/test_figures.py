"""Events as named numbers, and rows that are complete before they go anywhere."""

from __future__ import annotations

import math
from typing import Any

from smolrun.events import EvalDone, Norms, Note, RankStep, StepDone, TextSample, to_json
from smolrun.tracking.figures import StepRows, figures


def step(number: int, loss: float | None = 2.0) -> dict[str, Any]:
    return to_json(StepDone(number, 1.5, loss, 0.5, 1e-3, 10, 99.0, 7, 8, 0.25, 0.125))


def rank_step(number: int, rank: int, **more: Any) -> dict[str, Any]:
    return to_json(RankStep(number, rank, 0.25, 0.125, None, 7, 8, **more))


def test_names_say_whose_number_it_is():
    assert figures(step(3)) == {
        "train/time_s": 1.5,
        "train/loss": 2.0,
        "train/grad_norm": 0.5,
        "train/lr": 1e-3,
        "train/tokens": 10,
        "train/tokens_per_s": 99.0,
    }
    assert figures(rank_step(3, 1, memory_bytes=9, throttled=True)) == {
        "rank1/compute_s": 0.25,
        "rank1/wait_s": 0.125,
        "rank1/bytes_sent": 7,
        "rank1/bytes_received": 8,
        "rank1/memory_bytes": 9,
        "rank1/throttled": 1,
    }
    assert figures(to_json(EvalDone(3, 1.5, 20))) == {"eval/loss": 1.5, "eval/tokens": 20}
    norms = to_json(Norms(3, {"blocks.0": 1.0}, updates={"blocks.0": 0.5}))
    assert figures(norms) == {"norm/gradients/blocks.0": 1.0, "norm/updates/blocks.0": 0.5}


def test_what_is_no_number_is_left_out():
    assert "train/loss" not in figures(step(0, None))
    assert "train/loss" not in figures({"event": "step", "step": 0, "loss": math.nan})
    assert figures(to_json(TextSample(3, "a", "b"))) == {}
    assert figures(to_json(Note("info", "hello"))) == {}


def test_an_event_of_a_kind_that_is_not_known_yet_tells_its_numbers():
    assert figures({"event": "saved", "step": 3, "bytes": 5, "to": "x"}) == {"saved/bytes": 5}


def test_a_row_is_complete_when_every_rank_is_past_it():
    rows = StepRows(2)
    assert rows.add(rank_step(0, 0)) == []
    assert rows.add(step(0)) == []
    assert rows.add(rank_step(1, 0)) == [], "rank 1 has not told yet"
    assert rows.add(to_json(EvalDone(0, 1.5, 20))) == []
    assert rows.add(rank_step(0, 1)) == []
    ((number, row),) = rows.add(rank_step(1, 1))
    assert number == 0
    assert {"train/loss", "eval/loss", "rank0/wait_s", "rank1/wait_s"} <= row.keys()
    assert [number for number, _ in rows.rest()] == [1]
    assert rows.rest() == []


def test_steps_that_are_known_already_are_not_told_again():
    rows = StepRows(1, first_step=5)
    for number in range(3, 8):
        rows.add(rank_step(number, 0))
    assert [number for number, _ in rows.rest()] == [7], "5 and 6 have been given back already"
    assert rows.add(rank_step(2, 0)) == []
    assert rows.rest() == []


def test_a_rank_that_tells_of_no_steps_does_not_hold_the_others_back():
    rows = StepRows(2)
    given = [number for step in range(200) for number, _ in rows.add(rank_step(step, 0))]
    assert given == list(range(200 - 64))
