"""`tracker=wandb`: one W&B run, written by a process of its own, so that W&B and its server cannot
slow or end the run.

    driver    WandbRun: starts the process, wakes it up, waits a bounded time for its end
    process   `python -m smolrun.tracking.wandb`: reads metrics.jsonl as it grows, calls `wandb`

    stdin, first line   `Start`, as JSON
    stdin, other lines  empty: metrics.jsonl may have grown
    stdin, EOF          metrics.jsonl is complete
    output              one file, `wandb/status.json` of the run folder

The key is W&B's own: environment, netrc or `wandb login`, read in that process, passed to no one.
"""

from __future__ import annotations

import contextlib
import hashlib
import netrc
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal
from urllib.parse import urlparse

import msgspec
import psutil

from smolrun.events import Event
from smolrun.files import atomic_write, read_yaml
from smolrun.sanitize import without_secrets
from smolrun.tracking.figures import StepRows

_MOST_READ_BYTES = 1 << 20  # of metrics.jsonl at once
_READ_BACK_S = 60.0  # to read the file of a process that was killed, and for every byte of it:
_READ_BACK_BYTES_PER_S = 200_000  # W&B's tool reads 3 to 5 MB/s on two shared cores
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
        warn: Callable[[str], None],
        note: Callable[[str], None],
        **start: Any,
    ) -> None:
        """`start`: the other fields of `Start`. OSError if the process cannot be started."""
        self._folder, self._shown = folder.absolute(), folder
        self._start = Start(folder=str(self._folder), **start)
        self._warn = warn
        self._note = note
        self._woken_at = 0.0
        self._began_at = time.monotonic()
        self._reported = ""
        if (before := read_status(self._folder)) is not None:  # of an earlier part of the run
            before.state, before.warning, before.note = "starting", "", ""  # its last step stays
            write_status(self._folder, before)
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
        self._write(msgspec.json.encode(self._start) + b"\n")
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
        start_left_s = self._began_at + self._start.timeout_s - time.monotonic()
        limit_s = self._start.timeout_s + max(0.0, start_left_s) + _GRACE_S
        if not self._has_ended(_SILENT_S):
            self._note(f"waiting for W&B, at most {limit_s:.0f} s")
            if not self._has_ended(limit_s - _SILENT_S):
                kill_tree(self._process)
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


