"""A stream through real processes: one reader on the driver, rows to each rank, every bad end."""

from __future__ import annotations

import os
import re
import signal
import threading
from pathlib import Path

import pytest

from smolrun.errors import DataError
from tests.launch.deadline import pid_of, until
from tests.launch.test_driver import run_while
from tests.launch.tiny_driver import make_driver


class Reader:
    """Rows that hold their number, up to `stop_at`: there it fails, or hangs if it has no error."""

    def __init__(self, *, row_bytes: int = 8, stop_at: int | None = None, error: str = "") -> None:
        self.row = 0
        self.row_bytes = row_bytes
        self.hangs = threading.Event()
        self.release = threading.Event()
        self._stop_at = stop_at
        self._error = error

    def read(self) -> bytes:
        if self.row == self._stop_at:
            if self._error:
                raise DataError(self._error)
            self.hangs.set()
            self.release.wait(30)
        self.row += 1
        return (self.row - 1).to_bytes(4, "little") * (self.row_bytes // 4)


STREAM = {"0": "stream", "1": "stream", "2": "stream"}


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_row_reaches_exactly_one_rank(tmp_path: Path, ranks: int) -> None:
    outcome = make_driver(tmp_path, STREAM, ranks=ranks, steps=12, rows=Reader()).run()
    assert outcome.exit_code == 0, outcome.reason
    seen = [outcome.summaries[rank]["rows"] for rank in range(ranks)]
    assert sorted(row for rows in seen for row in rows) == list(range(2 * ranks * 12))
    assert seen[0][:4] == [0, 1, 2 * ranks, 2 * ranks + 1]


def test_rows_larger_than_a_line_should_be_arrive_whole_and_keep_the_lease(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TINY_LEASE_S", "2.0")
    reader = Reader(row_bytes=1024 * 1024)
    outcome = make_driver(tmp_path, STREAM, steps=10, rows=reader, lease_every_s=0.5).run()
    assert outcome.exit_code == 0, outcome.reason
    assert outcome.summaries[1]["rows"][-2:] == [38, 39]


def test_a_reader_that_fails_ends_the_run_and_blames_no_rank(tmp_path: Path) -> None:
    reader = Reader(stop_at=9, error="data.path=books: document 17 has no column text")
    outcome = make_driver(tmp_path, STREAM, steps=10_000, rows=reader).run()
    assert (outcome.status, outcome.exit_code, outcome.failed_rank) == ("failed", 3, None)
    assert outcome.reason == (
        "the driver cannot read the stream any more: "
        "data.path=books: document 17 has no column text"
    )


def test_a_reader_that_hangs_ends_the_run_by_the_deadline_of_a_rank(tmp_path: Path) -> None:
    reader = Reader(stop_at=9)
    behave = {"0": "stream0.3", "1": "stream0.3"}
    driver = make_driver(tmp_path, behave, steps=10_000, rows=reader)
    outcome = driver.run()
    reader.release.set()
    assert (outcome.status, outcome.exit_code) == ("failed", 3)
    told = r"DataError: waited 0\.3 s for rows \d+ to \d+ .* reader on the driver has sent \d"
    assert re.search(told, outcome.reason)


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
def test_a_rank_that_dies_while_it_waits_for_rows_is_named(tmp_path: Path) -> None:
    reader = Reader(stop_at=9)
    driver = make_driver(tmp_path, STREAM, steps=10_000, rows=reader, grace_s=0.3)

    def kill() -> None:
        assert reader.hangs.wait(20)
        os.kill(pid_of(tmp_path, "pid1"), signal.SIGKILL)

    outcome = run_while(driver.run, kill)
    reader.release.set()
    assert (outcome.exit_code, outcome.failed_rank) == (3, 1)
    assert "died from signal 9" in outcome.reason
    until(lambda: "smolrun-rows" not in [thread.name for thread in threading.enumerate()])


def test_a_message_of_a_topic_without_subscriber_is_a_violation(tmp_path: Path) -> None:
    outcome = make_driver(tmp_path, {"1": "stream"}, steps=10_000).run()
    assert (outcome.exit_code, outcome.failed_rank) == (3, 1)
    assert "sent a message of topic 'stream', which this task does not have" in outcome.reason
