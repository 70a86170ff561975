"""The log of a rank on the driver: readable, as JSON lines, and its last lines in memory.

    stderr of the rank -> logs/rank0-a.log      as it was printed
                       -> logs/rank0-a.jsonl    LogRecords, by the driver's clock
    the driver's words -> logs/driver.jsonl

`ClockOffset` says how far the clock of the rank's host is ahead of the driver's. One thread feeds a
log, another one its clock; any may read `tail`.
"""

from __future__ import annotations

import os
import platform
import threading
import time
from collections import deque
from pathlib import Path

from smolrun.launch.control import ClockMessage
from smolrun.log_records import (
    LEVELS,
    MAX_RECORD_BYTES,
    Level,
    LogRecord,
    WorkerRecord,
    at,
    cut,
    encode,
    readable,
    split_line,
)

_TAIL_LINES = 20
_TAIL_LINE_CHARS = 400
# Of a log file of a rank, before it is rotated: this one and the one before it are kept, with the
# newest lines. An honest log of a day has a few MiB.
_LOG_BYTES = 32 << 20
_NUM_MEASURED = 8  # a clock that is set is known after so many leases


class ClockOffset:
    """How far one clock is ahead of ours, by messages that went there and back.

    Source: RFC 5905 (NTP), section 8, and the clock filter of section 10: of the last 8 the one
    that was on its way for the shortest time.
    """

    def __init__(self) -> None:
        self.seconds: float | None = None  # not measured yet
        self._measured: deque[tuple[float, float]] = deque(maxlen=_NUM_MEASURED)  # delay, offset

    def add(self, message: ClockMessage, arrived_s: float) -> None:
        """A lease that was answered, and when the answer arrived, by our clock."""
        delay = (arrived_s - message.sent_s) - (message.answered_s - message.received_s)
        ahead = (message.received_s - message.sent_s) + (message.answered_s - arrived_s)
        self._measured.append((max(0.0, delay), ahead / 2))
        delay, offset = min(self._measured)
        # Half of the way there and back is what a measurement may be wrong by.
        self.seconds = 0.0 if abs(offset) <= delay / 2 else offset


class RankLog:
    """Both files of one rank. A full disk ends them, but neither the run nor `tail`."""

    def __init__(self, path: Path, rank: int | None, host: str) -> None:
        """`path` is that of the readable one."""
        self.clock = ClockOffset()
        self._path = path
        self._rank = rank
        self._host = host
        self._rest = b""
        self._latest_s = 0.0
        self._lock = threading.Lock()
        self._tail: deque[str] = deque(maxlen=_TAIL_LINES)
        self._readable: RotatedFile | None = None
        self._records: RotatedFile | None = None

    def open(self) -> None:
        """Open the files; OSError if there can be none, and then there is only `tail`."""
        self._readable = RotatedFile(self._path)
        self._records = RotatedFile(self._path.with_suffix(".jsonl"), is_json=True)

    @property
    def tail(self) -> list[str]:
        """The last lines."""
        with self._lock:
            return list(self._tail)

    def feed(self, data: bytes, arrived_s: float) -> None:
        """Some bytes of its stderr."""
        *lines, rest = (self._rest + data).split(b"\n")
        if len(rest) > MAX_RECORD_BYTES:  # of no record; a line of such a length is cut
            lines, rest = [*lines, rest], b""
        self._rest = rest
        self._write(lines, arrived_s)

    def close(self, arrived_s: float) -> None:
        """The end of its stderr, perhaps in a line."""
        if self._rest:
            self._write([self._rest], arrived_s)
        for file in (self._readable, self._records):
            if file is not None:
                file.close()

    def _write(self, lines: list[bytes], arrived_s: float) -> None:
        shown, records = list[bytes](), list[bytes]()
        for line in lines:
            printed, record = split_line(line)
            if record is None or printed:
                shown.append(printed)
                if (text := _shown(printed)).strip():
                    records.append(self._printed(text, arrived_s))
            if record is not None:
                shown.append(readable(record).encode())
                records.append(self._logged(record, arrived_s))
        self._remember(shown[-_TAIL_LINES:])
        if shown and self._readable and not self._readable.write(b"\n".join(shown) + b"\n"):
            self._readable = None
        if records and self._records and not self._records.write(b"".join(records)):
            self._records = None

    def _remember(self, lines: list[bytes]) -> None:
        with self._lock:
            for line in lines:
                self._tail.extend(_shown(part)[-_TAIL_LINE_CHARS:] for part in line.split(b"\n"))

    def _printed(self, text: str, arrived_s: float) -> bytes:
        time = at(self._in_order(arrived_s))
        return encode(LogRecord(time, self._rank, self._host, None, None, cut(text)))

    def _logged(self, record: WorkerRecord, arrived_s: float) -> bytes:
        offset_s = self.clock.seconds
        written_s = arrived_s if offset_s is None else record.clock_s - offset_s
        # What has arrived was written before, whatever the clock there says.
        time = at(self._in_order(min(written_s, arrived_s)))
        said = (record.level, record.logger, record.message)
        return encode(LogRecord(time, self._rank, self._host, *said, record.clock_s, offset_s))

    def _in_order(self, seconds: float) -> float:
        """Lines of one rank keep their order, also where its clock is set back."""
        self._latest_s = max(self._latest_s, seconds)
        return self._latest_s


def _shown(line: bytes) -> str:
    """What a terminal would still show of the line: progress bars overwrite themselves."""
    return line.decode("utf-8", "replace").rstrip("\r").rsplit("\r", 1)[-1]


class DriverLog:
    """What the driver says of a run, beside the records of the ranks. A file that cannot be
    written stays as it is."""

    def __init__(self, path: Path) -> None:
        """A full disk or a folder that is not there is no error."""
        self._host = platform.node()
        self._latest_s = 0.0
        try:
            self._file: RotatedFile | None = RotatedFile(path, is_json=True)
        except OSError:
            self._file = None

    def write(self, text: str) -> None:
        """One sentence; `warning: ` or another level before it is its level."""
        level, colon, rest = text.partition(": ")
        known: Level | None = next((one for one in LEVELS if colon and one == level), None)
        self._latest_s = max(self._latest_s, time.time())
        message = cut(rest if known else text)
        record = LogRecord(at(self._latest_s), None, self._host, known or "info", None, message)
        if self._file is not None and not self._file.write(encode(record)):
            self._file = None


class RotatedFile:
    """A file that becomes `<name>.1` when it is full, in the place of an older one."""

    def __init__(self, path: Path, *, is_json: bool = False) -> None:
        """Open it for appending; OSError if that is impossible. In a readable one a line says that
        older lines were removed."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._is_json = is_json
        self._file = path.open("ab", buffering=0)

    def write(self, data: bytes) -> bool:
        """False if the disk does not take it."""
        try:
            if self._file.tell() and self._file.tell() + len(data) > _LOG_BYTES:
                self._rotate()
            self._file.write(data)
        except (OSError, ValueError):  # ValueError: it was closed
            return False
        return True

    def _rotate(self) -> None:
        self._file.close()
        older = self._path.with_name(f"{self._path.name}.1")
        os.replace(self._path, older)
        self._file = self._path.open("ab", buffering=0)
        if not self._is_json:
            said = f"(continued from {older.name}; older lines were removed)\n"
            self._file.write(said.encode())

    def close(self) -> None:
        """Close the file."""
        self._file.close()
