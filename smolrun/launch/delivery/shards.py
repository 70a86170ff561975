"""Fetches what ranks on other machines saved, so that a checkpoint lies whole on the driver.

    rank --- ShardSaved --> take() --> queue of its host --> [ get, compare, sync, delete there ]
                                                                        |
    committer <-- ShardSaved | ShardFailed -- arrived() / finish() <-------+

A rank's report is held back until its files are here: the committer, which counts reports, knows
no hosts. One thread for each host ("smolrun-mini2-fetch"); the driver's loop never waits for one.
Where ranks save faster than their links carry, saves are skipped, the same ones on all hosts and
never the newest: it may be the last of the run. Where the connection was lost, another one is made:
what was saved on a host is deleted with the run's folder there.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from smolrun.checkpoints.folder import part_folder
from smolrun.checkpoints.manifest import FileEntry, is_file_of
from smolrun.data.prepared import Progress
from smolrun.errors import HostError, SmolrunError
from smolrun.events import Event, ShardFailed, ShardSaved
from smolrun.launch.delivery.store import TransferProgress, silent

if TYPE_CHECKING:
    from smolrun.launch.remote.machine import Machine

# Saves that are fetched or wait for it; more would fill the disks of the hosts. Fewer than the
# committer keeps open.
_MOST_SAVES = 6
_SKIPPED = "skipped, as earlier checkpoints are still being fetched; raise checkpoint.every"
_ROUND_S = 0.2  # how late a Ctrl-C may be noticed: Windows notices none during a wait


@dataclass(frozen=True)
class ShardOrigin:
    """Where a rank writes: its machine, and the run's folder of checkpoints there."""

    machine: Machine
    checkpoints: str


@dataclass(frozen=True, eq=False)
class _Job:
    """What one rank saved; `files` are those its report promises."""

    event: ShardSaved
    files: dict[str, FileEntry]
    origin: ShardOrigin

    def failed(self, reason: str) -> ShardFailed:
        return ShardFailed(self.event.updates, self.event.rank, reason)


@dataclass
class _FetchQueue:
    """One host: `waiting` is fetched in order, the first being on its way; `unwanted` is deleted
    there."""

    machine: Machine
    waiting: deque[_Job] = field(default_factory=deque)
    unwanted: deque[_Job] = field(default_factory=deque)
    reopened: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    @property
    def name(self) -> str:
        return self.machine.name


