"""Looks after one worker from the driver's side: starts it, writes to it, reads it, keeps its log.

Whatever happens to the worker becomes one input of the supervisor, posted in the order in which it
happened; its exit comes last. Nothing the worker does or leaves undone can block the driver: each
blocking call has a thread of its own ("smolrun-rank2-life", "-write", "-control", "-log"). It
decides nothing.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable
from typing import BinaryIO

import msgspec

from smolrun.checkpoints.manifest import read_report
from smolrun.errors import CheckpointError, ProtocolError
from smolrun.events import Note, ShardSaved, check_sender
from smolrun.launch.control import (
    EventMessage,
    LeaseMessage,
    LineSplitter,
    LogMessage,
    Message,
    ReadyMessage,
    StartMessage,
    Summary,
    WantRowsMessage,
    WorkerMessage,
    decode_from_worker,
    encode,
)
from smolrun.launch.hosts import Host, WorkerPlan, WorkerProcess
from smolrun.launch.moves import (
    Exited,
    Finished,
    Input,
    Misbehaved,
    NotStarted,
    Ready,
    Reported,
    WantsRows,
)

_TAIL_LINES = 20
_TAIL_LINE_CHARS = 400
# A pipe ends with its worker; only a child that left the process group could hold it longer.
_DRAIN_S = 1.0
_LEASE = encode(LeaseMessage())


class Attendant:
    """One worker's threads on the driver. `post` is called from them and must be safe for that."""

    def __init__(self, plan: WorkerPlan, host: Host, post: Callable[[Input], None]) -> None:
        self.plan = plan
        self._host = host
        self._post = post
        self._lock = threading.Condition()
        self._process: WorkerProcess | None = None
        self._doomed = False
        self._closing = False
        self._outbox: deque[bytes] = deque()
        self._tail: deque[str] = deque(maxlen=_TAIL_LINES)
        self._life = self._thread("life", self._live)

    def begin(self) -> None:
        """Start the worker, in the background."""
        self._life.start()

    def send(self, message: Message) -> None:
        """Queue a message; never blocks, even if the worker reads nothing."""
        self._queue(encode(message))

    def renew_lease(self) -> None:
        """Queue a lease, unless one still waits: a frozen worker must not fill the memory."""
        with self._lock:
            if _LEASE not in self._outbox:
                self._queue(_LEASE)

    def kill(self) -> None:
        """End the worker now; if it is only just starting, as soon as it is there."""
        with self._lock:
            self._doomed = True
            process = self._process
        if process is not None:
            process.kill()

    def join(self, timeout_s: float) -> bool:
        """Wait for the worker to end and its exit to be posted; False if it has not."""
        if self._life.ident is not None:
            self._life.join(timeout_s)
        return not self._life.is_alive()

    @property
    def is_silent(self) -> bool:
        """Whether the worker's host does not answer, for seconds already."""
        return self._process is not None and self._process.is_silent()

    @property
    def tail(self) -> list[str]:
        """The last lines of the rank's log."""
        with self._lock:
            return list(self._tail)

    def _thread(self, what: str, target: Callable[..., None], *args: object) -> threading.Thread:
        return threading.Thread(
            target=target, args=args, name=f"smolrun-rank{self.plan.rank}-{what}", daemon=True
        )

    def _queue(self, line: bytes) -> None:
        with self._lock:
            self._outbox.append(line)
            self._lock.notify_all()

    def _live(self) -> None:
        rank = self.plan.rank
        try:
            process = self._host.start(self.plan)
        except Exception as error:  # whatever it is: a rank that never comes must be told of
            self._post(NotStarted(rank, str(error) or type(error).__name__))
            return
        with self._lock:
            self._process = process
            doomed = self._doomed
        if doomed:
            process.kill()
        readers = [
            self._thread("control", self._read_control, process),
            self._thread("log", self._read_log, process),
        ]
        writer = self._thread("write", self._write, process)
        for thread in (*readers, writer):
            thread.start()
        code = process.wait()
        for thread in readers:
            thread.join(_DRAIN_S)
        with self._lock:
            self._closing = True
            self._lock.notify_all()
        self._post(Exited(rank, code, process.out_of_memory(), process.lost()))

    def _write(self, process: WorkerProcess) -> None:
        with contextlib.suppress(OSError):  # the worker is gone: its exit tells the story
            while (line := self._next_line()) is not None:
                process.write(line)
        with contextlib.suppress(OSError):
            process.close_input()

    def _next_line(self) -> bytes | None:
        """The next line to write, waited for; None when the worker has ended."""
        with self._lock:
            self._lock.wait_for(lambda: self._outbox or self._closing)
            return None if self._closing else self._outbox.popleft()

    def _read_control(self, process: WorkerProcess) -> None:
        splitter = LineSplitter()
        try:
            while data := process.read_control():
                for line in splitter.feed(data):
                    self._hear(line)
        except ProtocolError as error:
            self._post(Misbehaved(self.plan.rank, str(error)))
            while process.read_control():
                pass  # a full pipe would keep it from dying in its own way

    def _hear(self, line: bytes) -> None:
        self._post(_checked(decode_from_worker(line), self.plan.start))

    def _read_log(self, process: WorkerProcess) -> None:
        file = self._open_log()
        rest = ""
        while data := process.read_log():
            file = _append(file, data)
            *lines, rest = (rest + data.decode("utf-8", "replace")).split("\n")
            rest = _shown(rest)
            with self._lock:
                self._tail.extend(_shown(line) for line in lines)
        if rest:
            with self._lock:
                self._tail.append(rest)
        if file is not None:
            file.close()

    def _open_log(self) -> BinaryIO | None:
        try:
            self.plan.log_path.parent.mkdir(parents=True, exist_ok=True)
            return self.plan.log_path.open("ab", buffering=0)
        except OSError as error:
            note = f"no log of rank {self.plan.rank}: {error}"
            self._post(
                Reported(self.plan.rank, Note(level="warning", message=note, rank=self.plan.rank))
            )
            return None


