"""What the driver tells W&B's process, and what that tells the driver; light on both sides."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Literal

import msgspec

from smolrun.files import atomic_write

_FILE = Path("wandb") / "status.json"


class Start(msgspec.Struct, frozen=True, kw_only=True):
    """The first line to W&B's process. No secret in it."""

    folder: str  # the run folder, absolute
    world_size: int
    mode: Literal["auto", "online", "offline"]
    project: str
    entity: str | None
    group: str | None
    tags: list[str]
    timeout_s: float


class Status(msgspec.Struct, kw_only=True):
    """`wandb/status.json` of the run folder. `warning` and `note` are sentences for the user."""

    state: Literal["starting", "online", "offline", "done", "failed"] = "starting"
    warning: str = ""
    note: str = ""
    url: str | None = None
    path: str | None = None  # W&B's own folder, which `wandb sync` uploads
    last_step: int = -1  # right once `has_ended`
    has_ended: bool = False  # the last process came to its end, and said so itself
    pid: int = 0  # of that process


def read_status(folder: Path) -> Status | None:
    """What the file in a run folder says; None if there is none that makes sense."""
    try:
        return msgspec.json.decode((folder / _FILE).read_bytes(), type=Status)
    except (OSError, ValueError):
        return None


def write_status(folder: Path, status: Status) -> None:
    """Replace the file; a disk that refuses is not worth more than silence here."""
    path = folder / _FILE
    with contextlib.suppress(OSError):
        path.parent.mkdir(exist_ok=True)
        atomic_write(path, msgspec.json.encode(status) + b"\n")
