"""The language of driver and worker, over the worker's stdin and stdout: one JSON object a line.

Pure: messages, their bytes, and how a stream of bytes falls into lines. It knows nothing of
processes, threads or clocks (`channel.py` is the worker's end, `worker_monitor.py` the driver's).

    driver                                   worker
      | -- start (config, secret) ------------> |
      | <------------ ready (its addresses) --- |
      | -- roster (everybody's addresses) ----> |
      | -- lease, every 2 s ------------------> |   15 s without one: the worker ends itself
      | <------------------------------ clock - |   what time it was here when that arrived
      | <---------------------- event, log ---- |
      | <------------------------------ task -> |   data of the running task, either way
      | -- stop (agree on a last step) -------> |
      | <-------------------------- result ---- |

Where a run continues as a group (`links` of a start message is "group"), a change of its ranks is a
new generation of the mesh:

      | <-- lost (a peer) --------------------- |   a rank that ends by itself needs no report
      | -- regroup (generation) --------------> |   leave the mesh, listen again
      | <-- ready (generation, addresses) ----- |
      | -- roster (generation, those there) --> |
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from smolrun.errors import ProtocolError
from smolrun.events import AnyEvent, Count, NonNegative, Text
from smolrun.mesh.certificates import Credentials

# A start line holds a configuration and a roster, a few KiB; the largest honest line is a text
# sample.
MAX_LINE_BYTES = 16 * 1024 * 1024
MAX_TASK_BYTES = 1024 * 1024  # of the data of a worker's task message
LEASE_EVERY_S = 2.0
LEASE_LIMIT_S = 15.0
# `mesh.liveness`: seconds without any byte from a peer until it counts as lost. With the report to
# the driver, a run ends within 10 and 4 seconds.
SILENCE_S = {"normal": 9.0, "fast": 3.0}

# How a worker process ends. 3 is also the driver's own exit code for "a host or rank failed".
EXIT_DONE = 0
EXIT_FAILED = 3
# EX_TEMPFAIL of sysexits.h: the driver is gone, so there is no reader for a reason.
EXIT_ABANDONED = 75
EXIT_ABORTED = 131  # the driver said abort, or stop twice

_Data = TypeVar("_Data", bound=msgspec.Struct)
_SHOWN_BYTES = 80  # of a bad line, in the error about it


class Message(msgspec.Struct, frozen=True, tag_field="type", forbid_unknown_fields=True):
    """Base of all messages; the class of a line is the value of its key "type"."""


class Saving(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where a rank writes checkpoints, and which one it resumes from, as seen on its host."""

    folder: str
    token: str  # new for every start of a run: unfinished folders of two starts never mix
    every: int  # 0: nothing is saved
    keep: int
    keep_best: bool
    resume: str | None = None
    weights_only: bool = False  # `resume` is of another run, whose weights a new run begins with


# How links are protected: TLS; authenticated but readable, and only on loopback; or that anywhere.
Security = Literal["tls", "loopback_plain", "insecure"]


# Which ranks a rank has a link with: all, and the loss of one ends the run ("all"); those that are
# there, where the loss of one begins a new generation ("group"); rank 0 ("star"); none ("none").
Links = Literal["all", "group", "star", "none"]


class StartMessage(Message, frozen=True, tag="start"):
    """All a worker needs to begin.

    `secret` is 32 bytes in hex; `addresses` is where it listens, as numbers, best first, on one of
    `ports` (first and last) or on any. `credentials` are there exactly when `security` is tls.
    """

    rank: int
    world_size: int
    host: str
    run_id: str
    config: dict[str, Any]
    config_hash: str
    secret: str
    addresses: list[str]
    device: str
    threads: int
    ports: tuple[int, int] | None = None
    security: Security = "loopback_plain"
    credentials: Credentials | None = None
    prepared: dict[str, Any] | None = None
    saving: Saving | None = None
    links: Links = "all"

    def __repr__(self) -> str:
        """Without secret and config: a start message must be safe to log."""
        return (
            f"StartMessage(rank={self.rank}, world_size={self.world_size}, run_id={self.run_id!r})"
        )


