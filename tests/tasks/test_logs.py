"""task=logs: what it prints of a run, and how it ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

from smolrun.log_records import Level, LogRecord, encode
from smolrun.tasks.logs import Lines
from smolrun.tracking.run_folder import RunFolder
from tests.cli.command import smolrun

NOON = datetime(2026, 1, 31, 12, 0, tzinfo=UTC)
RUN = "20260131-120000-classicdp-gpt_tiny-3fa9"


def record(rank: int | None, message: str, level: Level | None = "info", ms: int = 0) -> LogRecord:
    when = NOON.replace(microsecond=1000 * ms)
    return LogRecord(when, rank, f"host{rank}", level, "a.b" if level else None, message)


def a_run(tmp_path: Path, lines: list[LogRecord]) -> Path:
    folder = RunFolder(tmp_path / "outputs" / RUN)
    folder.logs.mkdir(parents=True)
    folder.write_config("task: train\n")
    folder.write_summary({"status": "done"})
    (tmp_path / "outputs" / "latest").symlink_to(RUN)
    for line in lines:
        name = "driver" if line.rank is None else f"rank{line.rank}-host"
        with (folder.logs / f"{name}.jsonl").open("ab") as file:
            file.write(encode(line))
    return folder.path


def test_the_logs_of_all_ranks_are_one(tmp_path: Path) -> None:
    lines = [
        record(0, "one", ms=1),
        record(1, "two \x1b[31m\u202e\nof it", "warning", ms=2),
        record(None, "three", ms=3),
        record(2, "printed", None, ms=4),
    ]
    a_run(tmp_path, lines)
    done = smolrun(tmp_path, "task=logs", environment={"TZ": "UTC"})
    assert (done.code, done.error) == (0, "")
    assert done.out.splitlines() == [
        "rank 0  host0 2026-01-31 12:00:00.001 info    a.b: one",
        "rank 1  host1 2026-01-31 12:00:00.002 warning a.b: two \N{REPLACEMENT CHARACTER}[31m"
        "\N{REPLACEMENT CHARACTER}",
        "  of it",
        "driver  hostNone 2026-01-31 12:00:00.003 info    a.b: three",
        "rank 2  host2    2026-01-31 12:00:00.004         printed",
    ]
    assert done.seen == "['import hydra']"  # no torch, nothing started
    done = smolrun(tmp_path, "task=logs", "--json", "rank=[1,2]", "level=warning", "since=1000d")
    assert [json.loads(line)["message"] for line in done.out.splitlines()] == [lines[1].message]


def test_nothing_to_show_is_said_and_a_wrong_value_is_refused(tmp_path: Path) -> None:
    a_run(tmp_path, [record(0, "one")])
    done = smolrun(tmp_path, "task=logs", "rank=7")
    assert (done.code, done.out) == (0, "")
    assert done.error == f"{RUN}: no such lines in outputs/{RUN}/logs\n"
    done = smolrun(tmp_path, "task=logs", "since=yesterday", "logs.level=loud", "logs.rank=-1")
    assert done.code == 2
    assert "logs.since = yesterday" in done.error and "10m" in done.error
    assert "logs.level = loud" in done.error and "logs.rank = -1" in done.error


@pytest.mark.skipif(os.name != "posix", reason="pipes of Windows have no SIGPIPE's exit code")
def test_a_reader_that_leaves_ends_it_without_a_word(tmp_path: Path) -> None:
    folder = a_run(tmp_path, [])
    with (folder / "logs" / "rank0-a.jsonl").open("wb") as file:
        file.write(encode(record(0, "x" * 100)) * 50_000)
    process = subprocess.Popen(
        [sys.executable, "-m", "smolrun.cli", "task=logs"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline().startswith(b"rank 0  host0 ")
    process.stdout.close()
    assert process.wait(60) == 141
    assert process.stderr.read() == b""
    process.stderr.close()


def test_each_rank_keeps_a_colour_of_its_own() -> None:
    lines = Lines(["longest"], has_colours=True)
    first, other, again = (lines.line(record(rank, "x")) for rank in (0, 1, 0))
    assert first == again and first.startswith("\x1b[36mrank 0  host0  \x1b[0m ")
    assert other.startswith("\x1b[32mrank 1  ")
    assert "\x1b[31merror   a.b: x\x1b[0m" in lines.line(record(0, "x", "error"))
    assert lines.line(record(None, "x")).startswith("driver  hostNone ")
    assert "\x1b" not in Lines([], has_colours=False).line(record(0, "x", "error"))


@pytest.mark.parametrize(
    ("is_terminal", "environment", "has"),
    [
        (True, {}, True),
        (False, {}, False),
        (True, {"NO_COLOR": "1"}, False),
        (True, {"TERM": "dumb"}, False),
    ],
)
def test_colours_are_for_terminals_that_want_them(
    is_terminal: bool, environment: dict[str, str], has: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from smolrun.tasks import logs

    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(logs.sys.stdout, "isatty", lambda: is_terminal)
    assert logs._has_colours() is has
