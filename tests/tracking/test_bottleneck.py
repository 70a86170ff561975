"""Where the time went, against events made by hand whose answer is known."""

from __future__ import annotations

from typing import Any

import pytest

from smolrun.events import EvalDone, RankStep, RunStarted, StepDone
from smolrun.tracking.bottleneck import (
    Bottleneck,
    RunSetup,
    TimeReport,
    TimeShares,
    find_bottleneck,
)

PLAIN: dict[str, Any] = {"global_batch_size": 32, "staleness": 0}


def setup(hosts: list[str], *, key: str | None = None, **more: Any) -> RunSetup:
    keys = [key.format(index) if key else None for index in range(len(hosts))]
    return RunSetup(hosts, keys, [1.0] * len(hosts), **{**PLAIN, **more})


def rank_step(step: int, rank: int, compute_s: float, wait_s: float, **more: Any) -> RankStep:
    sent = more.pop("sent", 0)
    return RankStep(step, rank, compute_s, wait_s, None, sent, sent, **more)


def step_done(step: int, time_s: float) -> StepDone:
    return StepDone(step, time_s, 1.0, 1.0, 0.1, 10, 10.0, 0, 0, 0.0, 0.0)


def sums(
    ranks: list[tuple[float, float]], *, step_s: float, steps: int = 5, **more: Any
) -> TimeShares:
    """The same step again and again: (compute_s, wait_s) per rank."""
    shares = TimeShares(len(ranks), more.pop("stage_micro_batches", None))
    for step in range(steps + 1):
        for rank, (compute_s, wait_s) in enumerate(ranks):
            shares.record(rank_step(step, rank, compute_s, wait_s, **more))
        shares.record(step_done(step, (step + 1) * step_s))
    return shares


def verdict(
    ranks: list[tuple[float, float]], where: RunSetup, *, step_s: float, **more: Any
) -> Bottleneck:
    found = find_bottleneck(sums(ranks, step_s=step_s, **more).run, where)
    assert found is not None
    total = found.computing + found.waiting + found.bubble + found.network + found.other
    assert total == pytest.approx(1.0)
    return found


def test_a_slow_rank_is_named_and_given_its_share() -> None:
    where = setup(["mini", "pi5"], key="cluster.hosts[{}].speed")
    found = verdict([(1.0, 1.8), (2.3, 0.5)], where, step_s=2.8)
    assert found.computing == pytest.approx(3.3 / 5.6)
    assert found.waiting == pytest.approx(1.3 / 5.6)
    assert found.network == pytest.approx(1.0 / 5.6)
    assert (found.slow_rank, found.slow_factor) == (1, pytest.approx(2.3))
    assert found.line == (
        "59 % computing, 23 % waiting for rank 1 on pi5 (2.3x slower), "
        "18 % network (0.0 kB a step, 0.0 kB/s); try cluster.hosts[1].speed=0.43"
    )


def test_where_no_share_can_be_set_it_is_told_what_leaving_the_rank_out_would_give() -> None:
    found = verdict([(1.0, 2.0), (3.0, 0.0)], setup(["a", "b"]), step_s=3.0)
    assert found.advice == "without it the others would be about 1.5x as fast"
    slight = verdict([(1.0, 0.5), (1.5, 0.0)], setup(["a", "b"]), step_s=1.5)
    assert slight.slow_rank == 1
    assert slight.advice == "", "two ranks beat one, even if one of them is slow"


@pytest.mark.parametrize(
    ("staleness", "advice"),
    [
        (0, "try staleness.bound=1, which hides the network behind the next step"),
        (1, "try training.global_batch_size=64"),
        (None, "try training.global_batch_size=64"),
    ],
)
def test_a_slow_network_asks_for_late_gradients_or_fewer_exchanges(
    staleness: int | None, advice: str
) -> None:
    where = setup(["local"] * 2, staleness=staleness)
    found = verdict([(1.0, 3.0), (1.0, 3.0)], where, step_s=4.0, sent=12_000_000)
    assert (found.network, found.waiting, found.slow_rank) == (pytest.approx(0.75), 0.0, None)
    assert found.line == f"25 % computing, 75 % network (12 MB a step, 3.0 MB/s); {advice}"


