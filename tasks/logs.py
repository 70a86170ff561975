"""task=logs: the logs of all ranks of a run and of its driver, in one order.

Only reads; Ctrl-C ends the command, not the run. A run that another machine drives is read there.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from datetime import datetime

from smolrun.config import RunConfig, ranks
from smolrun.driver.runs import config_of, find_run, logs_of
from smolrun.launch.supervisor_events import EXIT_DONE
from smolrun.log_records import LogRecord, encode, since
from smolrun.sanitize import echo, indented, one_line
from smolrun.tracking.logs import LogQuery

_RESET = "\x1b[0m"
# Of the ranks, one after another; the driver has none.
_RANKS = tuple(f"\x1b[{code}m" for code in (36, 32, 35, 34, 96, 92, 95, 94))
_LEVELS = {"warning": "\x1b[33m", "error": "\x1b[31m", "debug": "\x1b[2m"}


def drive(config: RunConfig) -> int:
    """Print the records that `logs.*` asks for; exit code 0."""
    keys = config.logs
    now = datetime.now().astimezone()
    query = LogQuery(
        ranks=[keys.rank] if isinstance(keys.rank, int) else keys.rank,
        level=keys.level,
        since=since(keys.since, now) if keys.since is not None else None,
        follow=keys.follow,
    )
    folder = find_run("logs.run", keys.run)
    of_run = config_of(folder)
    hosts = [rank.host for rank in ranks(of_run)] if of_run is not None else []
    lines = Lines(hosts, has_colours=_has_colours()) if keys.format == "text" else None
    is_empty = True
    try:
        for record in logs_of(folder, query):
            if record is None:
                sys.stdout.flush()
            else:
                is_empty = False
                # Bytes, as the terminal may know fewer characters than a log has.
                text = lines.line(record).encode() + b"\n" if lines else encode(record)
                sys.stdout.buffer.write(text)
    except KeyboardInterrupt:
        return EXIT_DONE
    if is_empty:
        echo(f"{folder.run_id}: no such lines in {folder.logs}", error=True)
    return EXIT_DONE


def _has_colours() -> bool:
    """Whether stdout is a terminal that shows them, and the user wants them (no-color.org)."""
    is_wanted = not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return is_wanted and sys.stdout.isatty()


class Lines:
    """Records as lines for people, in columns as wide as the names of `hosts`, and of those that
    have come so far."""

    def __init__(self, hosts: Iterable[str], *, has_colours: bool) -> None:
        self._has_colours = has_colours
        self._width = max(map(len, hosts), default=0)

    def line(self, record: LogRecord) -> str:
        """Rank and host, the time here, level, logger and message; what a terminal would obey is
        replaced."""
        host = one_line(record.host)
        self._width = max(self._width, len(host))
        rank = "driver" if record.rank is None else f"rank {record.rank}"
        local = record.time.astimezone()
        when = f"{local:%Y-%m-%d %H:%M:%S}.{local.microsecond // 1000:03}"
        where = self._coloured(f"{rank:<7} {host:<{self._width}}", self._colour_of(record.rank))
        text = indented(record.message)
        if record.logger:
            text = f"{one_line(record.logger)}: {text}"
        level = f"{record.level or '':<7}"
        return f"{where} {when} {self._coloured(f'{level} {text}', _LEVELS.get(level.strip()))}"

    def _colour_of(self, rank: int | None) -> str | None:
        return None if rank is None else _RANKS[rank % len(_RANKS)]

    def _coloured(self, text: str, colour: str | None) -> str:
        return f"{colour}{text}{_RESET}" if colour and self._has_colours else text
