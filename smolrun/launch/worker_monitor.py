"""Looks after one worker from the driver's side: starts it, writes to it, reads it, keeps its log.

Whatever happens to the worker becomes one input of the supervisor, posted in the order in which it
happened; its exit comes last. Nothing the worker does or leaves undone can block the driver: each
blocking call has a thread of its own ("smolrun-rank2-life", "-write", "-control", "-log"). It
decides nothing.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable

import msgspec

from smolrun.checkpoints.manifest import read_report
from smolrun.errors import CheckpointError, ProtocolError
from smolrun.events import Note, ShardSaved, check_sender
from smolrun.launch.control import (
    ClockMessage,
    EventMessage,
    LeaseMessage,
    LineSplitter,
    LogMessage,
    LostMessage,
    Message,
    ReadyMessage,
    StartMessage,
    Summary,
    TaskMessage,
    WorkerMessage,
    decode_from_worker,
    encode,
)
from smolrun.launch.hosts import WorkerHost, WorkerPlan, WorkerProcess
from smolrun.launch.rank_log import RankLog
from smolrun.launch.supervisor_events import (
    Exited,
    Input,
    NotStarted,
    PeerReported,
    ProtocolViolation,
    Reported,
    TaskMessageReceived,
    WorkerFinished,
    WorkerReady,
)

# A pipe ends with its worker; only a child that left the process group could hold it longer.
_DRAIN_S = 1.0
# Notes of one worker: an honest one sends a few. Each is printed and written to metrics.jsonl; the
# worker's own log has all of them.
_MOST_NOTES = 1000


class WorkerMonitor:
    """One worker's threads on the driver. `post` is called from them and must be safe for that."""

    def __init__(
        self, plan: WorkerPlan, host: WorkerHost, post: Callable[[Input, int], None]
    ) -> None:
        """`post` gets the size of the line that an input was made of; 0: of none."""
        self.plan = plan
        self._host = host
        self._post = post
        self._lock = threading.Condition()
        self._process: WorkerProcess | None = None
        self._doomed = False
        self._closing = False
        # None is a lease, which is made when it is sent, as it holds the time.
        self._outbox: deque[tuple[bytes | None, Callable[[], None] | None]] = deque()
        self._num_notes = 0
        self._log = RankLog(plan.log_path, plan.rank, plan.host)
        self._life = self._thread("life", self._live)

    def begin(self) -> None:
        """Start the worker, in the background."""
        self._life.start()

    def send(self, message: Message, on_sent: Callable[[], None] | None = None) -> None:
        """Queue a message; never blocks, even if the worker reads nothing. `on_sent` is called from
        another thread once the worker's pipe has taken all of it."""
        self._queue(encode(message), on_sent)

    def renew_lease(self) -> None:
        """Queue a lease, unless one still waits: a frozen worker must not fill the memory."""
        with self._lock:
            if (None, None) not in self._outbox:
                self._queue(None)

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
        return self._log.tail

    def _thread(self, what: str, target: Callable[..., None], *args: object) -> threading.Thread:
        return threading.Thread(
            target=target, args=args, name=f"smolrun-rank{self.plan.rank}-{what}", daemon=True
        )

    def _queue(self, line: bytes | None, on_sent: Callable[[], None] | None = None) -> None:
        with self._lock:
            self._outbox.append((line, on_sent))
            self._lock.notify_all()

    def _live(self) -> None:
        rank = self.plan.rank
        try:
            process = self._host.start(self.plan)
        except Exception as error:  # of any kind: a rank that never comes must be reported
            self._post(NotStarted(rank, str(error) or type(error).__name__), 0)
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
        self._post(Exited(rank, code, process.out_of_memory(), process.lost()), 0)

    def _write(self, process: WorkerProcess) -> None:
        with contextlib.suppress(OSError):  # the worker is gone: its exit code is reported
            while (next_line := self._next_line()) is not None:
                line, on_sent = next_line
                process.write(encode(LeaseMessage(time.time())) if line is None else line)
                if on_sent is not None:
                    on_sent()
        with contextlib.suppress(OSError):
            process.close_input()

    def _next_line(self) -> tuple[bytes | None, Callable[[], None] | None] | None:
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
            self._post(ProtocolViolation(self.plan.rank, str(error)), 0)
            while process.read_control():
                pass  # a full pipe would keep it from dying in its own way

    def _hear(self, line: bytes) -> None:
        message = decode_from_worker(line)
        if isinstance(message, ClockMessage):
            self._log.clock.add(message, time.time())
            return
        item = _checked(message, self.plan.start)
        if isinstance(item, Reported) and isinstance(item.event, Note):
            self._num_notes += 1
            if self._num_notes > _MOST_NOTES:
                return
            if self._num_notes == _MOST_NOTES:
                text = f"has sent {_MOST_NOTES:,} messages; further ones are in its log alone"
                item = Reported(item.rank, Note("warning", text, item.rank))
        if isinstance(item, WorkerReady):
            self.renew_lease()  # its clock is known before it has much to say
        self._post(item, len(line))

    def _read_log(self, process: WorkerProcess) -> None:
        try:
            self._log.open()
        except OSError as error:
            note = f"no log of rank {self.plan.rank}: {error}"
            self._post(Reported(self.plan.rank, Note("warning", note, self.plan.rank)), 0)
        while data := process.read_log():
            self._log.feed(data, time.time())
        self._log.close(time.time())


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
    if isinstance(message, TaskMessage):
        return TaskMessageReceived(rank, message)
    if isinstance(message, ReadyMessage):
        if message.rank != rank:
            raise ProtocolError(f"says that it is rank {message.rank}")
        # The other ranks will dial what it says.
        if not {where.address for where in message.addresses} <= {*start.addresses}:
            raise ProtocolError("says that it listens on an address that it was not given")
        return WorkerReady(rank, message.addresses, message.versions, message.generation)
    if isinstance(message, LostMessage):
        if not {message.peer, message.reported_by} - {None} <= {*range(start.world_size)} - {rank}:
            raise ProtocolError(f"lost rank {message.peer}, which is no peer of it")
        known = (message.generation, message.reason, message.reported_by)
        return PeerReported(rank, message.peer, *known)
    assert not isinstance(message, ClockMessage), "which is no input of the supervisor"
    for link in msgspec.convert(message.summary, Summary).links:
        if link.from_ != rank or link.to >= start.world_size:
            raise ProtocolError(f"measured a link of rank {link.from_} to rank {link.to}")
    return WorkerFinished(rank, message)


def _check_report(event: ShardSaved) -> None:
    """Its files will be fetched, and become part of a checkpoint."""
    try:
        reporter = read_report(event.report).rank
    except CheckpointError as error:
        raise ProtocolError(f"reports a checkpoint that cannot be: {error}") from None
    if reporter != event.rank:
        raise ProtocolError(f"reports what rank {reporter} saved")
