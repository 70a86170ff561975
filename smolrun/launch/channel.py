"""The worker's end of the control protocol: messages to the driver and from it.

A worker lives only as long as its driver wants it to. The end of stdin, a pipe that breaks, or too
long a silence all mean that the driver is gone, and the process ends at once, so that no
orphan ever stays on a host. Knows nothing of tasks, torch or the mesh. Three threads:
"smolrun-control" reads stdin by plain `os.read`, because Windows has no select on pipes;
"smolrun-lease" watches the silence; "smolrun-clock" answers leases, which may block.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, Literal

import msgspec
import psutil

from smolrun.errors import PeerLost, ProtocolError, StopRequested, WaitTimeout
from smolrun.events import Event
from smolrun.files import to_null_device
from smolrun.launch.control import (
    EXIT_ABANDONED,
    EXIT_ABORTED,
    LEASE_LIMIT_S,
    AbortMessage,
    Address,
    ClockMessage,
    DriverMessage,
    ErrorReport,
    EventMessage,
    LeaseMessage,
    LineSplitter,
    LogMessage,
    LostMessage,
    Message,
    ReadyMessage,
    RegroupMessage,
    ResultMessage,
    RosterMessage,
    StartMessage,
    StopMessage,
    TaskMessage,
    decode_from_driver,
    encode,
    task_message,
)
from smolrun.log_records import cut

_log = logging.getLogger(__name__)

_READ_BYTES = 64 * 1024
_LAST_ACTS_S = 0.5


class WorkerChannel:
    """Sends and receives control messages, from any thread; writing may block."""

    def __init__(
        self,
        read_fd: int,
        write_fd: int,
        *,
        lease_limit_s: float = LEASE_LIMIT_S,
        end_process: Callable[[int], object] | None = None,
    ) -> None:
        """Own both descriptors and listen at once. `end_process` is for tests, and may return."""
        self.stop_requested = threading.Event()
        self.start: StartMessage | None = None
        self._read_fd = read_fd
        self._write_fd = write_fd
        self._lease_limit_s = lease_limit_s
        self._end_process = end_process or _end_process
        self._write_lock = threading.Lock()
        self.generation = 0  # the latest that the driver has announced
        self._heard: queue.SimpleQueue[
            StartMessage | RosterMessage | RegroupMessage | StopMessage
        ] = queue.SimpleQueue()
        self._regroup_callback: Callable[[int], None] = lambda generation: None
        self._task_lock = threading.Lock()
        self._handlers: dict[str, Callable[[TaskMessage], None]] = {}
        self._unhandled: list[TaskMessage] = []
        self._stop_callbacks: list[Callable[[], None]] = []
        self._lease_renewed = threading.Event()
        self._timed: queue.SimpleQueue[tuple[float, float] | None] = queue.SimpleQueue()
        self._ended = threading.Event()
        threading.Thread(target=self._listen, name="smolrun-control", daemon=True).start()
        threading.Thread(target=self._watch_lease, name="smolrun-lease", daemon=True).start()
        threading.Thread(target=self._answer_leases, name="smolrun-clock", daemon=True).start()

    @classmethod
    def take_stdio(cls, *, lease_limit_s: float = LEASE_LIMIT_S) -> WorkerChannel:
        """Keep stdin and stdout for the protocol alone; must be a worker's first act.

        From here on fd 1 is the rank's log, so what any library prints, even from C, cannot break
        the protocol; and fd 0 is empty, so that no child process reads the driver's words away.
        """
        sys.stdout.flush()
        read_fd, write_fd = os.dup(0), os.dup(1)
        os.dup2(2, 1)
        to_null_device(0)
        for stream in (sys.stdout, sys.stderr):
            # Lines reach the log when they are printed, not when the process ends: it may end by
            # kill -9. Each by one write, also with PYTHONUNBUFFERED, where `print` would write word
            # by word: other threads log between them.
            stream.reconfigure(line_buffering=True, write_through=False)  # type: ignore[union-attr]  # always a TextIOWrapper here
        return cls(read_fd, write_fd, lease_limit_s=lease_limit_s)

    def wait_start(self, timeout_s: float) -> StartMessage:
        """The driver's first word; raises WaitTimeout, or StopRequested if it is to stop."""
        message = self._next(timeout_s, "to say what to run")
        if not isinstance(message, StartMessage):
            raise ProtocolError(f"the driver sent {type(message).__name__} before start")
        self.start = message
        return message

    def wait_membership(self, timeout_s: float) -> RosterMessage | RegroupMessage:
        """Where the ranks listen, or that they change; raises WaitTimeout, or StopRequested."""
        message = self._next(timeout_s, "to say where the other ranks are")
        if isinstance(message, StartMessage):
            raise ProtocolError("the driver sent StartMessage instead of the roster")
        return message

    def ready(
        self, addresses: list[Address], versions: dict[str, str], generation: int | None = None
    ) -> None:
        """Tell the driver that this rank listens there, best first; needs `wait_start` before.
        `generation`: of the RegroupMessage that this answers."""
        assert self.start is not None, "ready() comes after wait_start()"
        self._send(
            ReadyMessage(
                rank=self.start.rank,
                addresses=addresses,
                pid=os.getpid(),
                versions=versions,
                generation=generation,
            )
        )

    def lost(self, error: PeerLost) -> None:
        """Report a lost peer to the driver, which regroups those that are left."""
        known = (error.rank, error.generation, cut(error.reason), error.reported_by)
        self._send(LostMessage(*known))

    def on_regroup(self, callback: Callable[[int], None]) -> None:
        """Call `callback(generation)` when the driver announces one, on the thread
        "smolrun-control": it must not block. It replaces the callback before."""
        self._regroup_callback = callback

    def emit(self, event: Event) -> None:
        """Send the driver what happened. A NaN or an infinity in it arrives as null.

        What is true of the whole run (rank None) comes from rank 0; on others this does nothing."""
        if getattr(event, "rank", None) is None and self.start is not None and self.start.rank != 0:
            return
        self._send(EventMessage(data=event))

    def send_data(self, topic: str, data: msgspec.Struct) -> None:
        """Send the driver a task message; may block while the driver's queue is full."""
        self._send(task_message(topic, data))

    def subscribe(self, topic: str, handler: Callable[[TaskMessage], None]) -> None:
        """Call `handler` with each task message of the topic, those that came before first, on the
        thread "smolrun-control": it must not block. A ProtocolError of it ends this process."""
        with self._task_lock:
            early = [message for message in self._unhandled if message.topic == topic]
            self._unhandled = [message for message in self._unhandled if message.topic != topic]
            for message in early:
                handler(message)
            self._handlers[topic] = handler

    def on_stop(self, callback: Callable[[], None]) -> None:
        """Call `callback` when the driver asks this rank to stop, on the thread "smolrun-control":
        it must not block. At once, and here, if it has asked already."""
        with self._task_lock:
            self._stop_callbacks.append(callback)
            has_stopped = self.stop_requested.is_set()
        if has_stopped:
            callback()

    def log(self, level: Literal["debug", "info", "warning", "error"], message: str) -> None:
        """A sentence for the user and for the rank's log."""
        _log.log(logging.getLevelNamesMapping()[level.upper()], "%s", message)
        self._send(LogMessage(level=level, message=cut(message)))

    def result(
        self,
        status: Literal["done", "stopped", "failed"],
        *,
        error: ErrorReport | None = None,
        summary: dict[str, Any] | None = None,
    ) -> None:
        """The last word of this rank."""
        self._send(ResultMessage(status=status, error=error, summary=summary or {}))

    def _send(self, message: Message) -> None:
        line = memoryview(encode(message))
        try:
            with self._write_lock:
                while line:
                    line = line[os.write(self._write_fd, line) :]
        except OSError as error:
            self._abandon(f"the driver hears nothing any more ({error.strerror})")

    def _next(self, timeout_s: float, what: str) -> StartMessage | RosterMessage | RegroupMessage:
        try:
            message = self._heard.get(timeout=timeout_s)
        except queue.Empty:
            raise WaitTimeout(f"waited {timeout_s:g} s for the driver {what}") from None
        if isinstance(message, StopMessage):
            raise StopRequested("the driver asked this rank to stop before it began")
        return message

    def _listen(self) -> None:
        splitter = LineSplitter()
        try:
            while data := os.read(self._read_fd, _READ_BYTES):
                for line in splitter.feed(data):
                    self._lease_renewed.set()
                    self._obey(decode_from_driver(line))
        except ProtocolError as error:
            self._abandon(str(error))
        except OSError as error:
            self._abandon(f"the driver cannot be read any more ({error.strerror})")
        else:
            self._abandon("the driver is gone: it closed this worker's input")

    def _obey(self, message: DriverMessage) -> None:
        if isinstance(message, AbortMessage) or (
            isinstance(message, StopMessage) and self.stop_requested.is_set()
        ):
            self._abandon("the driver asked this worker to end now", EXIT_ABORTED)
        elif isinstance(message, StopMessage):
            with self._task_lock:
                self.stop_requested.set()
                callbacks = list(self._stop_callbacks)
            self._heard.put(message)
            for callback in callbacks:
                callback()
        elif isinstance(message, LeaseMessage):
            if message.sent_s is not None:
                self._timed.put((message.sent_s, time.time()))
        elif isinstance(message, StartMessage | RosterMessage):
            self._heard.put(message)
        elif isinstance(message, RegroupMessage):
            self.generation = message.generation
            self._heard.put(message)
            self._regroup_callback(message.generation)
        elif isinstance(message, TaskMessage):
            with self._task_lock:
                handler = self._handlers.get(message.topic)
                if handler is None:
                    self._unhandled.append(message)
            if handler is not None:
                handler(message)

    def _answer_leases(self) -> None:
        """The time of this host; a thread of its own, as the driver may read nothing for long."""
        while (timed := self._timed.get()) is not None:
            self._send(ClockMessage(*timed, answered_s=time.time()))

    def _watch_lease(self) -> None:
        """Sum up the silence in ticks of this thread, not by the clock.

        A worker that was itself frozen, or on a sleeping laptop, wakes up with leases waiting
        unread in the pipe: the jump of the clock says nothing about the driver, so a tick never
        counts for more than twice its length.
        """
        tick_s = min(0.5, self._lease_limit_s / 10)
        silence_s, before = 0.0, time.monotonic()
        while silence_s < self._lease_limit_s:
            if self._ended.wait(tick_s):
                return
            now = time.monotonic()
            silence_s += min(now - before, 2 * tick_s)
            before = now
            if self._lease_renewed.is_set():
                self._lease_renewed.clear()
                silence_s = 0.0
        self._abandon(f"no word from the driver for {self._lease_limit_s:g} s")

    def _abandon(self, why: str, code: int = EXIT_ABANDONED) -> None:
        """End this process now, whatever its main thread is doing; only the first call counts."""
        if self._ended.is_set():
            return
        self._ended.set()
        self._timed.put(None)
        # A frozen driver does not empty the log pipe: do not wait for it.
        _at_most(_LAST_ACTS_S, lambda: _write_log(f"smolrun worker ends: {why}\n"))
        self._end_process(code)


def _end_process(code: int) -> None:
    """End this process and all that it started, without asking anybody."""
    _at_most(_LAST_ACTS_S, _kill_children)
    os._exit(code)


def _at_most(seconds: float, act: Callable[[], None]) -> None:
    """Do something that may hang, but do not wait for it longer than that."""
    thread = threading.Thread(target=act, name="smolrun-last-acts", daemon=True)
    with contextlib.suppress(RuntimeError):  # no thread can be started; leaving matters more
        thread.start()
        thread.join(seconds)


def _write_log(text: str) -> None:
    with contextlib.suppress(OSError):  # the driver is gone, so this has no reader
        os.write(2, text.encode())


def _kill_children() -> None:
    with contextlib.suppress(psutil.Error):
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                child.kill()
