"""The logs of a run in one order: those of all ranks and of its driver, by the driver's clock.

    logs/rank0-a.jsonl  \
    logs/rank1-b.jsonl   >  merged by time, as LogRecords; a chunk of each file is in memory
    logs/driver.jsonl   /

The folder may lie on another machine: `python -m smolrun.tracking.logs` reads one `LogRequest`, a
line of JSON on stdin, and writes the records to stdout, a line each. No file is kept open, as
Windows renames none that is.
"""

from __future__ import annotations

import contextlib
import heapq
import os
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

import msgspec

from smolrun.files import open_regular, to_null_device
from smolrun.log_records import LEVELS, MAX_RECORD_BYTES, Level, LogRecord, decode, encode
from smolrun.tracking.past_runs import is_over, state_of
from smolrun.tracking.run_folder import RunFolder

FOLLOW_EVERY_S = 0.5
_CHUNK_BYTES = 2 * MAX_RECORD_BYTES
_HEAD_BYTES = 256
_LEAST_BYTES = 64 * 1024  # of a file, to look for a time by halves


class LogQuery(msgspec.Struct, frozen=True):
    """Which records; None: all."""

    ranks: list[int] | None = None
    level: Level | None = None
    since: datetime | None = None
    follow: bool = False  # go on until the run ends

    def wants(self, record: LogRecord) -> bool:
        """Whether it is one of these; the level of a line that was printed is info."""
        if self.ranks is not None and record.rank not in self.ranks:
            return False
        if self.since is not None and record.time < self.since:
            return False
        least = LEVELS.index(self.level) if self.level else 0
        return LEVELS.index(record.level or "info") >= least


class LogRequest(msgspec.Struct, frozen=True):
    """What `python -m smolrun.tracking.logs` is asked."""

    folder: str
    query: LogQuery


def read_logs(
    folder: RunFolder,
    query: LogQuery,
    *,
    wait: Callable[[float], object] = time.sleep,
    may_end: Callable[[], bool] | None = None,
) -> Iterator[LogRecord | None]:
    """The records in the order of their times. With `follow` until `may_end`, which is that the run
    has ended: None then means that there are no more for now, `wait` is called, and a record comes
    one look later than it is written, because one of another rank may be older."""
    may_end = may_end or (lambda: is_over(state_of(folder)))
    files: dict[Path, LogFile] = {}
    yield from heapq.merge(*_opened(folder, query, files), key=lambda record: record.time)
    held: list[LogRecord] = []
    has_ended, may_have_ended = not query.follow, False
    while not has_ended:
        # Twice, as a driver says its last words after it has written how the run ended.
        has_ended, may_have_ended = may_have_ended, may_end()
        sources = [*_opened(folder, query, files)]
        fresh = sorted((r for source in sources for r in source), key=lambda record: record.time)
        until = fresh[-1:] if has_ended else held[-1:]
        found = sorted([*held, *fresh], key=lambda record: record.time)
        held = [record for record in found if not until or record.time > until[0].time]
        yield from found[: len(found) - len(held)]
        if not has_ended:
            yield None
            wait(FOLLOW_EVERY_S)
    yield from held


def _opened(
    folder: RunFolder, query: LogQuery, files: dict[Path, LogFile]
) -> list[Iterator[LogRecord]]:
    """What is new in each file, those that have appeared included; in the order of the ranks."""
    for path in sorted(folder.logs.glob("*.jsonl"), key=_number):
        if path not in files and (query.ranks is None or _number(path) in query.ranks):
            files[path] = LogFile(path, query.since)
    return [filter(query.wants, file.new()) for file in files.values()]


def _number(path: Path) -> int:
    """The rank of a file; -1 of the driver's, and of what is none of ours."""
    digits = path.name.removeprefix("rank").partition("-")[0]
    return int(digits) if digits.isdecimal() and len(digits) < 10 else -1


