"""What a dashboard knows of a run, from its events alone."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from smolrun.events import Norms, Note, RankStep
from smolrun.log_records import LogRecord
from smolrun.tracking.run_view import Chunk, FilePosition, View
from smolrun.tracking.server_load import ServerLoad, StageLoad
from smolrun.ui.run_state import RunState
from tests.tracking.test_past_runs import a_run
from tests.ui.made import (
    HOSTILE,
    JOINED,
    LATE,
    LEFT,
    SAVED,
    STEP_S,
    facts,
    lines,
    looked_at,
    rank_step,
    step_done,
    trained,
    training,
    view,
    write,
)


def test_one_row_for_each_rank_and_one_for_all() -> None:
    rows = trained(40).rows(20.0)
    assert [(row.rank, row.host, row.step) for row in rows] == [
        (None, "", 40), (0, "mini1", 40), (1, "mini2", 40), (2, "pi5", 40),
    ]  # fmt: skip
    everyone, first, _, slow = rows
    assert everyone.loss == pytest.approx(4.0 - 0.39) and everyone.grad_norm == 0.9
    assert everyone.tokens_per_s == pytest.approx(2400 / STEP_S)
    assert first.tokens_per_s == pytest.approx(800 / STEP_S)
    assert (first.sent, first.received) == (1e6 / STEP_S, 2e6 / STEP_S)
    assert everyone.sent == pytest.approx(3e6 / STEP_S)
    assert (first.memory, first.lag, first.temperature_c) == (500_000_000, 0, None)
    # Of half a second: computing, waiting for rank 2, bubble, network, other.
    assert first.shares == pytest.approx((0.2, 0.5, 0.0, 0.1, 0.2))
    assert slow.shares == pytest.approx((0.7, 0.0, 0.0, 0.1, 0.2))
    assert sum(everyone.shares) == pytest.approx(1)


def test_the_verdict_names_who_is_slow_and_follows_the_run() -> None:
    state = trained(40)
    assert "waiting for rank 2 on pi5 (3.5x slower)" in state.verdict
    assert [row.status for row in state.rows(20.0)[1:]] == ["training", "training", "slow"]
    state.apply(view(lines(training(40, 200, compute_s={1: 0.35}))), now=100.0)
    assert "waiting for rank 1 on mini2 (3.5x slower)" in state.verdict


def test_a_rank_that_joins_leaves_and_is_late() -> None:
    state = trained(2)
    state.apply(view(lines([JOINED, LEFT, *training(2, 8), LATE, SAVED])), now=5.0)
    statuses = [row.status for row in state.rows(5.0)[1:]]
    assert statuses[2] == "late"
    assert [(event.kind, event.step) for event in state.events] == [
        ("joined", 4), ("lost", 6), ("late", 8), ("saved", 10),
    ]  # fmt: skip
    texts = [event.text for event in state.events]
    assert "rank 1 left (its process was killed); its 2 work items" in texts[1]
    assert texts[3] == "saved step-00000010 (12 MB)"
    state.apply(view(lines([LEFT])), now=5.0)
    assert state.rows(5.0)[2].status == "left"
    state.apply(view(lines(training(8, 40))), now=20.0)
    assert [row.status for row in state.rows(20.0)[1:]] == ["training", "training", "slow"]


def test_a_rank_that_reports_nothing_is_behind_and_its_steps_count_for_the_others() -> None:
    state = trained(5)
    alone = [event for event in training(5, 90) if getattr(event, "rank", 0) != 1]
    state.apply(view(lines(alone)), now=45.0)
    lost = state.rows(45.0)[2]
    assert (lost.step, lost.lag) == (5, 85)
    assert state.rows(45.0)[1].shares  # though no step since is whole


def test_the_rank_that_ended_a_run_is_lost() -> None:
    state = trained(5)
    state.apply(view([], "failed", summary={"failed_rank": 1, "reason": "gone"}), now=3.0)
    assert [row.status for row in state.rows(3.0)[1:]] == ["failed", "lost", "failed"]
    assert state.has_ended and state.left_s is None


def test_no_contact_and_contact_again() -> None:
    state = trained(5)
    state.lost_contact("mini1: no answer", 10.0)
    state.lost_contact("mini1: no answer", 14.0)
    assert state.unreachable == (10.0, "mini1: no answer")
    assert {row.status for row in state.rows(15.0)[1:]} == {"unknown"}
    state.apply(view(lines(training(5, 6))), now=16.0)
    assert state.unreachable is None and state.rows(16.0)[1].step == 6


def test_no_step_for_long_is_said_and_a_slow_run_is_not_quiet() -> None:
    state = trained(4)
    assert state.quiet_s(2.0 + 9.0) == 0 and state.quiet_s(2.0 + 11.0) == pytest.approx(11)
    slow = RunState(facts())
    slow.apply(view(lines([step_done(0, time_s=60.0)])), now=60.0)
    assert slow.quiet_s(600.0) == 0 and slow.quiet_s(700.0) > 600


def test_a_long_run_costs_as_much_as_a_short_one() -> None:
    state = RunState(facts())
    for first in range(0, 3000, 500):
        state.apply(view(lines(training(first, first + 500))), now=0.0)
    assert len(state.curve.points) <= 1024 and len(state.rates) <= 32
    assert not state._open and len(state._steps) <= 64


def test_its_history_and_the_rest_of_the_file_are_one_curve(tmp_path: Path) -> None:
    folder = a_run(tmp_path)
    write(folder, [JOINED, *training(0, 1500)])
    state = RunState(facts())
    for _ in range(2):  # the second look, at another file of that name, begins anew
        state.apply(looked_at(folder), now=0.0)
        steps = [point.step for point in state.curve.points]
        assert steps == sorted(set(steps)) and steps[-1] >= 1498
        assert [event.text for event in state.events] == ["step 4: rank 1 joined"]
        assert state.time_s == pytest.approx(1500 * STEP_S)


def changed(event: RankStep, **changes: Any) -> str:
    return json.dumps({**json.loads(lines([event])[0]), **changes})


def test_lines_of_other_versions() -> None:
    state = trained(5)
    newer = changed(rank_step(5, 0), power_w=7.5, nested={"a": [1]})
    strange = ["[]", '"x"', "{", '{"event": 7}', '{"event": "from_the_future", "step": 1}', ""]
    state.apply(
        view([newer, *strange, "\x00\xff" * 10, changed(rank_step(6, 0), step=-1)]), now=3.0
    )
    assert state.rows(3.0)[1].step == 6
    assert state.unreadable == 8


def test_hostile_text_is_one_line_without_control_characters() -> None:
    state = trained(5)
    name = "\x1b]0;owned\x07host"
    other = RunState(facts(hosts=(name, "\u202eb")))
    other.apply(view([HOSTILE, *lines(training(0, 9, hosts=(name, "b")))]), now=1.0)
    log = Chunk(["\x1b[31mred\r", "warning: \x07bell"], FilePosition(2, 2))
    state.apply(view([HOSTILE], log=log), now=3.0)
    shown = [e.text for s in (state, other) for e in s.events] + [r.host for r in other.rows(1.0)]
    assert all(text.isprintable() for text in shown), shown
    assert any("evil" in text for text in shown)


def test_numbers_that_are_none_or_absurd() -> None:
    state = RunState(facts())
    odd = [
        *training(0, 3),
        rank_step(2**53 - 1, 2**53 - 1, compute_s=1e18, bytes_sent=2**53 - 1),
        step_done(2**53 - 1, time_s=1e18, loss=None, grad_norm=None, tokens=0),
        step_done(4, time_s=0.0, loss=1e300),
        Norms(step=4, gradients={"a": 1.0}),
    ]
    state.apply(view(lines(odd)), now=1.0)
    assert len(state.rows(1.0)) <= 6
    many = [rank_step(0, rank) for rank in range(3000)]
    state.apply(view(lines(many)), now=1.0)
    assert len(state.rows(1.0)) <= 1025


def test_what_the_log_and_the_metrics_both_say_is_there_once() -> None:
    state = trained(5)
    note = Note("warning", "the disk is almost full")
    log = Chunk(["step 5/100  loss 3.9", "warning: the disk is almost full", "new words",
                 "where the time goes: 50 % computing"], FilePosition(2, 9))  # fmt: skip
    state.apply(view(lines([note]), log=log), now=3.0)
    assert [(e.text, e.step) for e in state.events] == [
        ("warning: the disk is almost full", 5),
        ("new words", 5),
    ]
    first = RunState(facts())
    seen = Chunk(["said before", "warning: the disk is almost full"], FilePosition(2, 9), True)
    first.apply(view(lines([note]), log=seen), now=3.0)
    assert (first.events[0].text, first.events[0].step) == ("said before", None)
    assert len(first.events) == 2


def test_lines_of_logs_have_rank_host_and_time() -> None:
    state = trained(5)
    when = datetime(2026, 1, 31, 12, 0, 0).astimezone()
    state.add_record(LogRecord(when, 1, "pi\x1b5", "warning", "a.b", "hot\nvery"))
    state.add_record(LogRecord(when, None, "here", None, None, "printed"))
    assert list(state.logs) == [
        (1, "rank 1 pi 5 12:00:00 hot very", "warning"),
        (None, "driver here 12:00:00 printed", ""),
    ]


def load(tokens: int, compute_s: float, **changes: Any) -> ServerLoad:
    stages = [
        StageLoad(
            rank, f"mini{rank}", 4 * rank, 4 * rank + 3, 1000, compute_s, 0.2, 0.1, tokens, 64
        )
        for rank in range(2)
    ]
    return ServerLoad(
        "ready", running=3, waiting=2, generated_tokens=tokens, stages=stages, **changes
    )


def test_a_server() -> None:
    state = RunState(facts(hosts=(), is_server=True, setup=None))
    state.apply(View("serving", server=load(100, 1.0)), now=10.0)
    assert [row.tokens_per_s for row in state.rows(10.0)] == [None, None, None]
    state.apply(View("serving", server=load(300, 2.0)), now=12.0)
    everyone, first, second = state.rows(12.0)
    assert (first.host, first.layers, first.status) == ("mini0", "0-3", "ready")
    assert first.tokens_per_s == 100 and everyone.tokens_per_s == 200
    assert second.shares == pytest.approx((0.5, 0.0, 0.0, 0.0, 0.5))
    assert list(state.server.rates) == [100]
    restarted = load(0, 0.0)
    state.apply(View("serving", server=restarted), now=13.0)
    assert state.rows(13.0)[1].tokens_per_s == 0
