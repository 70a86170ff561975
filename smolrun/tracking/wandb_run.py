"""The driver's half of `tracker=wandb`: starts W&B's process, wakes it up, and waits a bounded time
for its end.

No event passes through here: W&B's process (`wandb.py`) reads metrics.jsonl itself. So W&B and its
server cannot slow the run; only `close` waits, for a bounded time.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import msgspec

from smolrun.events import Event
from smolrun.files import atomic_write

_WAKE_EVERY_S = 0.5
_GRACE_S = 3.0  # beside the server's own timeouts: to import W&B, and to end
_FILE = Path("wandb") / "status.json"
_SILENT_S = 2.0  # an end that takes longer is reported


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
    has_ended: bool = False  # the last process ended by itself
    pid: int = 0  # of that process


def read_status(folder: Path) -> Status | None:
    """status.json of a run folder; None if it is missing or damaged."""
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


class WandbRun:
    """A tracker that writes one W&B run for the run of `folder`. `warn` and `note` are called with
    messages for the user."""

    def __init__(
        self,
        folder: Path,
        *,
        world_size: int,
        mode: Literal["auto", "online", "offline"],
        project: str,
        entity: str | None,
        group: str | None,
        tags: list[str],
        timeout_s: float,
        warn: Callable[[str], None],
        note: Callable[[str], None],
    ) -> None:
        """OSError if the process cannot be started."""
        self._folder, self._shown = folder.absolute(), folder
        self._timeout_s = timeout_s
        self._warn = warn
        self._note = note
        self._woken_at = 0.0
        self._began_at = time.monotonic()
        self._reported = ""
        start = Start(
            folder=str(self._folder), world_size=world_size, mode=mode, project=project,
            entity=entity, group=group, tags=tags, timeout_s=timeout_s,
        )  # fmt: skip
        self._clear_status()
        with (self._folder / "logs" / "wandb.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "smolrun.tracking.wandb"],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                bufsize=0,
                start_new_session=hasattr(os, "setsid"),
                creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
            )
        self._write(msgspec.json.encode(start) + b"\n")
        # If it does not read for hours the pipe is full, and a wakeup is not needed.
        with contextlib.suppress(OSError, AttributeError, ValueError):
            os.set_blocking(self._process.stdin.fileno(), False)  # type: ignore[union-attr]

    @property
    def pid(self) -> int:
        """The process id of W&B's half."""
        return self._process.pid

    def record(self, event: Event) -> None:
        """Wake the process up, at most twice a second."""
        now = time.monotonic()
        if now - self._woken_at >= _WAKE_EVERY_S:
            self._woken_at = now
            self._write(b"\n")
            self._report()

    def close(self) -> None:
        """Wait until W&B has everything: at most `timeout_s`, and what is left of the start's."""
        with contextlib.suppress(OSError):
            self._process.stdin.close()  # type: ignore[union-attr]
        # A server that does not answer costs its timeout once at the start and once at the end.
        start_left_s = self._began_at + self._timeout_s - time.monotonic()
        limit_s = self._timeout_s + max(0.0, start_left_s) + _GRACE_S
        if not self._has_ended(_SILENT_S):
            self._note(f"waiting for W&B, at most {limit_s:.0f} s")
            if not self._has_ended(limit_s - _SILENT_S):
                self._kill()
        status = self._report()
        if status is None or status.state not in ("done", "failed"):
            where = status.path if status is not None and status.path else self._folder / "wandb"
            late = f"W&B did not finish in time; to upload it later: wandb sync {where}"
            self._warn(self._short(late))
        elif status.state == "done" and (text := status.note or status.url) and not status.warning:
            self._note(self._short(text) if status.note else f"W&B: {text}")

    def _write(self, data: bytes) -> None:
        # A broken pipe: the process has ended, and its status holds the reason. A full one: it
        # wakes up.
        with contextlib.suppress(OSError, ValueError):
            self._process.stdin.write(data)  # type: ignore[union-attr]

    def _report(self) -> Status | None:
        status = read_status(self._folder)
        if status is not None and status.warning and status.warning != self._reported:
            self._reported = status.warning
            self._warn(self._short(status.warning))
        return status

    def _short(self, text: str) -> str:
        """With the run folder as the user wrote it."""
        return text.replace(str(self._folder), str(self._shown))

    def _has_ended(self, within_s: float) -> bool:
        try:
            self._process.wait(within_s)
        except subprocess.TimeoutExpired:
            return False
        return True

    def _kill(self) -> None:
        with contextlib.suppress(OSError):
            if hasattr(os, "killpg"):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.kill()
        self._process.wait()

    def _clear_status(self) -> None:
        """Clear the messages that an earlier part of the run left; its last step stays."""
        if (before := read_status(self._folder)) is not None:
            before.state, before.warning, before.note = "starting", "", ""
            write_status(self._folder, before)