def main() -> int:
    """Follow one run to its end; exit code 0 if W&B has it, online or as an offline run."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's
    with contextlib.suppress(OSError, AttributeError):
        os.nice(5)  # the ranks of this machine come first
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # a run speaks to one server only
    start = msgspec.json.decode(sys.stdin.buffer.readline(), type=Start)
    folder = Path(start.folder)
    last_step, unread = last_step_of(folder, start.timeout_s)
    status = Status(last_step=last_step, pid=os.getpid())
    write_status(folder, status)
    try:
        Recorder(start, status, unread).follow(sys.stdin.buffer)
    except Exception as error:  # any error of W&B becomes one warning, and the run continues
        status.state = "failed"
        status.warning = f"W&B broke ({type(error).__name__}: {short_error(error)})"
    write_status(folder, status)
    return 0 if status.state == "done" else 1


class Recorder:
    """Writes one W&B run."""

    def __init__(self, start: Start, status: Status, unread: str = "") -> None:
        """`unread`: a file of an earlier offline part whose last step is not known, or ""."""
        self._start = start
        self._unread = unread
        self._folder = Path(start.folder)
        self._config = _read_config(self._folder)
        self._status = status
        self._run = self._open()
        first_step = status.last_step + 1
        if status.state == "online":
            first_step = int(self._run.starting_step)  # the server decides
        self._rows = StepRows(start.world_size, first_step=first_step)

    def follow(self, wakeups: BinaryIO) -> None:
        """Log new events at every line of `wakeups`, until its EOF."""
        write_status(self._folder, self._status)
        with (self._folder / "metrics.jsonl").open("rb") as metrics:
            lines = EventReader(metrics)
            for _ in wakeups:
                self._log(lines)
            self._log(lines)
        for step, row in self._rows.rest():
            self._write(step, row)
        self._finish()

    def _log(self, lines: EventReader) -> None:
        for event in lines:
            if event.get("event") == "sample":
                self._run.summary["sample"] = event.get("text")
            for step, row in self._rows.add(event):
                self._write(step, row)

    def _write(self, step: int, row: dict[str, float]) -> None:
        self._run.log(row, step=step)
        self._status.last_step = step

    def _finish(self) -> None:
        steps = self._config.get("training", {}).get("steps", 0)
        is_whole = self._status.last_step + 1 >= steps
        was_online, self._status.state = self._status.state == "online", "done"
        try:
            self._run.finish(exit_code=0 if is_whole else 1)
        except TimeoutError:
            limit = f"the server did not take everything within {self._start.timeout_s:g} s"
            self._status.warning = self._instead(limit)
        if not was_online and not self._status.warning:
            self._status.note = f"W&B offline; to upload it: {self._sync()}"
        self._status.has_ended = True

    def _open(self) -> Any:
        """The W&B run: online if that is wanted and works, else offline."""
        import wandb

        forced = os.environ.pop("WANDB_MODE", "")  # it would contradict what is decided here
        settings = wandb.Settings(**self._settings())
        mode, why = _mode(self._start.mode, forced, str(wandb.setup().settings.base_url))
        if mode == "online":
            try:
                return self._begin(wandb, settings, "online")
            except Exception as error:  # no server, no right, no sense: offline always works
                why = short_error(error)
                wandb.teardown()
        run = self._begin(wandb, settings, "offline")
        if self._unread:
            doubled = f"{self._unread} cannot be read to its end, so W&B may have some steps twice"
            why = f"{why}; {doubled}" if why else doubled
        if why:
            self._status.warning = self._instead(why)
        return run

    def _begin(self, wandb: Any, settings: Any, mode: Any) -> Any:
        run = wandb.init(
            mode=mode,
            dir=str(self._folder),
            id=run_id(self._folder),
            resume="allow" if mode == "online" else None,
            name=self._folder.name,
            project=self._start.project,
            entity=self._start.entity,
            group=self._start.group,
            tags=self._start.tags,
            config=self._config,
            settings=settings,
        )
        self._status.state = mode
        self._status.url = run.url if mode == "online" else None
        self._status.path = str(Path(run.dir).parent)
        return run

    def _settings(self) -> dict[str, Any]:
        """Quiet, bounded, no statistics of this process: those of the ranks are in the events."""
        return {
            "silent": True,
            "program": "smolrun",
            "console": "off",
            "disable_git": True,
            "disable_code": True,
            "save_code": False,
            "x_disable_stats": True,
            "x_disable_machine_info": True,
            "x_save_requirements": False,
            "allow_val_change": True,
            "init_timeout": self._start.timeout_s,
            "login_timeout": self._start.timeout_s,
            "finish_timeout": self._start.timeout_s,
            "finish_timeout_raises": True,
            "x_transaction_log_flush_interval": 2.0,  # so little is lost if this process is killed
        }

    def _instead(self, why: str) -> str:
        return f"W&B offline: {why}; to upload it later: {self._sync()}"

    def _sync(self) -> str:
        """The command; an offline run that was resumed has several parts."""
        path = Path(self._status.path or self._folder / "wandb")
        parts = [part for part in path.parent.glob("offline-run-*") if part.is_dir()]
        return f"wandb sync {path.parent / 'offline-run-*' if len(parts) > 1 else path}"


def last_step_of(folder: Path, timeout_s: float) -> tuple[int, str]:
    """The last step that W&B has of the run in `folder`, -1 for none, and the name of a file that
    may have later ones, else "". A resumed run must not log a step again, because W&B keeps all
    rows of an offline run.

    A process that ended by itself has written it to status.json. One that outlived its driver is
    waited for; for one that was killed W&B's own files are read."""
    before = read_status(folder)
    deadline = time.monotonic() + timeout_s
    while before is not None and _lives(before.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    before = read_status(folder)
    if before is None or before.has_ended:
        return before.last_step if before is not None else -1, ""
    last_step, unread = before.last_step, ""
    for file in folder.glob("wandb/*run-*/run-*.wandb"):
        step, is_whole = last_step_in(file)
        last_step, unread = max(last_step, step), unread if is_whole else file.name
    return last_step, unread


def _lives(pid: int) -> bool:
    try:
        return "smolrun.tracking.wandb" in psutil.Process(pid).cmdline()
    except (psutil.Error, ValueError, OverflowError):
        return False


def last_step_in(file: Path) -> tuple[int, bool]:
    """The last step in a file of W&B's, -1 for none, and whether W&B could read all of it."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
    try:
        limit_s = _READ_BACK_S + file.stat().st_size / _READ_BACK_BYTES_PER_S
        return last_step_written(command, limit_s, file.parent)
    except OSError:
        return -1, False


def last_step_written(command: list[str], limit_s: float, folder: Path) -> tuple[int, bool]:
    """The last step in the rows that a command writes, -1 for none, and whether it wrote all of
    them: ended within `limit_s`, and without an error. OSError if it cannot be started."""
    last_step = -1
    # Through a file in `folder`: the rows of a long run are too many for memory.
    with tempfile.TemporaryFile(dir=folder) as rows:
        process = subprocess.Popen(command, stdout=rows)  # noqa: S603  (W&B's own)
        try:
            is_whole = process.wait(limit_s) == 0
        except subprocess.TimeoutExpired:
            is_whole = False
            kill_tree(process)
        rows.seek(0)
        for row in rows:
            if b'"type":"history"' in row:
                try:
                    step = msgspec.json.decode(row, type=_HistoryRow).history.step.num
                except ValueError:
                    is_whole = False
                else:
                    last_step = max(last_step, step)
    return last_step, is_whole


def kill_tree(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and its children: `wandb` starts a program that would survive it."""
    with contextlib.suppress(psutil.Error):
        parent = psutil.Process(process.pid)
        parent.suspend()  # it starts no more of them
        for child in parent.children(recursive=True):
            with contextlib.suppress(psutil.Error):
                child.kill()
    process.kill()
    process.wait()


class _Step(msgspec.Struct):
    num: int = 0  # W&B leaves zeros out


class _History(msgspec.Struct):
    step: _Step = msgspec.field(default_factory=_Step)


class _HistoryRow(msgspec.Struct):
    """A line of `wandb leet inspect --json`: the fields that are read."""

    history: _History


class EventReader:
    """Iterates over the events of a growing file; only complete lines count."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._rest = b""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while data := self._file.read(_MOST_READ_BYTES):
            *lines, self._rest = (self._rest + data).split(b"\n")
            for line in lines:
                try:
                    event = msgspec.json.decode(line)
                except ValueError:  # cut by a crash long ago; the others are still good
                    continue
                if isinstance(event, dict):
                    yield event


def run_id(folder: Path) -> str:
    """A legal and unique id of a W&B run from the names of its folder: at most 64 characters, its
    time and its random end kept. Jobs of two sweeps may have one name, so theirs has the sweep's
    too; and a job that has started over is another run than its earlier ones."""
    if not (folder.parent / "sweep.yaml").is_file():
        plain = _for_ids(folder.name)
        return plain if len(plain) <= 64 else f"{plain[:43]}-{plain[-20:]}"
    aside = re.compile(rf"\.{re.escape(folder.name)}\.(\d+)")  # as the sweep renames earlier ones
    starts = sum(bool(aside.fullmatch(path.name)) for path in folder.parent.iterdir())
    whole = f"{folder.parent.name}/{folder.name}{f'/{starts}' if starts else ''}"
    digest = hashlib.sha256(whole.encode()).hexdigest()
    return f"{_for_ids(folder.name)[:43]}-{digest[:20]}"


def _for_ids(name: str) -> str:
    return "".join(c if c.isascii() and (c.isalnum() or c in "-_") else "-" for c in name)


def _read_config(folder: Path) -> dict[str, Any]:
    config = msgspec.yaml.decode(read_yaml(folder / "config.yaml"))
    hidden: dict[str, Any] = without_secrets(config)
    return hidden


def _mode(wanted: str, forced: str, base_url: str) -> tuple[str, str]:
    """online or offline, and why it is not `wanted`. `forced` is the environment's WANDB_MODE."""
    if wanted == "offline" or (wanted == "auto" and forced in ("offline", "disabled", "dryrun")):
        return "offline", ""
    if has_key(base_url):
        return "online", ""
    return "offline", "not logged in (run: wandb login)" if wanted == "online" else ""


def has_key(base_url: str) -> bool:
    """Whether W&B would find a key without a prompt."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    for name in (os.environ.get("NETRC"), "~/.netrc", "~/_netrc"):
        path = Path(os.path.expanduser(name)) if name else None
        if path is not None and path.is_file():
            with contextlib.suppress(OSError, netrc.NetrcParseError):
                return (
                    netrc.netrc(str(path)).hosts.get(urlparse(base_url).hostname or "") is not None
                )
    return False


def short_error(error: Exception) -> str:
    """What an error of W&B says, in one line without the key."""
    text = " ".join(str(error).split()) or type(error).__name__
    if key := os.environ.get("WANDB_API_KEY"):
        text = text.replace(key, "(the key)")
    return text if len(text) <= 200 else f"{text[:199]}…"


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # what is left to W&B's own threads is on the disk