class Address(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where one socket listens: an IP address as numbers, and its port."""

    address: Annotated[str, Meta(max_length=100)]
    port: Annotated[int, Meta(ge=0, le=65535)]


class RosterPeer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where one rank listens, best first."""

    rank: int
    host: str
    addresses: list[Address]


class RosterMessage(Message, frozen=True, tag="roster"):
    """Where every rank of this generation listens, in rank order; sent to all once all are ready.

    Links of a star: rank 0 and the receiver alone, as soon as both are ready. Without links: the
    receiver alone."""

    peers: list[RosterPeer]
    generation: Count = 0


class RegroupMessage(Message, frozen=True, tag="regroup"):
    """The ranks change: leave the mesh, listen again, and report `ready` for this generation."""

    generation: Count


class LeaseMessage(Message, frozen=True, tag="lease"):
    """The driver is alive. `sent_s`: its clock, which the worker answers with a ClockMessage."""

    sent_s: NonNegative | None = None


class StopMessage(Message, frozen=True, tag="stop"):
    """Agree with the others on a last step, save, report. A second one means abort."""


class AbortMessage(Message, frozen=True, tag="abort"):
    """End this process now."""


class ReadyMessage(Message, frozen=True, tag="ready"):
    """The worker is up and listens on `addresses`, best first."""

    rank: Count
    addresses: Annotated[list[Address], Meta(min_length=1, max_length=64)]
    pid: Count
    versions: Annotated[dict[str, Annotated[str, Meta(max_length=200)]], Meta(max_length=16)]
    generation: Count | None = None  # of the regroup message that it answers; None: the first time


class LostMessage(Message, frozen=True, tag="lost"):
    """This rank has lost a peer of this generation, and waits to be regrouped. `reported_by`: the
    rank from which it knows that, where it did not see it itself."""

    peer: Count
    generation: Count
    reason: Text
    reported_by: Count | None = None


class EventMessage(Message, frozen=True, tag="event"):
    """Something that happened; NaN and infinity arrive as null."""

    data: AnyEvent


class TaskMessage(Message, frozen=True, tag="task"):
    """Data of the running task, in either direction. `topic` names its receiver there: a subscriber
    of the driver, or a handler of the worker's channel. `data` is JSON, at most MAX_TASK_BYTES from
    a worker; the receiver decodes it with `decode_data`, strictly."""

    topic: Annotated[str, Meta(max_length=100)]
    data: msgspec.Raw


class ClockMessage(Message, frozen=True, tag="clock"):
    """Answers a lease: `sent_s` of that, and when the worker received and answered it by its own
    clock, in seconds since 1970."""

    sent_s: NonNegative
    received_s: NonNegative
    answered_s: NonNegative


class LogMessage(Message, frozen=True, tag="log"):
    """A sentence for people; everything longer goes to stderr and so to the rank's log file."""

    level: Literal["debug", "info", "warning", "error"]
    message: Text


OUT_OF_MEMORY = "OutOfMemory"  # the kind of an ErrorReport that says that memory was full


class ErrorReport(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Why a worker failed: the error's class name, its sentence, and the rank it blames, if any.

    `reported_by` is the rank from which it knows that, where it did not see it itself;
    `broke_protocol`: the blamed rank sent what it must not.
    """

    kind: Annotated[str, Meta(max_length=200)]
    message: Text
    peer: Count | None = None
    reported_by: Count | None = None
    broke_protocol: bool = False


class MeasuredLink(msgspec.Struct, frozen=True):
    """A row of task=doctor: from this rank to that one."""

    from_: Count = msgspec.field(name="from")
    to: Count
    rtt_s: NonNegative
    bytes_per_s: NonNegative


class Summary(msgspec.Struct, frozen=True):
    """What the driver reads of a worker's summary, which may hold more."""

    peak_memory_bytes: Count | None = None
    links: list[MeasuredLink] = []


class ResultMessage(Message, frozen=True, tag="result"):
    """A worker's last word. `error` is there exactly when the status is failed."""

    status: Literal["done", "stopped", "failed"]
    error: ErrorReport | None = None
    summary: dict[str, Any] = {}

    def __post_init__(self) -> None:
        """A summary that is not as `Summary` says is a ValidationError, as any other field is."""
        msgspec.convert(self.summary, Summary)


DriverMessage = (
    StartMessage
    | RosterMessage
    | RegroupMessage
    | LeaseMessage
    | TaskMessage
    | StopMessage
    | AbortMessage
)
WorkerMessage = (
    ReadyMessage
    | LostMessage
    | EventMessage
    | TaskMessage
    | ClockMessage
    | LogMessage
    | ResultMessage
)

_driver_decoder: msgspec.json.Decoder[DriverMessage] = msgspec.json.Decoder(DriverMessage)
_worker_decoder: msgspec.json.Decoder[WorkerMessage] = msgspec.json.Decoder(WorkerMessage)


def encode(message: Message) -> bytes:
    """The message as one line, newline included."""
    return msgspec.json.encode(message) + b"\n"


def decode_from_driver(line: bytes) -> DriverMessage:
    """The driver's message; ProtocolError if the line is not one."""
    try:
        return _driver_decoder.decode(line)
    except (ValueError, RecursionError) as error:
        # The line is not shown: a start line holds the secret of the run.
        raise ProtocolError(f"the driver sent a line that is no message ({error})") from None


def decode_from_worker(line: bytes) -> WorkerMessage:
    """A worker's message; ProtocolError, with the line's beginning, if the line is not one."""
    try:
        message = _worker_decoder.decode(line)
    except (ValueError, RecursionError) as error:
        shown = line[:_SHOWN_BYTES].decode("ascii", "backslashreplace")
        raise ProtocolError(f"sent a line that is no message ({error}): {shown!r}") from None
    if isinstance(message, TaskMessage) and len(bytes(message.data)) > MAX_TASK_BYTES:
        raise ProtocolError(f"sent a task message of more than {MAX_TASK_BYTES} bytes")
    return message


def task_message(topic: str, data: msgspec.Struct) -> TaskMessage:
    """`data` as a message of that topic."""
    return TaskMessage(topic=topic, data=msgspec.Raw(msgspec.json.encode(data)))


def decode_data(message: TaskMessage, kind: type[_Data]) -> _Data:
    """The data of a task message; ProtocolError if it is not a `kind`."""
    try:
        return msgspec.json.decode(message.data, type=kind)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"sent an invalid {message.topic} message ({error})") from None


class LineSplitter:
    """Bytes in, whole lines out; holds back one unfinished line, never more than `limit` bytes."""

    def __init__(self, limit: int = MAX_LINE_BYTES) -> None:
        self._limit = limit
        self._parts: list[bytes] = []
        self._size = 0

    def feed(self, data: bytes) -> list[bytes]:
        """The lines that `data` completes, without newline; raises ProtocolError past the limit."""
        *ends, rest = data.split(b"\n")
        lines = [self._complete(end) for end in ends]
        self._keep(rest)
        return lines

    def _keep(self, part: bytes) -> None:
        self._size += len(part)
        if self._size > self._limit:
            raise ProtocolError(f"sent a line of more than {self._limit} bytes")
        if part:
            self._parts.append(part)

    def _complete(self, end: bytes) -> bytes:
        self._keep(end)
        line = b"".join(self._parts)
        self._parts, self._size = [], 0
        return line
