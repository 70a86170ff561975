"""One look at a run's folder: states, and files that grow, are cut short and are replaced."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from smolrun.tracking import run_view
from smolrun.tracking.run_folder import RunFolder
from smolrun.tracking.run_view import FilePosition, Request, View, answer, decode, read_on
from tests.tracking.test_past_runs import a_run, change_driver, write_steps


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return a_run(tmp_path)


def test_a_file_is_read_line_by_line_as_it_grows(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    assert read_on(file, None).place is None
    file.write_text("one\ntwo\nhal")
    first = read_on(file, None)
    assert (first.lines, first.is_fresh) == (["one", "two"], True)
    assert first.place is not None and first.place.offset == len("one\ntwo\n")
    with file.open("a") as more:
        more.write("f\nfour\u2028\n")
    second = read_on(file, first.place)
    assert (second.lines, second.is_fresh) == (["half", "four\u2028"], False)
    assert read_on(file, second.place).lines == []


def test_a_long_file_begins_with_a_whole_line_near_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_view, "_HISTORY_BYTES", 25)
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(f"line {number:03}\n" for number in range(100)))
    assert read_on(file, None).lines == ["line 098", "line 099"]


def test_one_look_brings_only_so_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_view, "_MOST_BYTES", 16)
    file = tmp_path / "metrics.jsonl"
    file.write_text("first\nsecond\nthird\n" + "x" * 40 + "\n")
    place = FilePosition(file.stat().st_ino, 0)
    told = []
    while lines := (chunk := read_on(file, place)).lines:
        told += lines
        assert chunk.place is not None
        place = chunk.place
    assert "".join(told) == "firstsecondthird" + "x" * 40


@pytest.mark.parametrize("what", ["replaced", "cut"])
def test_a_file_that_is_another_one_now_is_no_sequel(tmp_path: Path, what: str) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text("one\ntwo\n")
    place = read_on(file, None).place
    if what == "replaced":
        (tmp_path / "fresh").write_text("one\nnew\nand more of it\n")
        os.replace(tmp_path / "fresh", file)
    else:
        file.write_text("one\n")
    assert read_on(file, place).is_fresh


def test_how_a_run_is(folder: RunFolder) -> None:
    assert answer(Request(str(folder.path))).state == "died"
    folder.write_driver(steps=100)
    write_steps(folder, 0, 1)
    view = answer(Request(str(folder.path), reads=True, figures=True))
    assert (view.state, view.has_ended, view.asked) == ("running", False, 0)
    assert view.figures["step"] == 2 and view.figures["steps"] == 100
    assert [json.loads(line)["step"] for line in view.metrics.lines] == [0, 1]
    change_driver(folder, process_created=1.0)
    assert answer(Request(str(folder.path))).state == "died"
    folder.write_summary({"status": "stopped", "exit_code": 131})
    view = answer(Request(str(folder.path)))
    assert view.has_ended and view.summary["exit_code"] == 131


def test_a_wish_is_counted_until_the_next_driver(folder: RunFolder) -> None:
    folder.write_driver(steps=100)
    assert [answer(Request(str(folder.path), stop=True)).asked for _ in range(2)] == [1, 2]
    assert answer(Request(str(folder.path))).asked == folder.stop_requests() == 2
    change_driver(folder, process_created=1.0)
    folder.write_driver(steps=100)
    assert folder.stop_requests() == 0


def test_a_log_of_an_earlier_driver_is_not_shown(folder: RunFolder) -> None:
    folder.driver_log.write_text("said long ago\n")
    folder.write_driver(steps=100)
    assert answer(Request(str(folder.path), reads=True)).log.lines == []
    folder.write_driver(steps=100, has_log=True)
    assert answer(Request(str(folder.path), reads=True)).log.lines == ["said long ago"]


def test_the_command_answers_one_line(folder: RunFolder) -> None:
    folder.write_driver(steps=100)
    write_steps(folder, 0)
    done = subprocess.run(
        [sys.executable, "-P", "-m", "smolrun.tracking.run_view"],
        input=msgspec.json.encode(Request(str(folder.path), reads=True)),
        capture_output=True,
        timeout=30,
    )
    view = decode("Welcome to this machine!\r\n" + done.stdout.decode())
    assert view is not None and view.state == "running" and len(view.metrics.lines) == 1


@pytest.mark.parametrize("output", ["", "no such file\n", f"{run_view.ANSWER}{{\n"])
def test_what_is_no_answer_is_none(output: str) -> None:
    assert decode(output) is None


def test_an_answer_survives_the_way(folder: RunFolder) -> None:
    view = View("done", {"pid": 1}, {"status": "done"}, 2)
    assert decode(run_view.ANSWER + msgspec.json.encode(view).decode() + "\n") == view
