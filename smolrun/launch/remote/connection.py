"""The interface of a connection to another machine: commands, files and pipes.

`ssh/` implements it; tests implement it by subprocess. Every method may block, none longer than its
deadline.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from smolrun.errors import HostError
from smolrun.sanitize import one_line

# Called with the number of bytes that have been copied since the last call.
OnBytes = Callable[[int], None]


@dataclass(frozen=True)
class Completed:
    """A command that has ended. -n is signal n."""

    code: int
    out: bytes
    err: bytes


class CommandTimeout(HostError):
    """A command did not end within its deadline."""


class RemoteProcess(Protocol):
    """A command that runs on the other machine, and its three pipes."""

    def read_out(self) -> bytes:
        """Some bytes of its stdout; empty at the end."""

    def read_err(self) -> bytes:
        """Some bytes of its stderr; empty at the end."""

    def write(self, data: bytes) -> None:
        """All of `data` into its stdin; blocks while it does not read. OSError when it is gone."""

    def close_input(self) -> None:
        """End its stdin."""

    def wait(self) -> int | None:
        """Its exit code once it has ended; None if the connection ended first."""

    def close(self) -> None:
        """Close the pipes in any state. Never raises; may be called twice."""


@contextmanager
def deadline(name: str, process: RemoteProcess, timeout_s: float) -> Iterator[threading.Event]:
    """Close the pipes of `process` after so many seconds, unless the block ends before; the event
    is set then. `name` is that of the host."""
    late = threading.Event()

    def give_up() -> None:
        late.set()
        process.close()

    alarm = threading.Timer(timeout_s, give_up)
    alarm.name, alarm.daemon = f"smolrun-ssh-{name}-alarm", True
    alarm.start()
    try:
        yield late
    finally:
        alarm.cancel()


class Connection(Protocol):
    """A connection to a machine. Methods raise HostError, with a sentence and a hint."""

    name: str

    @property
    def address(self) -> str | None:
        """The IP address it is connected to; None behind a jump host or a proxy command."""

    @property
    def lost(self) -> str | None:
        """Why it was lost; None while it is open and after `close`."""

    @property
    def is_silent(self) -> bool:
        """Whether a keepalive has been unanswered for seconds; stays true once lost for that."""

    def give_up(self) -> None:
        """Close it as lost, now: all calls that wait for it return. Never raises."""

    def run(self, command: str, *, data: bytes = b"", timeout_s: float = 60.0) -> Completed:
        """Run a line of the machine's own shell to its end, with `data` as its stdin.

        CommandTimeout when the deadline comes first.
        """

    def start(self, command: str) -> RemoteProcess:
        """Start a line of the machine's own shell."""

    def put(self, source: Path | bytes, path: str, on_bytes: OnBytes | None = None) -> None:
        """Copy a file there, whole or not at all; its folder must exist."""

    def get(
        self, path: str, target: Path, on_bytes: OnBytes | None = None, *, most_bytes: int
    ) -> None:
        """Copy a file from there, whole or not at all; the folder of `target` must exist.

        HostError if it has more than `most_bytes`, of which no more than that many are fetched."""

    def close(self) -> None:
        """End the connection and all that was started through it. Never raises."""


_MOST_CHARS = 300


def error_tail(*outputs: bytes) -> str:
    """The last line of the first output that has one, in at most 300 characters."""
    for output in outputs:
        if lines := output.decode("utf-8", "replace").strip().splitlines():
            return one_line(lines[-1]).strip()[:_MOST_CHARS]
    return "no output"
