"""The verdict is said each minute, and at the end about the whole run."""

from __future__ import annotations

from smolrun.events import RankStep, RunStarted, StepDone
from smolrun.tracking.time_report import TimeTeller
from smolrun.tracking.verdict import Setup


def teller(said: list[str]) -> TimeTeller:
    setup = Setup(["a", "b"], [None, None], [1.0, 1.0], 8, staleness=0, can_use_bf16=True)
    return TimeTeller(setup, said.append)


def train(reader: TimeTeller, steps: range, step_s: float, wait_s: float) -> None:
    for step in steps:
        for rank in (0, 1):
            reader.record(RankStep(step, rank, step_s - wait_s, wait_s, None, 0, 0))
        time_s = step * step_s
        reader.record(StepDone(step, time_s, 1.0, 1.0, 0.1, 10, 10.0, 0, 0, 0.0, 0.0))


def test_each_minute_is_told_by_itself_and_the_end_is_about_all():
    said: list[str] = []
    reader = teller(said)
    train(reader, range(31), 2.0, 0.0)
    assert len(said) == 1
    assert said[0].startswith("where the time goes: 100 % computing")
    train(reader, range(31, 61), 2.0, 1.0)
    assert len(said) == 2
    assert said[1].startswith("where the time goes: 50 % computing, 50 % network")
    assert reader.line.startswith("where the time went: 75 % computing, 25 % network")
    summary = reader.summary()
    assert summary is not None
    assert summary["network"] == 0.25


def test_a_short_run_says_nothing_on_the_way_and_an_empty_one_nothing_at_all():
    said: list[str] = []
    reader = teller(said)
    assert (reader.line, reader.summary()) == ("", None)
    train(reader, range(5), 2.0, 0.0)
    assert said == []
    assert reader.line


def test_a_faster_arithmetic_is_only_advised_on_a_device_that_has_it():
    for device, expected in (("cpu", False), ("cuda", True)):
        reader = teller([])
        reader.record(RunStarted(10, 5, 10, 10, device))
        train(reader, range(5), 2.0, 0.0)
        assert ("bf16" in reader.line) is expected
