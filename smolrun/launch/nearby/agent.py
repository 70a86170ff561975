"""The joined machine's side: answers what the coordinator asks over the transport.

It runs this machine's own smolrun, and only that: workers, and the scripts of on_host/ that keep
delivered files. Every path is below one folder. The user's own code of the coordinator's machine
runs after this machine's user has allowed it, by the hash of its files.

    worker     starts a worker; its three pipes are the channel's streams
    call       a script of on_host/ with a request
    put, get   one file
    approve    may the files of this folder run here?
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import queue
import re
import secrets
import threading
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from smolrun.errors import ProtocolError
from smolrun.launch.control import LineSplitter
from smolrun.launch.delivery.code_archive import package_files
from smolrun.launch.local import LocalProcess, start_worker
from smolrun.launch.nearby.frames import Kind
from smolrun.launch.nearby.protocol import code_hash
from smolrun.launch.nearby.transport import Request, RequestChannel
from smolrun.launch.on_host import run_folder, store

_SCRIPTS: Mapping[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "store": store.main,
    "run_folder": run_folder.main,
}
_PATHS = ("root", "incoming", "run", "folder")  # keys of a request that are paths
_MOST_REQUEST_BYTES = 64 << 20
_COPY_BYTES = 1 << 20
_PLAIN = re.compile(r"[A-Za-z0-9_.][A-Za-z0-9_. +@=-]*")
_NOTE = ".smolrun"  # of the folder of own code: who owns it
_END_S = 5.0
_DRAIN_S = 5.0  # a pipe ends with its worker; only a child that left its group could hold it longer


class RequestRefused(Exception):
    """The agent does not do what it is asked for; its text is for the coordinator's user."""


@dataclass
class Question:
    """What the coordinator wants to run here beyond smolrun's own code: files of its user, and what
    they or other libraries name (`module:name`). `reply` takes this machine's user's answer."""

    files: Mapping[str, bytes]
    targets: list[str]
    reply: Callable[[bool], None]


@dataclass
class JoinAgent:
    """Answers requests, by `on_open` of a Transport. Who can ask the user answers the `questions`.
    `trusted_targets` may be named by a configuration without asking."""

    workdir: Path
    trusted_targets: Collection[str]
    command: list[str] | None = None
    questions: queue.SimpleQueue[Question] = field(default_factory=queue.SimpleQueue)

    def __post_init__(self) -> None:
        self.workdir = self.workdir.resolve()
        self._approved: set[str] = set()  # hashes of own code
        self._trusted = set(self.trusted_targets)
        self._lock = threading.Lock()
        self.num_workers = 0

    def on_open(self, channel: RequestChannel, request: Request) -> None:
        """Answer one request; never raises."""
        acts = {
            "worker": self._worker,
            "call": self._call,
            "put": self._put,
            "get": self._get,
            "approve": self._approve,
        }
        try:
            act = acts.get(str(request.get("do")))
            if act is None:
                raise RequestRefused(f"does not know {request.get('do')!r}")
            result = act(channel, request)
        except (RequestRefused, ProtocolError) as error:
            result = {"error": str(error)}
        except OSError as error:
            where = f" {error.filename}" if error.filename else ""
            result = {"error": f"{error.strerror or error}{where}"}
        except Exception as error:  # of any kind: the coordinator waits for an answer
            result = {"error": f"{type(error).__name__}: {error}"}
        channel.exit(result)

    # -- requests ----

    def _call(self, channel: RequestChannel, request: Request) -> Request:
        script = _SCRIPTS.get(str(request.get("script")))
        if script is None:
            raise RequestRefused(f"does not run the script {request.get('script')!r}")
        asked = json.loads(channel.read_all(Kind.IN, _MOST_REQUEST_BYTES))
        self._check(asked)
        channel.write(Kind.OUT, json.dumps(script(asked)).encode())
        channel.end(Kind.OUT)
        return {}

    def _check(self, asked: Any) -> None:
        """RequestRefused where a request of a script has a path outside of our folder."""
        if not isinstance(asked, dict):
            raise RequestRefused("got a request that is not an object")
        for key in _PATHS:
            if asked.get(key):
                self._inside(asked[key])
        names = [*_list(asked.get("names")), *_list([asked.get("archive") or "x"])]
        for key, listing in dict(asked.get("wanted") or {}).items():
            names += [key, *listing]
        for name in names:
            parts = str(name).split("/")
            if not all(_PLAIN.fullmatch(part) and part != ".." for part in parts):
                raise RequestRefused(f"got a name that cannot be one: {str(name)[:100]!r}")

    def _inside(self, path: Any) -> Path:
        """A path below our folder, links resolved."""
        found = Path(str(path)).resolve()
        if not found.is_relative_to(self.workdir) or found == self.workdir:
            raise RequestRefused(f"got a path outside of {self.workdir}: {str(path)[:200]!r}")
        return found

    def _put(self, channel: RequestChannel, request: Request) -> Request:
        path = self._inside(request.get("path"))
        if not any(part.startswith(".incoming-") for part in path.parts):
            raise RequestRefused(f"got a file that is not part of a delivery: {path}")
        part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
        try:
            with part.open("xb") as file:
                while data := channel.read(Kind.IN):
                    file.write(data)
                size = file.tell()
            if size != request.get("size"):
                raise RequestRefused(f"got {size} bytes of {path.name}, not {request.get('size')}")
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
        return {}

    def _get(self, channel: RequestChannel, request: Request) -> Request:
        path = self._inside(request.get("path"))
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > int(request.get("most_bytes", 0)):
                raise RequestRefused(
                    f"{path} has {size:,} bytes, {request.get('most_bytes')} were expected"
                )
            while data := file.read(_COPY_BYTES):
                channel.write(Kind.OUT, data)
        channel.end(Kind.OUT)
        return {"size": size}

    def _approve(self, channel: RequestChannel, request: Request) -> Request:
        own = request.get("folder")
        files, digest = _own_files(self._inside(own)) if own else ({}, "")
        targets = {str(one) for one in _list(request.get("targets"))} - self._trusted
        if (files and digest not in self._approved) or targets:
            answers: queue.SimpleQueue[bool] = queue.SimpleQueue()
            self.questions.put(Question(files, sorted(targets), answers.put))
            channel.on_cancel(lambda: answers.put(False))
            if not answers.get():
                raise RequestRefused(
                    f"its user did not allow {named(files or targets)} to run there"
                )
            self._approved.add(digest)
            self._trusted |= targets
        return {}

    def _worker(self, channel: RequestChannel, request: Request) -> Request:
        folder = self._folder(request.get("own"))
        first = _first_line(channel)
        self._check_targets(first)
        threads = min(max(1, int(request.get("threads", 1))), 4096)
        process = start_worker(self.command, threads=threads, low_priority=True, cwd=folder)
        self._count(+1)
        channel.on_cancel(process.kill)
        try:
            return _bridge(channel, process, first)
        finally:
            self._count(-1)

    def _count(self, change: int) -> None:
        with self._lock:
            self.num_workers += change

    def _folder(self, own: Any) -> Path:
        """Where a worker runs: own code that was approved, or an empty folder."""
        if not own:
            folder = self.workdir / "empty"
            folder.mkdir(parents=True, exist_ok=True)
            return folder
        folder = self._inside(own)
        if _own_files(folder)[1] not in self._approved:
            raise RequestRefused("got files to run that its user has not allowed")
        return folder

    def _check_targets(self, line: bytes) -> None:
        """RequestRefused where a start message names code that is not part of smolrun's options."""
        start = json.loads(line or b"{}")
        config = start.get("config") if isinstance(start, dict) else None
        for section in (config or {}).values():
            if isinstance(section, dict):
                for target in (section.get("target"), section.get("loss")):
                    if target and target not in self._trusted:
                        raise RequestRefused(
                            f"does not run {str(target)[:200]!r}: it was not allowed"
                        )


