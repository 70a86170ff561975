"""The dashboard as lines of text: what is on them at several sizes, and that it always fits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from rich.cells import cell_len

from smolrun.tracking.run_view import View
from smolrun.tracking.server_load import ServerLoad, StageLoad
from smolrun.ui.drawing import ASCII, UNICODE
from smolrun.ui.run_state import RunState
from smolrun.ui.screen import Position, Shown, draw
from tests.ui.made import HOSTILE, JOINED, LATE, SAVED, facts, lines, trained, training, view

SIZES = [(80, 24), (120, 40), (200, 60), (40, 15), (40, 24), (20, 6), (80, 4), (1, 1)]


def screen(
    state: RunState, width: int = 80, height: int = 24, now: float = 20.0, **shown: Any
) -> str:
    return "\n".join(line.plain for line in draw(state, Shown(**shown), width, height, now))


def busy() -> RunState:
    state = trained(40)
    state.apply(view(lines([JOINED, LATE, SAVED, *training(40, 44)])), now=22.0)
    return state


def test_everything_is_on_80_columns() -> None:
    shown = screen(busy())
    for text in (
        "20260131-142501-x-aaaa", "running", "step 44/100", "44 %", "0:00:22, 0:00:28 left",
        "loss 3.5700", "4,800 tokens/s", "grad norm 0.9", "waiting for rank 2 on pi5 (3.5x slower)",
        "rank host  status", "mini1", "training", "slow", "2 MB/s", "500 MB", "█ computing",
        "loss, steps 1 to 44", "4 ⠉", "events", "rank 1 joined", "saved step-00000010 (12 MB)",
        "q leave  s stop  l logs  ? keys",
    ):  # fmt: skip
        assert text in shown, f"{text}\n{shown}"


def test_wide_terminals_show_more() -> None:
    shown = screen(busy(), 130, 40)
    header = next(line for line in shown.splitlines() if line.startswith("rank"))
    assert header.split() == ["rank", "host", "status", "step", "loss", "grad", "tokens/s", "time",
                              "out", "in", "memory", "lag", "computing"]  # fmt: skip
    assert any("loss, steps" in line and "events" in line for line in shown.splitlines())


def test_narrow_ones_what_matters_most() -> None:
    shown = screen(busy(), 40, 15)
    header = next(line for line in shown.splitlines() if line.startswith("rank"))
    assert header.split() == ["rank", "host", "status", "tokens/s", "time"]
    assert "step 44/100" in shown and "slow" in shown and "▓" in shown


@pytest.mark.parametrize(("width", "height"), SIZES)
@pytest.mark.parametrize("glyphs", [UNICODE, ASCII])
@pytest.mark.parametrize("mode", ["run", "logs", "help"])
def test_every_line_is_as_wide_as_the_terminal(
    width: int, height: int, glyphs: Any, mode: Any
) -> None:
    states = [busy(), RunState(facts()), wide_text(), a_server(), many_ranks()]
    for state in states:
        shown = Shown(mode=mode, glyphs=glyphs, log=[("日本語" * 50, ""), ("x" * 300, "error")])
        drawn = draw(state, shown, width, height, 20.0)
        assert len(drawn) == height
        assert {cell_len(line.plain) for line in drawn} == {width}
        if glyphs is ASCII:
            assert all(line.plain.isascii() for line in drawn)


def wide_text() -> RunState:
    hosts = ("東京のミニ", "e\u0301" * 30, "h" * 300)
    state = RunState(facts(hosts=hosts))
    state.apply(view([HOSTILE, *lines(training(0, 20, hosts=hosts))]), now=10.0)
    return state


def many_ranks() -> RunState:
    return trained(5, hosts=tuple(f"host{number}" for number in range(64)))


def a_server() -> RunState:
    state = RunState(facts(hosts=(), is_server=True, setup=None))
    for now, tokens in ((10.0, 0), (12.0, 240)):
        stages = [StageLoad(0, "mini1", 0, 11, 1000, tokens / 200, 0.0, 0.0, tokens)]
        load = ServerLoad("ready", None, 5, 17, 0.79, tokens, stages)
        summary = {"url": "http://mini1:8000", "model": "smollm2"}
        state.apply(View("serving", summary=summary, server=load), now=now)
    return state


def test_a_server_shows_requests_queue_and_stages() -> None:
    shown = screen(a_server())
    for text in ("serving", "5 running  17 waiting", "answers 120 tokens/s", "cache 79 %",
                 "smollm2 at http://mini1:8000", "0-11", "ready", "120"):  # fmt: skip
        assert text in shown, shown
    refused = a_server()
    refused.apply(View("serving", server=ServerLoad(reason="it answered 401")), now=13.0)
    assert "it answered 401" in screen(refused)


def test_without_colours_and_utf8_it_means_the_same() -> None:
    shown = screen(busy(), glyphs=ASCII)
    assert shown.isascii()
    assert "# computing  = waiting for slower ranks" in shown and "slow" in shown
    assert "waiting for rank 2 on pi5" in shown
    assert "[" not in shown and "\x1b" not in shown


def test_the_worst_is_said_first() -> None:
    state = busy()
    assert "no step for 30 s" in screen(state, now=52.0)
    state.lost_contact("mini1: no answer from 10.0.0.1", 22.0)
    assert "no contact for 5 s: mini1: no answer from 10.0.0.1; trying again" in screen(
        state, now=27.0
    )
    state.apply(
        view([], "failed", summary={"failed_rank": 1, "reason": "rank 1 on mini2 died"}), now=30.0
    )
    shown = screen(state)
    assert "rank 1 on mini2 died" in shown and "lost" in shown
    state.apply(view([], "died"), now=31.0)
    assert "its driver was killed" in screen(state)


def test_before_the_first_step() -> None:
    shown = screen(RunState(facts()))
    assert "waiting for the first step" in shown and shown.count("starting") == 3
    assert "step 0/100" in shown


def test_many_ranks_are_scrolled() -> None:
    state = many_ranks()
    first, last = screen(state), screen(state, scroll=1000)
    assert "of 64 ranks" in first and "host0 " in first and "host63" not in first
    assert "all" in last and "host63" in last and "host0 " not in last


def test_logs_begin_at_their_end_and_are_scrolled_back() -> None:
    log = [(f"line {number}", "info") for number in range(100)]
    shown = screen(trained(3), mode="logs", log=log)
    assert "logs of all ranks" in shown and "line 99" in shown and "line 50" not in shown
    shown = screen(trained(3), mode="logs", log=log, scroll=45, log_rank=2)
    assert "logs of rank 2" in shown and "line 54" in shown and "line 55" not in shown


def test_a_question_takes_the_place_of_the_keys() -> None:
    shown = screen(trained(3), question="stop the run?")
    assert shown.splitlines()[-1].startswith("stop the run?")


def test_a_replay_has_its_place_and_its_keys() -> None:
    place = Position(30.0, 60.0, 10.0)
    assert "replay 0:00:30/0:01:00 x10 " in screen(trained(3), position=place)
    paused = screen(trained(3), position=replace(place, is_paused=True))
    assert "paused" in paused.splitlines()[-1]
    assert "twice and half the speed" in screen(trained(3), position=place, mode="help")
    assert "twice and half the speed" not in screen(trained(3), mode="help")