@pytest.mark.parametrize(
    ("staleness", "wait_s", "advice"),
    [
        (0, 3.0, "try quantization=int8"),
        (0, 0.9, "try staleness.bound=1, which hides the network behind the next step"),
        (1, 0.9, "try quantization=int8"),
        (None, 0.9, "try quantization=int8"),
        (None, 0.05, ""),
    ],
)
def test_what_computing_cannot_hide_should_be_smaller(
    staleness: int | None, wait_s: float, advice: str
) -> None:
    where = setup(["local"] * 2, staleness=staleness, can_quantize=True)
    ranks, step_s = [(1.0, wait_s), (1.0, wait_s)], 1.0 + wait_s
    assert verdict(ranks, where, step_s=step_s, sent=200_000).advice == advice
    few = verdict(ranks, where, step_s=step_s, sent=2_000)
    assert "2.0 kB a step" in few.line or wait_s < 0.1
    assert "int8" not in few.advice, "smaller messages are as many"


def test_a_rank_that_its_machine_slows_down_is_told_whatever_else_there_is() -> None:
    hot = {"throttled": True, "temperature_c": 84.6}
    where = setup(["mini", "pi5"], key="cluster.hosts[{}].speed")
    shares = TimeShares(2)
    for step in range(4):
        shares.record(rank_step(step, 0, 1.0, 1.0))
        shares.record(rank_step(step, 1, 2.0, 0.0, **hot))
        shares.record(step_done(step, step * 2.0))
    found = find_bottleneck(shares.run, where)
    assert found is not None
    assert found.throttled == (1,)
    assert found.advice.startswith("rank 1 on pi5: throttled by the machine itself at 85 °C")


def test_ranks_that_are_slow_in_turn_are_not_called_slow() -> None:
    shares = TimeShares(2)
    for step in range(9):
        slow = step % 2
        shares.record(rank_step(step, slow, 2.0, 0.0))
        shares.record(rank_step(step, 1 - slow, 1.0, 1.0))
        shares.record(step_done(step, step * 2.0))
    found = find_bottleneck(shares.run, setup(["a", "b"]))
    assert found is not None
    assert found.slow_rank is None
    assert found.line == (
        "75 % computing, 25 % waiting, no single straggler; "
        "try staleness.bound=1, which evens out jitter between ranks"
    )


def test_stages_wait_for_each_other_and_get_advice_of_their_own() -> None:
    """4 micro-batches of 0.25 s on each of two stages take 1.25 s, the slow ones 2.5 + 0.25."""
    stages = {"staleness": None, "stage_advice": "try algorithm.micro_batches=16"}
    where = setup(["a", "b"], can_quantize=True, **stages)
    found = verdict([(1.0, 0.25), (1.0, 0.25)], where, step_s=1.25, stage_micro_batches=4)
    assert (found.bubble, found.network) == (pytest.approx(0.2), pytest.approx(0.0))
    assert found.line == "80 % computing, 20 % pipeline bubble; try algorithm.micro_batches=16"
    slow = verdict([(1.0, 1.75), (2.5, 0.25)], where, step_s=2.75, stage_micro_batches=4)
    assert "waiting for rank 1 on b (2.5x slower), 9 % pipeline bubble" in slow.line
    assert slow.advice == "", "no rank of a pipeline can be left out"
    thin = verdict([(1.0, 3.0), (1.0, 3.0)], where, step_s=4.0, stage_micro_batches=4)
    assert "69 % network" in thin.line and thin.advice == "try quantization=int8"


