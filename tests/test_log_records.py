"""What a rank writes to stderr, and what is read of it."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime, timedelta

import pytest

from smolrun.events import MAX_TEXT_CHARS
from smolrun.log_records import (
    MAX_RECORD_BYTES,
    LogRecord,
    RecordFormatter,
    decode,
    encode,
    readable,
    since,
    split_line,
)

NOW = datetime(2026, 1, 31, 12, 0, tzinfo=UTC)


def logged(message: str, *args: object, level: int = logging.INFO, name: str = "a.b") -> bytes:
    """The line that the formatter makes of a record."""
    record = logging.LogRecord(name, level, "x.py", 1, message, args, None)
    return RecordFormatter().format(record).encode()


@pytest.mark.parametrize(
    ("number", "level"), [(5, "debug"), (10, "debug"), (25, "info"), (30, "warning"), (50, "error")]
)
def test_a_record_comes_back_with_its_level(number: int, level: str) -> None:
    printed, record = split_line(logged("%d steps\nof all", 3, level=number))
    assert printed == b"" and record is not None
    assert (record.level, record.logger, record.message) == (level, "a.b", "3 steps\nof all")


def test_a_traceback_is_part_of_its_record() -> None:
    try:
        raise ValueError("no \udcff")
    except ValueError:
        record = logging.LogRecord("a", logging.ERROR, "x.py", 1, "broke", (), sys.exc_info())
    line = RecordFormatter().format(record).encode()
    assert b"\n" not in line
    _, found = split_line(line)
    assert found is not None and found.message.startswith("broke\nTraceback (most recent call")
    assert found.message.endswith("ValueError: no \\udcff")


def test_the_longest_message_is_cut_and_fits_into_a_line() -> None:
    line = logged("\x1b" * (MAX_TEXT_CHARS + 1), name="n" * 1000)
    _, record = split_line(line)
    assert len(line) < MAX_RECORD_BYTES
    assert record is not None and record.message.endswith(" ... (cut)")
    assert len(record.message) == MAX_TEXT_CHARS and len(record.logger) == 200


def test_a_line_that_print_left_open_stays_beside_the_record() -> None:
    printed, record = split_line(b"loading 10%" + logged("ready"))
    assert (printed, record and record.message) == (b"loading 10%", "ready")


@pytest.mark.parametrize(
    "line",
    [
        b'{"clock_s":1,"level":"info","logger":"a","message":"printed by hand"}',
        logged("killed in the middle")[:-5],
        logged("one") + logged("two"),
        b"\x1e" + b"[" * 10_000,
        b'\x1e{"clock_s":1e400,"level":"info","logger":"a","message":"x"}',
        b'\x1e{"clock_s":1,"level":"info","logger":"a","message":"x","rank":7}',
        b"",
    ],
    ids=["print", "half", "two", "brackets", "endless", "unknown", "empty"],  # records have times
)
def test_what_is_no_record_is_what_was_printed(line: bytes) -> None:
    assert split_line(line) == (line, None)


def test_a_line_of_the_file_comes_back() -> None:
    record = LogRecord(NOW, 1, "pi5", "info", "a", "text", clock_s=5.0, offset_s=-2.5)
    assert decode(encode(record)) == record
    plain = json.loads(encode(LogRecord(NOW, None, "pi5", None, None, "text")))
    assert plain == {
        "time": "2026-01-31T12:00:00Z",
        "rank": None, "host": "pi5", "level": None, "logger": None, "message": "text",
    }  # fmt: skip


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"{}",
        encode(LogRecord(NOW, 1, "a", None, None, "x"))[:40],
        b'{"time":"2026-01-31T12:00:00","rank":1,"host":"a","level":null,"logger":null,"message":""}',
        b'{"time":"9999-99-99T12:00:00Z","rank":1,"host":"a","level":null,"logger":null,"message":""}',
        b'{"time":5,"rank":-1,"host":"a","level":"loud","logger":null,"message":""}',
        b"[" * 100_000,
    ],
)
def test_a_damaged_line_is_none(line: bytes) -> None:
    assert decode(line) is None


def test_the_readable_line_says_any_time() -> None:
    _, record = split_line(b'\x1e{"clock_s":1e18,"level":"info","logger":"a","message":"x\\u001b"}')
    assert record is not None and readable(record) == "1e+18 INFO a: x\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize(
    ("text", "time"),
    [
        ("90s", NOW - timedelta(seconds=90)),
        ("1.5h", NOW - timedelta(minutes=90)),
        ("2d", NOW - timedelta(days=2)),
        ("2026-01-30T10:00+02:00", datetime(2026, 1, 30, 8, tzinfo=UTC)),
        ("2026-01-30", datetime(2026, 1, 30).astimezone(UTC)),
    ],
)
def test_a_time_before_now_or_a_date(text: str, time: datetime) -> None:
    assert since(text, NOW) == time


@pytest.mark.parametrize("text", ["", "10", "m", "-5m", "10 minutes", "999999999d", "0001-01-01"])
def test_other_times_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="10m"):
        since(text, NOW)
