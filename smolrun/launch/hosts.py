"""The interface of a host: start one worker, and return its three pipes.

`local.py` does it by subprocess; a host reached over SSH does the same from the other end of a
connection. Every method may block; the monitor calls each from a thread
of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from smolrun.launch.control import StartMessage


@dataclass(frozen=True)
class WorkerPlan:
    """One worker to start: its first message, and where its log goes (on the driver)."""

    start: StartMessage
    log_path: Path

    @property
    def rank(self) -> int:
        """The rank this worker will have."""
        return self.start.rank

    @property
    def host(self) -> str:
        """The name of the host it runs on."""
        return self.start.host


class WorkerProcess(Protocol):
    """A started worker, wherever it runs."""

    def read_control(self) -> bytes:
        """Some bytes of its stdout; empty at the end."""

    def read_log(self) -> bytes:
        """Some bytes of its stderr; empty at the end."""

    def write(self, data: bytes) -> None:
        """All of `data` into its stdin; blocks while it does not read. OSError when it is gone."""

    def close_input(self) -> None:
        """End its stdin, which ends the worker."""

    def wait(self) -> int:
        """Its exit code once it has ended; -n for signal n where the host can tell."""

    def out_of_memory(self) -> str | None:
        """After `wait`: a sentence if the system may have ended it because memory was full."""

    def lost(self) -> str | None:
        """After `wait`: a sentence if its exit code is unknown, as its host is unreachable."""

    def is_silent(self) -> bool:
        """Whether a keepalive of its host has been unanswered for seconds."""

    def kill(self) -> None:
        """End it and all it started, at once, even if frozen. Never raises; may come twice."""


class WorkerHost(Protocol):
    """A machine that can run workers."""

    def start(self, plan: WorkerPlan) -> WorkerProcess:
        """Start one worker; OSError or SmolrunError, with a sentence, if that is impossible."""