def _bridge(channel: RequestChannel, process: LocalProcess, first: bytes) -> Request:
    """Connect the worker's pipes with the streams, until it has ended."""

    def feed() -> None:
        with contextlib.suppress(OSError, ValueError):  # it has ended
            process.write(first)
            while data := channel.read(Kind.IN):
                process.write(data)
        with contextlib.suppress(OSError):
            process.close_input()

    def drain(read: Callable[[], bytes], stream: Kind) -> None:
        with contextlib.suppress(OSError):  # the coordinator is gone: then it is to end
            while data := read():
                channel.write(stream, data)
        while read():
            pass

    readers = [
        _thread("out", drain, process.read_control, Kind.OUT),
        _thread("err", drain, process.read_log, Kind.ERR),
    ]
    _thread("in", feed)
    code = process.wait()
    for reader in readers:
        reader.join(_DRAIN_S)
    return {"code": code, "out_of_memory": process.out_of_memory()}


def _thread(what: str, target: Callable[..., None], *args: Any) -> threading.Thread:
    thread = threading.Thread(target=target, args=args, name=f"smolrun-joined-{what}", daemon=True)
    thread.start()
    return thread


def _first_line(channel: RequestChannel) -> bytes:
    """The start message, with its newline, and what came with it."""
    splitter, received = LineSplitter(), b""
    while data := channel.read(Kind.IN):
        received += data
        if splitter.feed(data):
            break
    return received


def _own_files(folder: Path) -> tuple[dict[str, bytes], str]:
    """The files of a folder of own code, and a hash of them."""
    files = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != _NOTE and "__pycache__" not in path.parts
    }
    digest = hashlib.sha256()
    for name, data in files.items():
        digest.update(f"{name}\n{hashlib.sha256(data).hexdigest()}\n".encode())
    return files, digest.hexdigest()


def own_code_hash() -> str:
    """Of the smolrun that runs here."""
    return code_hash({name: path.read_bytes() for name, path in package_files().items()})


def named(files: Collection[str]) -> str:
    """Up to three of these names, and how many more there are."""
    names = ", ".join(sorted(files)[:3])
    return names if len(files) <= 3 else f"{names} and {len(files) - 3} more files"


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
