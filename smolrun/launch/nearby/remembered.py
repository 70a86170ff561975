"""The machines that this account has paired with and keeps: they need no code the next time.

One file a machine in the configuration folder, mode 0600, so that two processes never overwrite
each other's. Two roles, as they permit different things: a `joiner` may join runs of this account,
a `coordinator` may run its code here.
"""

from __future__ import annotations

import contextlib
import hashlib
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import msgspec
import platformdirs

from smolrun.errors import SmolrunError
from smolrun.files import atomic_write, read_bytes
from smolrun.sanitize import one_line

Role = Literal["joiner", "coordinator"]
_MAX_FILE_BYTES = 4096
_NAME_CHARS = 60


class RememberedMachine(msgspec.Struct, frozen=True):
    """A machine whose key is kept. `since` is the day, in UTC: 2026-12-02."""

    role: Role
    name: str
    fingerprint: str
    since: str = ""


class RememberedMachines:
    """The files of one folder; the account's own if none is given."""

    def __init__(self, folder: Path | None = None) -> None:
        config = platformdirs.user_config_path("smolrun")
        self.folder = folder or config / "nearby" / "remembered"

    def all(self) -> list[RememberedMachine]:
        """Sorted by role and name. What cannot be read is not trusted, and left out."""
        found = [(path, _read(path)) for path in self.folder.glob("*.json")]
        known = [
            machine
            for path, machine in found
            if machine is not None and path == self._path(machine.role, machine.fingerprint)
        ]
        return sorted(known, key=lambda machine: (machine.role, machine.name, machine.fingerprint))

    def has(self, role: Role, fingerprint: str) -> bool:
        """Whether the machine with that key is kept in that role."""
        machine = _read(self._path(role, fingerprint))
        return machine is not None and (machine.role, machine.fingerprint) == (role, fingerprint)

    def add(self, role: Role, name: str, fingerprint: str) -> None:
        """Keep a machine. SmolrunError if its file cannot be written."""
        today = datetime.now(UTC).date().isoformat()
        machine = RememberedMachine(role, shown_name(name), fingerprint, today)
        path = self._path(role, fingerprint)
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            atomic_write(path, msgspec.json.encode(machine), mode=0o600)
        except OSError as error:
            what = f"{machine.name} cannot be remembered: {path}: {error.strerror}"
            raise SmolrunError(what) from None

    def forget(self, machine: RememberedMachine) -> None:
        """It needs a code from now on. SmolrunError if its file cannot be deleted."""
        path = self._path(machine.role, machine.fingerprint)
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise SmolrunError(f"cannot delete {path}: {error.strerror}") from None

    def _path(self, role: Role, fingerprint: str) -> Path:
        # A hash of the text, which may come from a file and must name none outside the folder.
        digest = hashlib.sha256(fingerprint.encode()).hexdigest()[:32]
        return self.folder / f"{role}-{digest}.json"


def shown_name(name: str) -> str:
    """A name that another machine gave itself, as it may be shown and kept: one line, at most 60
    characters, never empty."""
    return " ".join(one_line(name).split())[:_NAME_CHARS] or "unnamed"


def _read(path: Path) -> RememberedMachine | None:
    with contextlib.suppress(
        OSError, ValueError, RecursionError
    ):  # msgspec's errors are ValueError
        data = read_bytes(path, _MAX_FILE_BYTES)
        machine = msgspec.json.decode(data, type=RememberedMachine)
        return msgspec.structs.replace(machine, name=shown_name(machine.name))
    return None
