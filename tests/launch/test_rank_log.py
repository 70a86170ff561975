"""The files of a rank's log, and the clock of its host."""

from __future__ import annotations

import errno
import os
import queue
import sys
from pathlib import Path

import pytest

from smolrun.launch.control import ClockMessage
from smolrun.launch.local import LocalHost
from smolrun.launch.rank_log import ClockOffset, DriverLog, RankLog, RotatedFile
from smolrun.launch.supervisor_events import Input
from smolrun.launch.worker_monitor import WorkerMonitor
from smolrun.log_records import LogRecord, decode
from tests.launch.tiny_driver import plans
from tests.test_log_records import logged

ARRIVED_S = 1_800_000_000.0
YEAR_S = 365 * 86_400.0


def a_log(folder: Path) -> RankLog:
    log = RankLog(folder / "logs" / "rank1-pi.local.log", 1, "pi.local")
    log.open()
    return log


def records(folder: Path) -> list[LogRecord]:
    lines = (folder / "logs" / "rank1-pi.local.jsonl").read_bytes().splitlines()
    found = [decode(line) for line in lines]
    assert None not in found
    return [record for record in found if record is not None]


def record_at(clock_s: float, message: str) -> bytes:
    return b'\x1e{"clock_s":%f,"level":"info","logger":"a","message":"%s"}\n' % (
        clock_s,
        message.encode(),
    )


def measured(offset_s: float, there_s: float = 0.01, back_s: float = 0.01) -> ClockOffset:
    clock = ClockOffset()
    clock.add(exchange(offset_s, there_s), ARRIVED_S + there_s + back_s)
    return clock


def exchange(offset_s: float, there_s: float) -> ClockMessage:
    received_s = ARRIVED_S + there_s + offset_s
    return ClockMessage(ARRIVED_S, received_s, received_s)


def test_what_is_logged_and_printed_comes_in_its_order(tmp_path: Path) -> None:
    log = a_log(tmp_path)
    for piece in (b"10%\r", b"20%\r\n\n", logged("one") + b"\nfrom ", b"C\xff\n", b"half a li"):
        log.feed(piece, ARRIVED_S)
    log.close(ARRIVED_S + 1)
    found = [(r.level, r.logger, r.message) for r in records(tmp_path)]
    assert found == [
        (None, None, "20%"),
        ("info", "a.b", "one"),
        (None, None, "from C\N{REPLACEMENT CHARACTER}"),
        (None, None, "half a li"),
    ]
    assert {(r.rank, r.host) for r in records(tmp_path)} == {(1, "pi.local")}
    assert [r.time.timestamp() - ARRIVED_S for r in records(tmp_path)][-2:] == [0.0, 1.0]
    text = (tmp_path / "logs" / "rank1-pi.local.log").read_bytes()
    assert text.startswith(b"10%\r20%\r\n\n") and b" INFO a.b: one\nfrom C\xff\nhalf" in text
    assert log.tail[-2:] == ["from C\N{REPLACEMENT CHARACTER}", "half a li"]


def test_a_clock_a_year_ahead_is_set_right(tmp_path: Path) -> None:
    log = a_log(tmp_path)
    log.feed(record_at(ARRIVED_S + YEAR_S - 30, "before it was measured"), ARRIVED_S)
    log.clock = measured(YEAR_S)
    log.feed(record_at(ARRIVED_S + YEAR_S + 2.5, "after"), ARRIVED_S + 3)
    log.close(ARRIVED_S)
    first, second = records(tmp_path)
    assert first.time.timestamp() == ARRIVED_S, "the time when it arrived"
    assert (first.offset_s, first.clock_s) == (None, ARRIVED_S + YEAR_S - 30)
    assert second.time.timestamp() == pytest.approx(ARRIVED_S + 2.5, abs=0.02)
    assert second.offset_s == pytest.approx(YEAR_S, abs=0.02)


@pytest.mark.parametrize("jump_s", [-YEAR_S, -0.5, 0.5, YEAR_S])
def test_a_clock_that_is_set_meanwhile_changes_no_order(tmp_path: Path, jump_s: float) -> None:
    log = a_log(tmp_path)
    log.clock = measured(0.0)
    log.feed(record_at(ARRIVED_S + 1, "a"), ARRIVED_S + 1.1)
    log.feed(record_at(ARRIVED_S + 2 + jump_s, "b"), ARRIVED_S + 2.1)
    log.feed(b"c\n", ARRIVED_S + 3)
    log.close(ARRIVED_S + 3)
    found = records(tmp_path)
    assert [record.message for record in found] == ["a", "b", "c"]
    seconds = [record.time.timestamp() - ARRIVED_S for record in found]
    assert seconds == sorted(seconds) and seconds[1] <= 2.1 and seconds[2] == 3.0


