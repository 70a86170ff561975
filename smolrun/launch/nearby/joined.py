"""The coordinator's side of a joined machine: a Machine, as of a host over SSH, whose commands are
those that the machine's agent offers.

No shell line goes there, and no code of smolrun: the machine runs its own.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from smolrun.errors import HostError, ProtocolError
from smolrun.files import atomic_writer
from smolrun.launch.control import EXIT_ABANDONED, EXIT_FAILED
from smolrun.launch.hosts import WorkerPlan, WorkerProcess
from smolrun.launch.nearby.frames import Kind
from smolrun.launch.nearby.protocol import JoinRequest
from smolrun.launch.nearby.remembered import RememberedMachine, RememberedMachines, Role
from smolrun.launch.nearby.transport import Request, RequestChannel, Transport
from smolrun.launch.remote.answers import checked
from smolrun.launch.remote.connection import CommandTimeout, Completed, OnBytes, RemoteProcess
from smolrun.launch.remote.machine import HostSpec, Machine
from smolrun.launch.remote.shell import Shell
from smolrun.sanitize import all_in_one_line, one_line

_COPY_BYTES = 256 * 1024
_COPY_S = 3600.0  # of one file: a silent connection is ended long before
_MOST_ANSWER_BYTES = 64 << 20
_APPROVE_S = 600.0
_MOST_ERROR_CHARS = 1000


class SessionMachines(RememberedMachines):
    """The machines that this account keeps, and those that were paired in this process: these may
    join again, until it ends, without a code."""

    def __init__(self) -> None:
        super().__init__()
        self._for_now: set[tuple[Role, str]] = set()

    def add_for_now(self, role: Role, fingerprint: str) -> None:
        """It has just paired."""
        self._for_now.add((role, fingerprint))

    def all(self) -> list[RememberedMachine]:
        """Both kinds."""
        return [*super().all(), *(RememberedMachine(role, "", key) for role, key in self._for_now)]

    def has(self, role: Role, fingerprint: str) -> bool:
        """Whether the machine with that key is known in that role."""
        return (role, fingerprint) in self._for_now or super().has(role, fingerprint)


class JoinedConnection:
    """Connection by a Transport. `addresses` are the machine's own, first as it has reached us."""

    def __init__(self, name: str, transport: Transport, addresses: list[str]) -> None:
        self.name = name
        self.addresses = addresses
        self.transport = transport

    @property
    def address(self) -> str | None:
        """The IP address that it has reached us from."""
        return self.addresses[0]

    @property
    def lost(self) -> str | None:
        """Why it was lost; None while it is open."""
        return None if self.transport.is_open else self.transport.lost or "it was closed"

    @property
    def is_silent(self) -> bool:
        """Whether nothing has come from it for seconds."""
        return self.transport.is_silent

    def give_up(self) -> None:
        """Close it as lost, now."""
        self.transport.give_up("it does not answer")

    def run(self, command: str, *, data: bytes = b"", timeout_s: float = 60.0) -> Completed:
        """HostError: a joined machine runs no commands."""
        self._refuse(command)

    def start(self, command: str) -> RemoteProcess:
        """HostError: see `run`."""
        self._refuse(command)

    def _refuse(self, command: str) -> NoReturn:
        raise HostError(self.name, f"a joined machine runs no shell commands ({command[:100]})")

    def put(self, source: Path | bytes, path: str, on_bytes: OnBytes | None = None) -> None:
        """Copy a file there, whole or not at all; its folder must exist."""
        size = len(source) if isinstance(source, bytes) else source.stat().st_size
        with self._asked({"do": "put", "path": path, "size": size}) as channel:
            with contextlib.suppress(BrokenPipeError):  # it was refused: the result says why
                for data in _pieces(source):
                    channel.write(Kind.IN, data)
                    if on_bytes is not None:
                        on_bytes(len(data))
            channel.end(Kind.IN)
            self._result(channel, _COPY_S)

    def get(
        self, path: str, target: Path, on_bytes: OnBytes | None = None, *, most_bytes: int
    ) -> None:
        """Copy a file from there, whole or not at all; the folder of `target` must exist."""
        request = {"do": "get", "path": path, "most_bytes": most_bytes}
        with atomic_writer(target) as file, self._asked(request) as channel:
            while data := channel.read(Kind.OUT):
                file.write(data)
                if file.tell() > most_bytes:
                    what = f"{path} has more than the {most_bytes:,} bytes that were expected"
                    raise HostError(self.name, what)
                if on_bytes is not None:
                    on_bytes(len(data))
            if self._result(channel, _COPY_S).get("size") != file.tell():
                raise HostError(self.name, f"{path} changed while it was read")

    def ask(self, request: Request, data: bytes, timeout_s: float) -> bytes:
        """The output of a request with `data` as its input."""
        with self._asked(request) as channel:
            late = threading.Timer(timeout_s, channel.abandon)
            late.daemon = True
            late.start()
            try:
                with contextlib.suppress(BrokenPipeError):
                    channel.write(Kind.IN, data)
                channel.end(Kind.IN)
                answer = channel.read_all(Kind.OUT, _MOST_ANSWER_BYTES)
                self._result(channel, timeout_s)
            finally:
                late.cancel()
        return answer

    def close(self) -> None:
        """Does nothing: the machine stays joined for the next start of the run."""

    @contextlib.contextmanager
    def _asked(self, request: Request) -> Iterator[RequestChannel]:
        try:
            channel = self.transport.open(request)
            try:
                yield channel
            finally:
                channel.abandon()
        except ProtocolError as error:
            raise HostError(
                self.name, f"broke the protocol of joined machines: it {error}"
            ) from None
        except OSError as error:
            raise HostError(self.name, self.lost or str(error)) from None

    def _result(self, channel: RequestChannel, timeout_s: float) -> Request:
        result = channel.wait(timeout_s)
        if result is None and self.lost is None:
            raise CommandTimeout(self.name, f"it did not answer within {timeout_s:g} s")
        if result is None:
            raise HostError(self.name, f"the connection was lost ({self.lost})")
        if "error" in result:
            raise HostError(self.name, one_line(str(result["error"]))[:_MOST_ERROR_CHARS])
        return result


