"""Lines of logs: what a rank writes to its stderr, and what is kept of it beside the readable log.

    stderr of a rank    RS {"clock_s": ..., "level": "info", ...}   by logging
                        anything else                             by print, C, a crash
    logs/rank0-a.jsonl  one LogRecord a line, in the order of `time`

RS is ASCII 30, which no text has (RFC 7464 begins JSON texts with it). So a line of a library is
never taken for a record, and what `logging` and `print` wrote stays in one order, whoever kills the
rank. Pure: it knows nothing of files.
"""

from __future__ import annotations

import logging
import re
from datetime import UTC, datetime, timedelta
from typing import Annotated, Literal, get_args

import msgspec
from msgspec import Meta

from smolrun.events import MAX_TEXT_CHARS, Count, NonNegative
from smolrun.sanitize import printable

Level = Literal["debug", "info", "warning", "error"]
LEVELS: tuple[Level, ...] = get_args(Level)
SEPARATOR = "\x1e"
# A text of MAX_TEXT_CHARS as JSON, where every character is escaped, and what is around it.
MAX_RECORD_BYTES = 6 * MAX_TEXT_CHARS + 4096
_CUT = " ... (cut)"
_MOST_NAME_CHARS = 200
_AGO = re.compile(r"(\d{1,9}(?:\.\d{1,3})?)([smhd])", re.ASCII)
_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


class WorkerRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a rank says of one record; `clock_s` is the time by the clock of its host."""

    clock_s: NonNegative
    level: Level
    logger: Annotated[str, Meta(max_length=_MOST_NAME_CHARS)]
    message: Annotated[str, Meta(max_length=MAX_TEXT_CHARS)]


class LogRecord(msgspec.Struct, frozen=True, omit_defaults=True):
    """One line of logs/*.jsonl. `time` is by the driver's clock: that of the host less `offset_s`,
    or the arrival of a line that has no time of its own. `rank` None: the driver. `level` None:
    printed, not logged."""

    time: datetime
    rank: Count | None
    host: str
    level: Level | None
    logger: str | None
    message: str
    clock_s: float | None = None  # by the clock of the host, as it said
    offset_s: float | None = None  # how far that clock was ahead of the driver's; None: unknown


class RecordFormatter(logging.Formatter):
    """Formats a record of `logging`, with its traceback, as the rest of a line of stderr."""

    def format(self, record: logging.LogRecord) -> str:
        """RS and a WorkerRecord as JSON."""
        text = super().format(record)
        plain = WorkerRecord(
            clock_s=max(0.0, record.created),
            level=_level(record.levelno),
            logger=_encodable(record.name)[:_MOST_NAME_CHARS],
            message=cut(_encodable(text)),
        )
        return SEPARATOR + msgspec.json.encode(plain).decode()


def _level(number: int) -> Level:
    """CRITICAL is an error; a level between two is the lower one."""
    return LEVELS[max(0, min(3, number // 10 - 1))]


def _encodable(text: str) -> str:
    """Lone surrogates, which a file name may have, are no UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode()


def cut(text: str) -> str:
    """The text, without its end where it has more than MAX_TEXT_CHARS."""
    return text if len(text) <= MAX_TEXT_CHARS else text[: MAX_TEXT_CHARS - len(_CUT)] + _CUT


_worker_decoder = msgspec.json.Decoder(WorkerRecord)
_decoder = msgspec.json.Decoder(LogRecord)


def split_line(line: bytes) -> tuple[bytes, WorkerRecord | None]:
    """A line of a rank's stderr as what was printed and the record after it; either may be there
    alone, as `print` may have left its line open."""
    printed, separator, rest = line.partition(SEPARATOR.encode())
    if separator:
        try:
            return printed, _worker_decoder.decode(rest)
        except (ValueError, RecursionError):  # half of one, or of others
            pass
    return line, None


def decode(line: bytes) -> LogRecord | None:
    """A line of logs/*.jsonl; None if it is damaged."""
    try:
        record = _decoder.decode(line)
    except (ValueError, RecursionError, OverflowError):
        return None
    return record if record.time.tzinfo is not None else None


def encode(record: LogRecord) -> bytes:
    """The record as one line."""
    return msgspec.json.encode(record) + b"\n"


def readable(record: WorkerRecord) -> str:
    """The record for logs/rank0-a.log, by the clock of the host in the driver's time zone."""
    try:
        when = datetime.fromtimestamp(record.clock_s).astimezone()
        shown = f"{when:%Y-%m-%d %H:%M:%S},{when.microsecond // 1000:03}"
    except (OverflowError, OSError, ValueError):  # no year of ours
        shown = f"{record.clock_s:g}"
    return f"{shown} {record.level.upper()} {record.logger}: {printable(record.message)}"


def at(seconds: float) -> datetime:
    """The time so many seconds after 1970 began, UTC."""
    return datetime.fromtimestamp(seconds, UTC)


def since(text: str, now: datetime) -> datetime:
    """`10m` (also s, h, d) before `now`, or the time as ISO 8601, local where it has no offset.
    ValueError for anything else."""
    try:
        if found := _AGO.fullmatch(text):
            return now - timedelta(seconds=float(found[1]) * _UNITS_S[found[2]])
        return datetime.fromisoformat(text).astimezone(UTC)
    except (OverflowError, OSError, ValueError):
        raise ValueError("no time like 10m, 2h or 2026-12-31T18:00") from None