class ShardFetcher:
    """Brings files of ranks on other machines into the driver's unfinished folders."""

    def __init__(
        self,
        origins: Mapping[int, ShardOrigin],
        checkpoints: Path,
        token: str,
        *,
        progress: Progress = silent,
        open_again: Callable[[Machine], Machine] | None = None,
    ) -> None:
        """`origins` by rank, without those of this machine; `checkpoints` is the run's folder
        here, `token` that of this start. `progress` is only called while `finish` waits, from other
        threads, one at a time. `open_again` makes another connection where one was lost."""
        self._origins = origins
        self._checkpoints = checkpoints
        self._token = token
        self._progress = progress
        self._open_again = open_again
        self._finishing = False
        self._told = TransferProgress("", silent)
        self._changed = threading.Condition()
        machines = {origin.machine.name: origin.machine for origin in origins.values()}
        self._queues = {name: _FetchQueue(machine) for name, machine in machines.items()}
        self._arrived: deque[Event] = deque()
        self._skipped: set[int] = set()  # saves, by their updates
        self._closing = False
        for queue in self._queues.values():
            threading.Thread(
                target=self._serve, args=(queue,), name=f"smolrun-{queue.name}-fetch", daemon=True
            ).start()

    def take(self, event: Event) -> bool:
        """True if the event is held back, and comes by `arrived` or `finish`; never blocks."""
        if not isinstance(event, ShardSaved | ShardFailed) or event.rank not in self._origins:
            return False
        origin = self._origins[event.rank]
        queue = self._queues[origin.machine.name]
        if isinstance(event, ShardFailed):  # a path of it alone does not tell whose disk is full
            reason = f"{queue.name}: {event.reason}"
            with self._changed:
                self._arrived.append(ShardFailed(event.updates, event.rank, reason))
            return True
        with self._changed:
            try:
                job = _Job(event, _files(event, queue.name), origin)
            except SmolrunError as error:
                self._arrived.append(ShardFailed(event.updates, event.rank, str(error)))
                return True
            if self._closing or event.updates in self._skipped:
                self._refuse(queue, job, "the run is over" if self._closing else _SKIPPED)
                return True
            if not self._num_open():
                self._told = TransferProgress("fetching checkpoints", self._tell)
            self._told.add(sum(file.bytes for file in job.files.values()))
            queue.waiting.append(job)
            self._skip_one_of_many()
            self._changed.notify_all()
        return True

    def _skip_one_of_many(self) -> None:
        """Gives up a save that no host sends yet, where there are too many."""
        queues = self._queues.values()
        saves = sorted({job.event.updates for queue in queues for job in queue.waiting})
        begun = {queue.waiting[0].event.updates for queue in queues if queue.waiting}
        idle = [updates for updates in saves[:-1] if updates not in begun]
        if len(saves) <= _MOST_SAVES or not idle:
            return
        self._skipped.add(idle[-1])
        for queue in queues:
            for job in [job for job in queue.waiting if job.event.updates == idle[-1]]:
                queue.waiting.remove(job)
                self._refuse(queue, job, _SKIPPED)

    def _refuse(self, queue: _FetchQueue, job: _Job, reason: str) -> None:
        self._arrived.append(job.failed(f"{queue.name}: {reason}"))
        queue.unwanted.append(job)

    def arrived(self) -> list[Event]:
        """The events whose files have arrived, each once; never blocks."""
        with self._changed:
            events = list(self._arrived)
            self._arrived.clear()
        return events

    def finish(self, timeout_s: float) -> list[Event]:
        """Waits for what is under way, and returns the rest of the events; nothing is taken after.

        What has not arrived in time becomes a ShardFailed. May be called again.
        """
        self._finishing = True
        give_up = time.monotonic() + timeout_s
        with self._changed:
            while self._num_open() and time.monotonic() < give_up:
                self._changed.wait(_ROUND_S)
            self._closing = True
            for queue in self._queues.values():
                for job in queue.waiting:
                    self._arrived.append(job.failed(f"{queue.name}: not fetched in time"))
                queue.waiting.clear()
            self._changed.notify_all()
        return self.arrived()

    def _tell(self, what: str, done: int, total: int) -> None:
        if self._finishing:
            self._progress(what, done, total)

    def _num_open(self) -> int:
        return sum(len(queue.waiting) for queue in self._queues.values())

    def _serve(self, queue: _FetchQueue) -> None:
        with queue.reopened:
            self._fetch_all(queue)

    def _fetch_all(self, queue: _FetchQueue) -> None:
        while (job := self._next(queue)) is not None:
            event: Event = job.event
            try:
                self._fetch_or_reconnect(job, queue)
            except SmolrunError as error:
                event = job.failed(str(error))
            except Exception as error:  # whatever it is: a save waits for this event
                event = job.failed(f"{queue.name}: {type(error).__name__}: {error}")
            with self._changed:
                # `finish` may have timed out and reported it as failed.
                if queue.waiting and queue.waiting[0] is job:
                    queue.waiting.popleft()
                    self._arrived.append(event)
                queue.unwanted.append(job)
                self._changed.notify_all()
            self._remove_there(queue)

    def _next(self, queue: _FetchQueue) -> _Job | None:
        """The oldest job of a host, which stays in its queue while it is served."""
        with self._changed:
            self._changed.wait_for(lambda: queue.waiting or self._closing)
            return queue.waiting[0] if queue.waiting else None

    def _fetch_or_reconnect(self, job: _Job, queue: _FetchQueue) -> None:
        try:
            self._fetch(job, queue)
        except HostError:
            if self._open_again is None or queue.machine.connection.lost is None:
                raise
            queue.machine = self._open_again(queue.machine)
            queue.reopened.callback(queue.machine.close)
            self._fetch(job, queue)

    def _fetch(self, job: _Job, queue: _FetchQueue) -> None:
        host = queue.name
        part = part_folder(self._checkpoints, job.event.updates, self._token)
        part.mkdir(parents=True, exist_ok=True)
        size = sum(file.bytes for file in job.files.values())
        if size > (free := shutil.disk_usage(part).free):
            what = f"{size / 1e9:.1f} GB do not fit on the driver's disk, {free / 1e9:.1f} GB free"
            raise SmolrunError(f"{host}: {what} ({part})")
        for name, file in job.files.items():
            source = f"{job.origin.checkpoints}/{part.name}/{name}"
            queue.machine.get(source, part / name, self._told.on_bytes, most_bytes=file.bytes)
            _check(part / name, file, host)
            self._remove_there(queue)  # what was skipped meanwhile

    def _remove_there(self, queue: _FetchQueue) -> None:
        """Fetched or not: the host needs the room. What cannot go now goes with the run."""
        with self._changed:
            jobs = list(queue.unwanted)
            queue.unwanted.clear()
        for job in jobs:
            part = part_folder(Path(), job.event.updates, self._token).name
            folder = f"{job.origin.checkpoints}/{part}"
            remove = {"do": "remove", "folder": folder, "names": list(job.files)}
            with contextlib.suppress(SmolrunError):
                queue.machine.call("run_folder", remove)


def _files(event: ShardSaved, host: str) -> dict[str, FileEntry]:
    """What the rank reports, checked: a name must never lead out of the folder."""
    try:
        files = msgspec.convert(event.report["files"], dict[str, FileEntry])
    except (msgspec.ValidationError, KeyError, TypeError) as error:
        raise SmolrunError(f"{host}: its report is damaged: {error}") from None
    for name in files:
        if not is_file_of(event.rank, name):
            raise SmolrunError(f"{host}: {name[:80]!r} cannot be a file of rank {event.rank}")
    return files


def _check(path: Path, file: FileEntry, host: str) -> None:
    """Compares what came, and has it on the disk when it returns."""
    with open(path, "rb+") as opened:
        os.fsync(opened.fileno())
        size = path.stat().st_size
        if size != file.bytes or hashlib.file_digest(opened, "sha256").hexdigest() != file.sha256:
            raise SmolrunError(f"{host}: {path.name} arrived with other bytes than were saved")
