"""The logs of a run in one order, read while they grow."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import pytest

from smolrun.log_records import LogRecord, encode
from smolrun.tracking.logs import LogFile, LogQuery, LogRequest, offset_of, read_logs
from smolrun.tracking.run_folder import RunFolder

BEGAN = datetime(2026, 1, 31, 12, 0, tzinfo=UTC)


def record(second: float, rank: int | None, message: str = "", level: str | None = "info") -> bytes:
    time = BEGAN + timedelta(seconds=second)
    return encode(LogRecord(time, rank, f"host{rank}", level, "a", message or f"{second:g}"))  # type: ignore[arg-type]


def a_run(tmp_path: Path, **files: list[bytes]) -> RunFolder:
    """A run that is over, with these files of logs."""
    folder = RunFolder(tmp_path / "run")
    folder.logs.mkdir(parents=True, exist_ok=True)
    folder.write_summary({"status": "done"})
    for name, lines in files.items():
        (folder.logs / f"{name.replace('_', '-')}.jsonl").write_bytes(b"".join(lines))
    return folder


def messages(folder: RunFolder, **query: object) -> list[str]:
    found = read_logs(folder, LogQuery(**query), wait=lambda _: None)  # type: ignore[arg-type]
    return [record.message for record in found if record is not None]


def test_ranks_and_driver_are_merged_by_time(tmp_path: Path) -> None:
    folder = a_run(
        tmp_path,
        rank0_a=[record(1, 0), record(4, 0), record(4, 0, "4 again")],
        rank10_a=[record(2, 10), record(5, 10)],
        rank2_b=[record(3, 2), record(4, 2, "4 of rank 2")],
        driver=[record(0, None), record(6, None)],
    )
    expected = ["0", "1", "2", "3", "4", "4 again", "4 of rank 2", "5", "6"]
    assert messages(folder) == expected
    assert messages(folder, follow=True) == expected, "it has ended, so this ends"
    assert messages(folder, ranks=[2, 10]) == ["2", "3", "4 of rank 2", "5"]
    assert messages(folder, since=BEGAN + timedelta(seconds=5)) == ["5", "6"]


def test_the_level_of_what_was_printed_is_info(tmp_path: Path) -> None:
    levels = ["debug", "info", None, "warning", "error"]
    lines = [record(i, 0, str(level), level) for i, level in enumerate(levels)]
    folder = a_run(tmp_path, rank0_a=lines)
    assert messages(folder, level="debug") == ["debug", "info", "None", "warning", "error"]
    assert messages(folder, level="info") == ["info", "None", "warning", "error"]
    assert messages(folder, level="warning") == ["warning", "error"]


def test_damaged_lines_are_left_out_and_half_a_line_waits(tmp_path: Path) -> None:
    half, rest = record(4, 0)[:20], record(4, 0)[20:]
    hostile = [b"\xff\n", b"{}\n", b"[" * 100_000 + b"\n", b"x" * 3_000_000 + b"\n"]
    folder = a_run(tmp_path, rank0_a=[record(1, 0), *hostile, record(2, 0), half])
    file = LogFile(folder.logs / "rank0-a.jsonl")
    assert [one.message for one in file.new()] == ["1", "2"]
    with (folder.logs / "rank0-a.jsonl").open("ab") as more:
        more.write(rest)
    assert [one.message for one in file.new()] == ["4"]


def test_times_of_one_file_do_not_fall(tmp_path: Path) -> None:
    folder = a_run(tmp_path, rank0_a=[record(5, 0), record(1, 0)], rank1_a=[record(3, 1)])
    found = list(read_logs(folder, LogQuery()))
    assert [one and one.message for one in found] == ["3", "5", "1"]
    times = [one.time for one in found if one]
    assert times == sorted(times)


def test_a_file_is_read_on_after_it_was_rotated(tmp_path: Path) -> None:
    folder = a_run(tmp_path, rank0_a=[record(1, 0), record(2, 0)])
    path = folder.logs / "rank0-a.jsonl"
    file = LogFile(path)
    assert [one.message for one in file.new()] == ["1", "2"]
    with path.open("ab") as more:
        more.write(record(3, 0))
    path.rename(f"{path}.1")
    path.write_bytes(record(4, 0))
    assert [one.message for one in file.new()] == ["3", "4"]
    assert [one.message for one in file.new()] == []
    assert [one.message for one in LogFile(path).new()] == ["1", "2", "3", "4"]
    assert messages(folder) == ["1", "2", "3", "4"]
    for number in (5, 6):  # twice between two looks: what went with the older one is gone
        path.rename(f"{path}.1")
        path.write_bytes(record(number, 0))
    assert [one.message for one in file.new()] == ["5", "6"]


def test_new_lines_and_new_ranks_are_followed_in_order_until_the_run_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = a_run(tmp_path, rank0_a=[record(1, 0)])
    states = iter(["running"] * 3)
    monkeypatch.setattr("smolrun.tracking.logs.state_of", lambda _: next(states, "done"))

    def append(name: str, line: bytes) -> None:
        with (folder.logs / name).open("ab") as file:
            file.write(line)

    acts: Iterator[Callable[[], None]] = iter(
        [
            lambda: append("rank0-a.jsonl", record(5, 0)),
            # Written later, but older: a host whose lines are on their way for long.
            lambda: append("rank1-b.jsonl", record(4, 1)),
            lambda: append("rank1-b.jsonl", record(6, 1)),
            lambda: append("driver.jsonl", record(7, None)),  # after the run has ended
        ]
    )
    found = read_logs(folder, LogQuery(follow=True), wait=lambda _: next(acts)())
    assert [one and one.message for one in found] == [
        *("1", None, None, "4", "5", None, None, "6", "7"),
    ]


def test_a_time_is_found_without_reading_the_file(tmp_path: Path) -> None:
    lines = [record(number, 0, "x" * 100) for number in range(20_000)]
    folder = a_run(tmp_path, rank0_a=lines)
    path = folder.logs / "rank0-a.jsonl"
    for number in (0, 1, 777, 19_999, 30_000):
        offset = offset_of(path, BEGAN + timedelta(seconds=number))
        begin = sum(map(len, lines[:number]))
        assert max(0, begin - 70_000) <= offset <= begin, number
    since = BEGAN + timedelta(seconds=19_990)
    assert len(messages(folder, since=since)) == 10
    assert offset_of(folder.logs / "none", since) == 0


def test_only_a_chunk_of_each_file_is_in_memory(tmp_path: Path) -> None:
    folder = a_run(tmp_path, **{f"rank{rank}_a": [] for rank in range(2)})
    line = record(1, 0, "x" * 1000)
    for rank in range(2):
        with (folder.logs / f"rank{rank}-a.jsonl").open("wb") as file:
            for _ in range(40):
                file.write(line * 1000)  # 45 MB
    tracemalloc.start()
    began = time.process_time()
    found = read_logs(folder, LogQuery())
    assert next(found) is not None
    first_s = time.process_time() - began
    for _ in zip(range(20_000), found, strict=False):
        pass
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20e6 and first_s < 2.0


def test_a_folder_of_another_machine_is_read_by_a_command(tmp_path: Path) -> None:
    folder = a_run(tmp_path, rank0_a=[record(1, 0), record(2, 0, level="error")])
    request = LogRequest(str(folder.path), LogQuery(level="error", ranks=[0, 1]))
    done = subprocess.run(
        [sys.executable, "-P", "-m", "smolrun.tracking.logs"],
        input=msgspec.json.encode(request) + b"\n",
        capture_output=True,
        timeout=60,
        check=True,
    )
    (line,) = done.stdout.splitlines()
    assert json.loads(line)["message"] == "2" and done.stderr == b""


def test_many_files_need_one_pass(tmp_path: Path) -> None:
    lines = {
        f"rank{rank}_a": [record(rank + 50 * i, rank) for i in range(20)] for rank in range(50)
    }
    assert messages(a_run(tmp_path, **lines)) == [f"{number}" for number in range(1000)]