def _checked(message: WorkerMessage, start: StartMessage) -> Input:
    """What the message is to the supervisor; ProtocolError where this worker may not say so."""
    rank = start.rank
    if isinstance(message, EventMessage):
        check_sender(message.data, rank, start.world_size)
        if isinstance(message.data, ShardSaved):
            _check_report(message.data)
        return Reported(rank, message.data)
    if isinstance(message, LogMessage):
        return Reported(rank, Note(level=message.level, message=message.message, rank=rank))
    if isinstance(message, WantRowsMessage):
        return WantsRows(rank, message)
    if isinstance(message, ReadyMessage):
        if message.rank != rank:
            raise ProtocolError(f"says that it is rank {message.rank}")
        # The other ranks will dial what it says.
        if not {where.address for where in message.addresses} <= {*start.addresses}:
            raise ProtocolError("says that it listens on an address that it was not given")
        return Ready(rank, message.addresses, message.versions)
    for link in msgspec.convert(message.summary, Summary).links:
        if link.from_ != rank or link.to >= start.world_size:
            raise ProtocolError(f"measured a link of rank {link.from_} to rank {link.to}")
    return Finished(rank, message)


def _check_report(event: ShardSaved) -> None:
    """Its files will be fetched, and become part of a checkpoint."""
    try:
        reporter = read_report(event.report).rank
    except CheckpointError as error:
        raise ProtocolError(f"reports a checkpoint that cannot be: {error}") from None
    if reporter != event.rank:
        raise ProtocolError(f"reports what rank {reporter} saved")


def _shown(line: str) -> str:
    """What a terminal would still show of the line: progress bars overwrite themselves."""
    return line.rstrip("\r").rsplit("\r", 1)[-1][-_TAIL_LINE_CHARS:]


def _append(file: BinaryIO | None, data: bytes) -> BinaryIO | None:
    """The file to go on with: a full disk ends the log but not the run, nor the reading."""
    try:
        if file is not None:
            file.write(data)
        return file
    except OSError:
        return None
