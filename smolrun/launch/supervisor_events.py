"""The supervisor's vocabulary: what can happen to a run, what can be done, how it can end."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

from smolrun.events import Event
from smolrun.launch.control import Address, ResultMessage, RosterPeer, TaskMessage

EXIT_DONE, EXIT_BAD_CONFIG, EXIT_FAILED, EXIT_STOPPED, EXIT_STOPPED_NOW = 0, 2, 3, 130, 131


class Input(msgspec.Struct, frozen=True):
    """Something that happened."""


class RankInput(Input, frozen=True):
    """Something that happened to one rank."""

    rank: int


class WorkerReady(RankInput, frozen=True):
    """A worker is up and listens on `addresses`, best first."""

    addresses: list[Address]
    versions: dict[str, str] = {}
    generation: int | None = None  # that it was asked to listen for; None: its process is new


class PeerReported(RankInput, frozen=True):
    """A worker has lost a peer of this generation, and waits to be regrouped."""

    peer: int
    generation: int
    reason: str
    reported_by: int | None = None


class Reported(RankInput, frozen=True):
    """A worker reported an event."""

    event: Event


class TaskMessageReceived(RankInput, frozen=True):
    """A worker sent data of the running task. The driver routes it by topic; the supervisor never
    sees it."""

    message: TaskMessage


class WorkerFinished(RankInput, frozen=True):
    """A worker's last word."""

    result: ResultMessage


class Exited(RankInput, frozen=True):
    """A worker's process has ended; all it said came before. -n is signal n.

    `out_of_memory` says so if the system may have ended it because memory was full; `lost`, if its
    host is out of reach and the code means nothing.
    """

    code: int
    out_of_memory: str | None = None
    lost: str | None = None


class Answering(RankInput, frozen=True):
    """Whether a worker that should answer the driver's questions does; only a run that continues
    without it asks."""

    is_answering: bool


class HostSilent(RankInput, frozen=True):
    """A worker's host does not answer the driver; it may be nothing, or the end of it."""


class ProtocolViolation(RankInput, frozen=True):
    """A worker broke the control protocol; it may still be alive."""

    problem: str


class NotStarted(RankInput, frozen=True):
    """A worker could not be started at all."""

    problem: str


class DriverFailed(Input, frozen=True):
    """Something in the driver itself failed; no rank is to blame."""

    problem: str


class Interrupted(Input, frozen=True):
    """The user pressed Ctrl-C, or the driver got SIGTERM."""


class Action(msgspec.Struct, frozen=True):
    """Something to be done."""


class SendRoster(Action, frozen=True):
    """Tell every rank where the others are; or one alone, whom it is to link up with."""

    peers: list[RosterPeer]
    to: int | None = None
    generation: int = 0


class SendRegroup(Action, frozen=True):
    """Ask a rank to leave the mesh and listen for the next generation."""

    rank: int
    generation: int


class Regrouped(Action, frozen=True):
    """All of `ranks` have their roster of this generation: what is computed together begins
    anew."""

    ranks: list[int]
    generation: int


class RestartWorker(Action, frozen=True):
    """Start a rank anew, whose process has ended; only where the run continues without it."""

    rank: int


class Notify(Action, frozen=True):
    """A sentence for the user."""

    level: Literal["info", "warning"]
    message: str


class SendStop(Action, frozen=True):
    """Ask a rank to agree on a last step and save."""

    rank: int


class Kill(Action, frozen=True):
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


class Finish(Action, frozen=True):
    """The run is over; always the last action, and there is always exactly one."""

    outcome: RunOutcome