def test_a_rank_cannot_write_in_the_name_of_another(tmp_path: Path) -> None:
    log = a_log(tmp_path)
    log.feed(b'{"time":"2026-01-31T12:00:00Z","rank":0,"host":"b","message":"x"}\n', ARRIVED_S)
    log.close(ARRIVED_S)
    (record,) = records(tmp_path)
    assert (record.rank, record.level) == (1, None) and record.message.startswith('{"time"')


def test_a_line_without_end_takes_bounded_memory_and_loses_nothing(tmp_path: Path) -> None:
    log = a_log(tmp_path)
    for _ in range(40):
        log.feed(b"x" * 65_536, ARRIVED_S)
        assert len(log._rest) < 1 << 20
    log.close(ARRIVED_S)
    assert (tmp_path / "logs" / "rank1-pi.local.log").stat().st_size >= 40 * 65_536
    assert max(len(record.message) for record in records(tmp_path)) <= 65_536


def test_the_clock_is_of_the_quickest_of_the_last_messages() -> None:
    clock = measured(5.0, there_s=3.0, back_s=0.0)  # the worker was busy: 1.5 s wrong
    clock.add(exchange(5.0, 0.01), ARRIVED_S + 0.03)
    assert clock.seconds == pytest.approx(5.0, abs=0.015)
    clock.add(exchange(5.0, 2.0), ARRIVED_S + 2.5)
    assert clock.seconds == pytest.approx(5.0, abs=0.015)
    for _ in range(8):
        clock.add(exchange(-7.0, 0.02), ARRIVED_S + 0.04)
    assert clock.seconds == pytest.approx(-7.0, abs=0.03), "it was set"


def test_clocks_that_do_not_differ_by_more_than_is_measured_are_equal() -> None:
    assert measured(0.004).seconds == 0.0
    assert measured(0.4).seconds == pytest.approx(0.4, abs=0.02)
    assert ClockOffset().seconds is None


def test_a_full_disk_ends_a_file_but_not_the_tail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = a_log(tmp_path)
    monkeypatch.setattr(RotatedFile, "write", lambda self, data: False)
    log.feed(b"one\n", ARRIVED_S)
    log.feed(b"two\n", ARRIVED_S)
    log.close(ARRIVED_S)
    assert log.tail == ["one", "two"]


def test_without_a_folder_there_is_a_tail(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("in the way")
    log = RankLog(tmp_path / "logs" / "rank1-a.log", 1, "a")
    with pytest.raises(OSError, match=errno.errorcode[errno.EEXIST] + "|exists|Not a"):
        log.open()
    log.feed(b"one\n", ARRIVED_S)
    log.close(ARRIVED_S)
    assert log.tail == ["one"]


def test_what_the_driver_says_has_a_level(tmp_path: Path) -> None:
    log = DriverLog(tmp_path / "logs" / "driver.jsonl")
    for text in ("warning: it is slow", "error: gone", "loss: 7", "done"):
        log.write(text)
    found = [decode(one) for one in (tmp_path / "logs" / "driver.jsonl").read_bytes().splitlines()]
    assert [record and (record.rank, record.level, record.message) for record in found] == [
        (None, "warning", "it is slow"),
        (None, "error", "gone"),
        (None, "info", "loss: 7"),
        (None, "info", "done"),
    ]
    DriverLog(tmp_path / "logs" / "driver.jsonl" / "x").write("nowhere")


SCRIPT = """
import logging, os, signal, sys
from smolrun.log_records import RecordFormatter
handler = logging.StreamHandler(sys.stderr)
handler.setFormatter(RecordFormatter())
logging.basicConfig(handlers=[handler], level=logging.INFO)
logging.warning("the last record")
os.write(2, b"half of a li")
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(os.name != "posix", reason="kill -9")
def test_the_last_words_of_a_killed_rank_are_there(tmp_path: Path) -> None:
    plan = plans(tmp_path, {}, ranks=1, steps=3)[0]
    posted: queue.SimpleQueue[Input] = queue.SimpleQueue()
    host = LocalHost([sys.executable, "-c", SCRIPT])
    monitor = WorkerMonitor(plan, host, lambda item, _: posted.put(item))
    monitor.begin()
    assert monitor.join(50.0)
    lines = plan.log_path.with_suffix(".jsonl").read_bytes().splitlines()
    found = [(r.level, r.message) for r in map(decode, lines) if r is not None]
    assert found == [("warning", "the last record"), (None, "half of a li")]
    assert monitor.tail[-1] == "half of a li"
    assert "WARNING root: the last record\nhalf of a li\n" in plan.log_path.read_text()
