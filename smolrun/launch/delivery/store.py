"""The driver's half of a host's content store: puts what is missing there, and nothing twice.

A bundle is a folder of files whose key stands for their content. The host compares every hash
before a bundle gets its place (`on_host/store.py`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smolrun.data.prepared import Progress
from smolrun.errors import HostError
from smolrun.launch.remote.connection import OnBytes

if TYPE_CHECKING:
    from smolrun.launch.remote.machine import Machine

_CALL_S = 60.0
# What a small computer's card gives: so long may a host read what it has to compare.
_READ_BYTES_PER_S = 20e6
# A disk that is full to the last byte breaks other things; and a folder has costs of its own.
_SPARE_BYTES = 50_000_000


@dataclass(frozen=True)
class File:
    """One file of a bundle: where it is on the driver, its size, and the sha256 of its bytes."""

    source: Path
    size: int
    sha256: str


@dataclass(frozen=True)
class Bundle:
    """A folder under a key; names are plain."""

    key: str
    files: Mapping[str, File]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files.values())

    @property
    def listing(self) -> dict[str, tuple[int, str]]:
        """What the host compares with."""
        return {name: (file.size, file.sha256) for name, file in self.files.items()}


def deliver_bundles(
    machine: Machine, root: str, bundles: list[Bundle], transfer: TransferProgress, **keys: Any
) -> None:
    """Have these bundles at `root`/<key> on the host, whole; `keys` go to the host's `look` and
    `finish` (run, keep, younger_s). HostError says what is in the way. Once the transfer is not
    wanted any more, no other bundle is begun; those that have arrived stay."""
    wanted = {bundle.key: bundle.listing for bundle in bundles}
    look = {"do": "look", "root": root, "wanted": wanted, **keys}
    answer = ask(machine, "store", look, num_bytes=sum(bundle.size for bundle in bundles))
    missing = [bundle for bundle in bundles if bundle.key in answer["missing"]]
    if not missing:
        return
    size = sum(bundle.size for bundle in missing)
    transfer.add(size)
    place = {"root": root, "incoming": answer["incoming"]}
    with dropped_on_error(machine, "store", place):
        check_room(machine, root, size, answer["free"])
        arrived = []
        for bundle in missing:
            if not transfer.is_wanted():
                break
            for name, file in bundle.files.items():
                path = f"{answer['incoming']}/{bundle.key}/{name}"
                put(machine, file.source, path, size, transfer.on_bytes)
            arrived.append(bundle)
        wanted = {bundle.key: bundle.listing for bundle in arrived}
        finish = {"do": "finish", **place, "wanted": wanted, **keys}
        check_whole(machine, ask(machine, "store", finish, num_bytes=size))


def ask(
    machine: Machine, script: str, request: dict[str, Any], *, num_bytes: int = 0
) -> dict[str, Any]:
    """A call that the host's disk may answer with an error of its own; HostError then."""
    timeout_s = _CALL_S + num_bytes / _READ_BYTES_PER_S
    answer = machine.call(script, request, timeout_s=timeout_s)
    if "os_error" in answer:
        raise HostError(
            machine.name,
            f"cannot write to {answer['path']} there: {answer['os_error']}",
            "set workdir: in the cluster file to a folder that is yours and has room",
        )
    return answer


def check_room(machine: Machine, folder: str, needed: int, free: int) -> None:
    """HostError if so many bytes do not fit on the host's disk."""
    if needed + _SPARE_BYTES > free:
        raise HostError(
            machine.name,
            f"{_size(needed)}, and {_size(_SPARE_BYTES)} to spare, do not fit on the disk of "
            f"{folder}, which has {_size(free)} free",
            "make room there, or set workdir: in the cluster file to a folder on a larger disk",
        )


def put(
    machine: Machine,
    source: Path | bytes,
    path: str,
    needed: int,
    on_bytes: OnBytes | None = None,
) -> None:
    """Copy a file; a disk that fills up meanwhile is reported as such."""
    try:
        machine.put(source, path, on_bytes)
    except HostError:
        folder = path.rpartition("/")[0]
        free = machine.call("store", {"do": "free", "root": folder}).get("free")
        if free is not None and free < _SPARE_BYTES:
            check_room(machine, folder, needed, free)
        raise


def check_whole(machine: Machine, answer: dict[str, Any]) -> None:
    """HostError if what arrived is not what was sent."""
    if answer["wrong"]:
        raise HostError(
            machine.name,
            f"{answer['wrong'][0]} arrived there with other bytes than it must have",
            "try again; if it stays so, the driver's own copy or a disk is damaged",
        )


@contextmanager
def dropped_on_error(machine: Machine, script: str, place: dict[str, Any]) -> Iterator[None]:
    """If the block raises, delete what was copied to the host; it does so itself after a day."""
    try:
        yield
    except BaseException:
        with suppress(Exception):  # what went wrong first is what counts
            machine.call(script, {"do": "drop", **place}, timeout_s=10.0)
        raise


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.1f} MB"


def silent(what: str, done: int, total: int) -> None:
    """Ignores progress."""


class TransferProgress:
    """Adds up for `progress`; any thread may call, and only one at a time reaches `progress`.

    `is_wanted()`: whether it shall continue; asked by the threads that copy, and may block."""

    def __init__(
        self,
        what: str,
        progress: Progress = silent,
        is_wanted: Callable[[], bool] = lambda: True,
    ) -> None:
        self.is_wanted = is_wanted
        self._what = what
        self._progress = progress
        self._lock = threading.Lock()
        self._done = self._total = 0

    @property
    def total(self) -> int:
        """Bytes that are to be copied, or were."""
        return self._total

    @property
    def done(self) -> int:
        """Bytes that were copied."""
        return self._done

    def add(self, num_bytes: int) -> None:
        """So much more is to be copied."""
        with self._lock:
            self._total += num_bytes

    def on_bytes(self, num_bytes: int) -> None:
        """So much more was copied."""
        with self._lock:
            self._done += num_bytes
            self._progress(self._what, self._done, self._total)