def test_one_batch_in_all_stages_is_bubble_and_no_network() -> None:
    where = setup(["a", "b", "c"], staleness=None, stage_advice="try algorithm=mp_pipeline")
    one_by_one = [(1.0, 4.0), (3.0, 2.0), (1.0, 4.0)]
    found = verdict(one_by_one, where, step_s=5.0, stage_micro_batches=1)
    assert (found.network, found.other) == (pytest.approx(0.0), pytest.approx(0.0))
    assert found.computing + found.waiting + found.bubble == pytest.approx(1.0)


def test_computing_is_what_it_should_be() -> None:
    found = verdict([(1.0, 0.02)], setup(["local"]), step_s=1.02)
    assert found.advice == ""
    assert found.line == "98 % computing, 2 % other (data, evaluation, saving)", (
        "no network for one"
    )
    fast = verdict([(1.0, 0.0)], setup(["pc"], can_use_bf16=True), step_s=1.0)
    assert fast.line == "100 % computing; try precision=bf16"


def test_what_is_neither_computing_nor_waiting_is_other() -> None:
    found = verdict([(1.0, 0.0), (1.0, 0.0)], setup(["a", "b"]), step_s=4.0)
    assert found.other == pytest.approx(0.75)
    assert "75 % other (data, evaluation, saving)" in found.line


def test_the_first_step_warms_up_and_does_not_count() -> None:
    shares = TimeShares(1)
    shares.record(rank_step(0, 0, 100.0, 0.0))
    shares.record(step_done(0, 100.0))
    assert find_bottleneck(shares.run, setup(["local"])) is None
    shares.record(rank_step(1, 0, 1.0, 1.0))
    shares.record(step_done(1, 102.0))
    found = find_bottleneck(shares.run, setup(["local"]))
    assert found is not None
    assert found.computing == pytest.approx(0.5)


def test_ranks_may_tell_in_any_order_and_the_minute_begins_anew() -> None:
    shares = TimeShares(2)
    for step in range(3):
        shares.record(rank_step(step, 0, 1.0, 0.0))
        shares.record(step_done(step, step * 1.0))
    assert shares.run.steps == 0, "rank 1 has said nothing"
    for step in range(3):
        shares.record(rank_step(step, 1, 1.0, 0.0))
    shares.record(EvalDone(2, 1.0, 1))
    assert shares.run.steps == 2
    assert shares.take_recent().steps == 2
    assert shares.take_recent().steps == 0
    assert shares.run.steps == 2


def test_a_silent_rank_does_not_fill_the_memory() -> None:
    shares = TimeShares(2)
    for step in range(5000):
        shares.record(rank_step(step, 0, 1.0, 0.0))
        shares.record(step_done(step, step * 1.0))
    assert len(shares._rows) <= 256
    assert len(shares._durations_s) <= 256


def test_the_summary_gets_plain_figures() -> None:
    found = verdict([(1.0, 1.8), (2.3, 0.5)], setup(["a", "b"]), step_s=2.8, sent=1000)
    assert found.as_json() == {
        "computing": 0.5893,
        "waiting_for_slower_ranks": 0.2321,
        "pipeline_bubble": 0.0,
        "network": 0.1786,
        "other": 0.0,
        "slow_rank": 1,
        "slow_factor": 2.3,
        "throttled_ranks": [],
        "bytes_sent_per_step": 1000,
        "advice": "without it the others would be about 1.1x as fast",
    }


def teller(said: list[str]) -> TimeReport:
    setup = RunSetup(["a", "b"], [None, None], [1.0, 1.0], 8, staleness=0, can_use_bf16=True)
    return TimeReport(setup, said.append)


def train(
    reader: TimeReport, steps: range, step_s: float, wait_s: float, bytes_sent: int = 0
) -> None:
    for step in steps:
        for rank in (0, 1):
            reader.record(RankStep(step, rank, step_s - wait_s, wait_s, None, bytes_sent, 0))
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
