"""What a rank of task=serve does for its host beside the model: it reports how much memory there
is, and keeps the machine awake while the driver has requests."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

import psutil

from smolrun.launch.channel import WorkerChannel
from smolrun.launch.control import StartMessage, TaskMessage, decode_data
from smolrun.launch.machine_memory import machine_memory
from smolrun.launch.wake import AwakeSwitch
from smolrun.serving.messages import HOSTS, HostMemory, StayAwake

_LOOK_EVERY_S = 1.0
_SEND_EVERY_S = 5.0
_END_S = 3.0
_WORTH = 0.01  # of all memory: a smaller change is not reported


@contextlib.contextmanager
def host_watched(start: StartMessage, channel: WorkerChannel, device: str) -> Iterator[None]:
    """Report the memory, and obey StayAwake, inside the `with`. `device`: type of the rank's."""
    watch = _Watch(start, channel, device)
    channel.subscribe(HOSTS, watch.obey)
    thread = threading.Thread(target=watch.run, name="smolrun-host", daemon=True)
    thread.start()
    try:
        yield
    finally:
        watch.over.set()
        thread.join(_END_S)


class _Watch:
    """One thread, as letting a machine sleep may take a while."""

    def __init__(self, start: StartMessage, channel: WorkerChannel, device: str) -> None:
        self._start = start
        self._device = device
        self._channel = channel
        self._is_awake_wanted = False
        self._last: HostMemory | None = None
        self._sent_s = 0.0
        self.over = threading.Event()

    def obey(self, message: TaskMessage) -> None:
        """StayAwake, which `run` does within a second."""
        self._is_awake_wanted = decode_data(message, StayAwake).is_on

    def run(self) -> None:
        """Until `over`."""
        with AwakeSwitch() as awake:
            while not self.over.wait(_LOOK_EVERY_S):
                awake.set(self._is_awake_wanted)
                self._report()

    def _report(self) -> None:
        """Where it has changed, and at times where it has not: the driver forgets."""
        memory, now = machine_memory(), time.monotonic()
        report = HostMemory(
            self._start.rank,
            self._start.host,
            memory.available,
            memory.total,
            psutil.Process().memory_info().rss,
            cache_grows=self._device == "cpu",
        )
        if self._last is None or now - self._sent_s > _SEND_EVERY_S or _differs(report, self._last):
            self._channel.send_data(HOSTS, report)
            self._last, self._sent_s = report, now


def _differs(report: HostMemory, last: HostMemory) -> bool:
    changes = (
        report.available_bytes - last.available_bytes,
        report.process_bytes - last.process_bytes,
    )
    return max(map(abs, changes)) > _WORTH * report.total_bytes
