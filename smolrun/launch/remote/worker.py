"""One worker on another machine, over a connection: WorkerProcess, as `local.py` has it.

    sshd -- login shell -- sh -- worker      all of one process group, whose number is sh's
              "<mark> <number>" is the first line of stdout; noise of a profile may come before it

sh stays, so that an end by a signal comes back as an exit code. Closing the worker's stdin ends it;
one that is frozen is ended by a second command that kills the group. If the connection is lost,
its lease ends it (control.py).
"""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from collections.abc import Mapping, Sequence

from smolrun.errors import HostError, SmolrunError
from smolrun.launch.control import EXIT_ABANDONED
from smolrun.launch.remote.connection import Connection, RemoteProcess, deadline, error_tail
from smolrun.launch.remote.shell import Shell, command, environment_input, posix, script

_START_S = 30.0
_KILL_S = 3.0
_POLL_S = 0.1
_MOST_NOISE_BYTES = 64 * 1024
# What sh makes of signal n is 128 + n. Only these: 130 and 131 are words of our own.
_SIGNALS = (1, 4, 6, 7, 8, 9, 10, 11, 13, 15)


class RemoteWorker:
    """A worker on another machine; `start_worker` makes one."""

    def __init__(
        self,
        connection: Connection,
        process: RemoteProcess,
        *,
        group: int | None,
        noise: bytes,
        first: bytes,
    ) -> None:
        self._connection = connection
        self._process = process
        self._group = group
        self._noise = noise
        self._first = first
        self._lock = threading.Lock()
        self._killing: threading.Thread | None = None
        self._lost: str | None = None
        self._has_ended = False

    def read_control(self) -> bytes:
        """Some bytes of its stdout; empty at the end."""
        first, self._first = self._first, b""
        return first or self._process.read_out()

    def read_log(self) -> bytes:
        """Some bytes of its stderr, after the output of its login shell; empty at the end."""
        noise, self._noise = self._noise, b""
        return noise or self._process.read_err()

    def write(self, data: bytes) -> None:
        """All of `data` into its stdin; blocks while it does not read. OSError when it is gone."""
        self._process.write(data)

    def close_input(self) -> None:
        """End its stdin."""
        self._process.close_input()

    def wait(self) -> int:
        """Its exit code once it has ended, -n for signal n; see `lost` for the other case."""
        code = self._process.wait()
        self._has_ended = code is not None
        if code is None:
            # After a kill, what closed the connection may have been ourselves.
            unknown = None if self._killing else "the SSH connection was lost"
            self._lost = self._connection.lost or unknown
            return EXIT_ABANDONED if self._lost else -9
        return 128 - code if code - 128 in _SIGNALS else code

    def lost(self) -> str | None:
        """After `wait`: why its exit code is unknown, if it is."""
        return self._lost

    def is_silent(self) -> bool:
        """Whether a keepalive of the connection has been unanswered for seconds."""
        return self._connection.is_silent

    def out_of_memory(self) -> str | None:
        """Always None: the exit status over SSH does not say it."""
        return None

    def kill(self) -> None:
        """End it and all it started, even if frozen; returns at once. May come twice."""
        with self._lock:
            if self._killing is None:
                self._killing = threading.Thread(
                    target=self._kill, name=f"smolrun-ssh-{self._connection.name}-kill", daemon=True
                )
                self._killing.start()

    def _kill(self) -> None:
        asking = threading.Thread(
            target=self._ask_to_end, name=f"smolrun-ssh-{self._connection.name}-end", daemon=True
        )
        give_up = time.monotonic() + _KILL_S
        if not self._connection.is_silent:  # else the command would not arrive
            asking.start()
        while asking.is_alive() and not self._connection.is_silent and time.monotonic() < give_up:
            asking.join(_POLL_S)
        if self._connection.is_silent:
            self._connection.give_up()
        self._process.close()

    def _ask_to_end(self) -> None:
        with contextlib.suppress(OSError):
            self._process.close_input()
        if self._group is not None:
            with contextlib.suppress(SmolrunError):
                # A shell that is no head of a group, as a strange SSH server may have it, is alone.
                # Once it has ended, its number may be another's; that of its group is not.
                alone = "" if self._has_ended else f" || kill -9 {self._group}"
                line = script(f"kill -9 -{self._group} 2>/dev/null{alone}")
                self._connection.run(line, timeout_s=_KILL_S)


def start_worker(
    connection: Connection,
    shell: Shell,
    argv: Sequence[str],
    *,
    env: Mapping[str, str],
    cwd: str | None = None,
    timeout_s: float = _START_S,
) -> RemoteWorker:
    """Start a worker, and wait until its shell is past its own noise; raises HostError."""
    mark = f"smolrun-{secrets.token_hex(8)}"
    process = connection.start(_line(shell, argv, env, cwd, mark))
    with deadline(connection.name, process, timeout_s) as late:
        received = _until_mark(process, mark.encode())
    if late.is_set():
        raise HostError(
            connection.name,
            f"its login shell did not come to our command within {timeout_s:g} s",
            f"what does `ssh {connection.name} true` wait for? look at its shell's start-up files",
        )
    if received is None:
        raise _no_start(connection, process)
    noise, group, first = received
    # What reads its input now is our own piece of sh, no longer a start-up file of the login shell.
    with contextlib.suppress(OSError):  # it has ended; its exit code says so
        process.write(environment_input(shell, env))
    return RemoteWorker(connection, process, group=group, noise=noise, first=first)


def _line(
    shell: Shell, argv: Sequence[str], env: Mapping[str, str], cwd: str | None, mark: str
) -> str:
    if shell is Shell.POSIX:
        command(shell, argv, env=env, cwd=cwd)  # refuses what cannot be said
        return script(f"printf '\\n%s %s\\n' {mark} $$; {posix(argv, env=env, cwd=cwd)}; exit $?")
    line = command(shell, argv, env=env, cwd=cwd)
    # Windows has no process groups; 0 says that there is none.
    return f"echo {mark} 0&{line}" if shell is Shell.CMD else f"Write-Output '{mark} 0'; {line}"


def _until_mark(process: RemoteProcess, mark: bytes) -> tuple[bytes, int | None, bytes] | None:
    """The noise before the mark, the process group, and what came after; None if it ended first."""
    received = b""
    while data := process.read_out():
        received += data
        before, found, after = received.partition(mark + b" ")
        number, newline, first = after.partition(b"\n")
        if found and newline:
            group = int(number) if number.strip().isdigit() and len(number) < 20 else 0
            return before.removesuffix(b"\n"), group or None, first
        received = received[-_MOST_NOISE_BYTES:]  # also after a mark that no number follows
    return None


def _no_start(connection: Connection, process: RemoteProcess) -> HostError:
    words = b""
    while data := process.read_err():
        words = (words + data)[-_MOST_NOISE_BYTES:]
    code = process.wait()
    process.close()
    if code is None:
        return HostError(connection.name, connection.lost or "the SSH connection was lost")
    what = f"its login shell ended (exit code {code}) before our command: {error_tail(words)}"
    return HostError(connection.name, what)