class LogFile:
    """Reads on in one file of records, and in the one that it was before it was rotated."""

    def __init__(self, path: Path, since: datetime | None = None) -> None:
        """Lines before `since` are passed over, as far as the file is in order."""
        self._paths = [path.with_name(f"{path.name}.1"), path]  # older, newer
        self._since = since
        self._head: bytes | None = None  # how the file that is read begins
        self._offset = 0
        self._latest: datetime | None = None

    def new(self) -> Iterator[LogRecord]:
        """The records since the last call, in the order of the file, whose times do not fall."""
        while (data := self._chunk()) is not None:
            for line in data.splitlines():
                record = decode(line)
                if record is not None:
                    if self._latest is not None and record.time < self._latest:
                        record = msgspec.structs.replace(record, time=self._latest)
                    self._latest = record.time
                    yield record

    def _chunk(self) -> bytes | None:
        """The next whole lines; None if there are none yet."""
        older, newer = map(_head, self._paths)
        if not any(self._is_current(head) for head in (older, newer)):
            self._begin(0 if older is not None else 1)
        index = 0 if self._is_current(older) else 1
        data = self._read(self._paths[index])
        if data is None and index == 0 and newer is not None:
            self._begin(1)
            data = self._read(self._paths[1])
        return data

    def _is_current(self, head: bytes | None) -> bool:
        """Whether a file that begins so is the one being read. The time in it is its own, while an
        inode is soon that of another file."""
        return head is not None and self._head is not None and head.startswith(self._head)

    def _begin(self, index: int) -> None:
        path = self._paths[index]
        self._head, self._offset = _head(path), 0
        if self._since is not None:
            self._offset = offset_of(path, self._since)

    def _read(self, path: Path) -> bytes | None:
        try:
            with open_regular(path) as file:
                if not self._is_current(head := file.read(_HEAD_BYTES)):
                    return None  # rotated just now
                self._head = head
                file.seek(self._offset)
                data = file.read(_CHUNK_BYTES)
        except (OSError, ValueError):
            return None
        # A line that is still being written waits; one that is too long is none of ours.
        end = data.rfind(b"\n") + 1 or (len(data) if len(data) == _CHUNK_BYTES else 0)
        self._offset += end
        return data[:end] or None


def _head(path: Path) -> bytes | None:
    try:
        with open_regular(path) as file:
            return file.read(_HEAD_BYTES)
    except (OSError, ValueError):
        return None


def offset_of(path: Path, since: datetime) -> int:
    """Where lines of that time begin, or a little before; 0 if the file cannot be read."""
    try:
        with open_regular(path) as file:
            low, high = 0, os.fstat(file.fileno()).st_size
            while high - low > _LEAST_BYTES:
                middle = (low + high) // 2
                file.seek(middle)
                file.readline(_CHUNK_BYTES)  # the rest of a line
                begin = file.tell()
                record = decode(file.readline(_CHUNK_BYTES))
                if record is not None and record.time < since and begin < high:
                    low = begin
                else:
                    high = middle
            return low
    except (OSError, ValueError):
        return 0


def main() -> int:
    """Write the records that stdin asks for; an empty line says that there are none for now. Ends
    where its reader has left: the pipe breaks, or stdin ends."""
    request = msgspec.json.decode(sys.stdin.buffer.readline(), type=LogRequest)
    with contextlib.suppress(OSError, AttributeError):  # Windows before Python 3.12
        os.set_blocking(sys.stdin.fileno(), False)
    out = sys.stdout.buffer
    records = read_logs(RunFolder(Path(request.folder)), request.query)
    try:
        for record in records:
            out.write(b"\n" if record is None else encode(record))
            if record is None:
                out.flush()
                if _has_ended(sys.stdin.fileno()):
                    break
        out.flush()
    except BrokenPipeError:
        to_null_device(sys.stdout.fileno())
    return 0


def _has_ended(descriptor: int) -> bool:
    """Whether a pipe that does not block has no writer any more."""
    try:
        return not os.get_blocking(descriptor) and os.read(descriptor, 1) == b""
    except (OSError, AttributeError):  # nothing to read
        return False


if __name__ == "__main__":
    sys.exit(main())
