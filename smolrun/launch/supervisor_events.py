"""The supervisor's vocabulary: what can happen to a run, what can be done, how it can end."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from smolrun.events import Event
from smolrun.launch.control import Address, ResultMessage, RosterPeer, TaskMessage

EXIT_DONE, EXIT_BAD_CONFIG, EXIT_FAILED, EXIT_STOPPED, EXIT_STOPPED_NOW = 0, 2, 3, 130, 131


@dataclass(frozen=True)
class WorkerReady:
    """A worker is up and listens on `addresses`, best first."""

    rank: int
    addresses: list[Address]
    versions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Reported:
    """A worker reported an event."""

    rank: int
    event: Event


@dataclass(frozen=True)
class TaskMessageReceived:
    """A worker sent data of the running task. The driver routes it by topic; the supervisor never
    sees it."""

    rank: int
    message: TaskMessage


@dataclass(frozen=True)
class WorkerFinished:
    """A worker's last word."""

    rank: int
    result: ResultMessage


@dataclass(frozen=True)
class Exited:
    """A worker's process has ended; all it said came before. -n is signal n.

    `out_of_memory` says so if the system ended it because memory was full; `lost`, if its host is
    out of reach and the code means nothing.
    """

    rank: int
    code: int
    out_of_memory: str | None = None
    lost: str | None = None


@dataclass(frozen=True)
class HostSilent:
    """A worker's host does not answer the driver; it may be nothing, or the end of it."""

    rank: int


@dataclass(frozen=True)
class ProtocolViolation:
    """A worker broke the control protocol; it may still be alive."""

    rank: int
    problem: str


@dataclass(frozen=True)
class NotStarted:
    """A worker could not be started at all."""

    rank: int
    problem: str


@dataclass(frozen=True)
class DriverFailed:
    """Something in the driver itself failed; no rank is to blame."""

    problem: str


@dataclass(frozen=True)
class Interrupted:
    """The user pressed Ctrl-C, or the driver got SIGTERM."""


Input = (
    WorkerReady
    | Reported
    | TaskMessageReceived
    | WorkerFinished
    | Exited
    | HostSilent
    | ProtocolViolation
    | NotStarted
    | DriverFailed
    | Interrupted
)


@dataclass(frozen=True)
class SendRoster:
    """Tell every rank where the others are; or one alone, whom it is to link up with."""

    peers: list[RosterPeer]
    to: int | None = None


@dataclass(frozen=True)
class RestartWorker:
    """Start a rank anew, whose process has ended; only where the run continues without it."""

    rank: int


@dataclass(frozen=True)
class Notify:
    """A sentence for the user."""

    level: Literal["info", "warning"]
    message: str


@dataclass(frozen=True)
class SendStop:
    """Ask a rank to agree on a last step and save."""

    rank: int


@dataclass(frozen=True)
class Kill:
    """End a rank's process now."""

    rank: int


@dataclass(frozen=True)
class RunOutcome:
    """How the run ended. `reason` is one line, empty if it is done; `steps` were done. `log_tail`
    are the last lines of the failed rank's log.

    `departures` has a row for each time that an elastic run lost a rank and went on.

    `is_lost`: it failed because a rank or its host is gone, so that another start may go better.
    """

    status: Literal["done", "stopped", "failed"]
    exit_code: int
    reason: str = ""
    failed_rank: int | None = None
    failed_host: str | None = None
    out_of_memory: bool = False
    is_lost: bool = False
    steps: int = 0
    versions: dict[str, str] = field(default_factory=dict)
    summaries: dict[int, dict[str, Any]] = field(default_factory=dict)
    departures: list[dict[str, Any]] = field(default_factory=list)
    log_tail: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Finish:
    """The run is over; always the last action, and there is always exactly one."""

    outcome: RunOutcome


Action = SendRoster | SendStop | Kill | RestartWorker | Notify | Finish
