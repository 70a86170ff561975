"""Who trained, summed up from the events of a parameter server."""

from __future__ import annotations

from smolrun.algorithms.edp.protocol import DropReason
from smolrun.algorithms.edp.server import DROP_TEXTS
from smolrun.events import PushApplied, PushDropped
from smolrun.tracking.push_record import PushRecord


def test_shares_ages_and_what_was_dropped() -> None:
    record = PushRecord()
    assert (record.line, record.summary()) == ("", {})
    for rank, age in ((1, 0), (1, 3), (2, 1)):
        record.record(PushApplied(0, rank, 7, 5, age, samples=8, grad_norm=1.0))
    for reason in ("its rank is gone", "its rank is gone", "it was not finite"):
        record.record(PushDropped(0, 2, 8, reason))
    assert record.summary()["1"] == {
        "pushes": 2,
        "samples": 16,
        "share": 0.6667,
        "mean_age": 1.5,
        "max_age": 3,
        "dropped": {},
    }
    assert record.summary()["2"]["dropped"] == {"its rank is gone": 2, "it was not finite": 1}
    assert record.line == (
        "rank 1 67% of the samples, 1.5 updates late; "
        "rank 2 33% of the samples, 1.0 updates late, 3 gradients dropped"
    )


def test_work_lost_to_a_slow_link_is_worth_advice() -> None:
    record = PushRecord()

    def happen(rank: int, applied: int, replaced: int, lost: int = 0) -> None:
        for _ in range(applied):
            record.record(PushApplied(0, rank, 7, 5, 0, samples=8, grad_norm=1.0))
        for why, count in ((DropReason.REPLACED, replaced), (DropReason.LOST, lost)):
            for _ in range(count):
                record.record(PushDropped(0, rank, 7, DROP_TEXTS[why]))

    happen(1, 90, 10, lost=50)
    assert record.advice(can_quantize=True) == "", "a tenth, and what is lost with a rank"
    happen(2, 8, 2)
    told = "rank 2: its link is slower than it computes, so newer gradients took the place of older"
    assert record.advice(can_quantize=True) == f"{told} ones; try quantization=int8"
    assert record.advice(can_quantize=False) == f"{told} ones"
    happen(3, 0, 1)
    assert record.advice(can_quantize=False).startswith("ranks 2 and 3: their links are slower")


def test_reasons_that_a_server_makes_up_are_counted_as_others() -> None:
    record = PushRecord()
    for number in range(1000):
        record.record(PushDropped(0, 1, number, f"reason {number}"))
    dropped = record.summary()["1"]["dropped"]
    assert len(dropped) <= 17 and sum(dropped.values()) == 1000