@dataclass(frozen=True, eq=False)
class JoinedMachine(Machine):
    """A machine that has joined; see `joined_machine`."""

    @property
    def joined(self) -> JoinedConnection:
        """Its connection."""
        assert isinstance(self.connection, JoinedConnection), "joined_machine has made it"
        return self.connection

    @property
    def addresses(self) -> list[str]:
        """Its IP addresses, best first."""
        return self.joined.addresses

    def call(self, script: str, request: dict[str, Any], timeout_s: float = 60.0) -> dict[str, Any]:
        """What on_host/<script>.py answers there."""
        order = {"do": "call", "script": script}
        answer = self.joined.ask(order, json.dumps(request).encode(), timeout_s)
        try:
            return checked(script, request.get("do"), all_in_one_line(json.loads(answer)))
        except (ValueError, RecursionError, msgspec.ValidationError) as error:
            what = f"its answer to {script!r} is not valid: {error}"
            raise HostError(self.name, what) from None

    def allow(self, own: str | None, targets: Sequence[str]) -> None:
        """Have the machine's user allow the files of the folder `own` there, and these targets; as
        long as that takes, ten minutes at most. HostError if they do not."""
        self.joined.ask({"do": "approve", "folder": own, "targets": [*targets]}, b"", _APPROVE_S)

    def close(self) -> None:
        """Does nothing: the machine stays joined; its workers end with their driver."""


def joined_machine(
    hello: JoinRequest, transport: Transport, addresses: list[str], *, host: str, cluster: str
) -> JoinedMachine:
    """The machine that has said `hello`, as the host of a run."""
    return JoinedMachine(
        HostSpec(name=host, ssh="", cluster=cluster),
        JoinedConnection(host, transport, addresses),
        Shell.POSIX,
        one_line(hello.os),
        one_line(hello.home),
        one_line(hello.workdir),
        one_line(hello.python),
        hello.cores,
        installed={name: number and one_line(number) for name, number in hello.versions.items()},
    )


@dataclass(frozen=True)
class JoinedHost:
    """A joined machine that is ready for workers; `own` is the folder of the user's own code
    there, if there is any."""

    machine: JoinedMachine
    own: str | None

    def start(self, plan: WorkerPlan) -> WorkerProcess:
        """Start one worker there. HostError."""
        request = {"do": "worker", "threads": plan.start.threads, "own": self.own}
        try:
            return JoinedWorker(self.machine.joined, self.machine.joined.transport.open(request))
        except OSError as error:
            raise HostError(self.machine.name, str(error)) from None


class JoinedWorker:
    """WorkerProcess over a channel."""

    def __init__(self, connection: JoinedConnection, channel: RequestChannel) -> None:
        self._connection = connection
        self._channel = channel
        self._result: Request = {}
        self._lost: str | None = None
        self._is_explained = False

    def read_control(self) -> bytes:
        """Some bytes of its stdout; empty at the end."""
        return self._channel.read(Kind.OUT)

    def read_log(self) -> bytes:
        """Some bytes of its stderr, and at last why it could not be started; empty at the end."""
        if data := self._channel.read(Kind.ERR):
            return data
        result = {} if self._is_explained else self._channel.wait(0.0) or {}
        self._is_explained = True
        return f"{result['error']}\n".encode() if "error" in result else b""

    def write(self, data: bytes) -> None:
        """All of `data` into its stdin; blocks while it does not read. OSError when it is gone."""
        self._channel.write(Kind.IN, data)

    def close_input(self) -> None:
        """End its stdin."""
        self._channel.end(Kind.IN)

    def wait(self) -> int:
        """Its exit code once it has ended, -n for signal n; see `lost` for the other case."""
        result = self._channel.wait()
        if result is None:
            self._lost = f"the connection was lost ({self._connection.lost or 'closed'})"
            return EXIT_ABANDONED
        self._result = result
        code = result.get("code")
        return code if isinstance(code, int) else EXIT_FAILED

    def lost(self) -> str | None:
        """After `wait`: why its exit code is unknown, if it is."""
        return self._lost

    def is_silent(self) -> bool:
        """Whether nothing has come from its machine for seconds."""
        return self._connection.is_silent

    def out_of_memory(self) -> str | None:
        """After `wait`: a sentence if its system may have ended it because memory was full."""
        said = self._result.get("out_of_memory")
        return one_line(said)[:_MOST_ERROR_CHARS] if isinstance(said, str) else None

    def kill(self) -> None:
        """End it and all it started, even if frozen; returns at once. May come twice."""
        if self._connection.is_silent:
            self._connection.give_up()  # its agent ends it as well
        else:
            thread = threading.Thread(
                target=self._channel.cancel, name="smolrun-nearby-kill", daemon=True
            )
            thread.start()


def _pieces(source: Path | bytes) -> Iterator[bytes]:
    if isinstance(source, bytes):
        yield source
        return
    with source.open("rb") as file:
        while data := file.read(_COPY_BYTES):
            yield data
